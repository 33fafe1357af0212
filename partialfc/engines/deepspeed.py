"""The DeepSpeed engine: optimizer state, gradients and weights of the backbone are split over the ranks (ZeRO,
Rajbhandari et al., 2020, arXiv:1910.02054).

Imported only if ``engine.name`` is deepspeed. DeepSpeed sees neither head nor loss: it gets the gradient of the
embeddings, already scaled, and the scale at the update. The ranks agree beforehand to apply or skip a step, and
DeepSpeed's own overflow check is forced to the same decision.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from partialfc.config import Config
from partialfc.engines.base import DTYPES, GradientWatch, broadcast_buffers, require_compiler
from partialfc.engines.batch_norm import BatchNormModes
from partialfc.engines.deepspeed_config import deepspeed_options, loss_scale
from partialfc.engines.state import WEIGHTS, BackboneState, ReplicatedBackbone
from partialfc.engines.zero_state import Zero0State, Zero3State, Zero12State, ZeroState
from partialfc.errors import ConfigError, MissingDependency, PartialFCError
from partialfc.runtime.process import ProcessContext
from partialfc.tracking.console import log

_STATES: list[Callable[[nn.Module], ZeroState]] = [Zero0State, Zero12State, Zero12State, Zero3State]


class DeepSpeedEngine:
    """A backbone and its optimizer, split over the ranks as ``engine.zero_stage`` says.

    With ``bf16`` or ``fp16`` the forward pass computes under autocast, with weights stored in that dtype; the optimizer
    updates float32 weights. Statistics of batch normalisation stay float32, and are rank 0's, as under
    DistributedDataParallel.

    Args:
        module: the backbone, on the rank's device, with its initial weights. DeepSpeed changes it in place.

    Raises:
        ConfigError: ``engine.deepspeed_config`` contradicts the config, or DeepSpeed refuses it.
        MissingDependency: DeepSpeed is not installed.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, config: Config, process: ProcessContext) -> None:
        assert dist.is_initialized(), "DeepSpeed needs a process group, even of one rank"
        parameters = sum(parameter.numel() for parameter in module.parameters())
        options = deepspeed_options(config, process.world_size, parameters)
        deepspeed = _import_deepspeed(process, options)
        self.module, self.device, self.stage = module, process.device, config.engine.zero_stage
        self.dtype = DTYPES[config.engine.precision]
        self.loss_scale = loss_scale(config) if config.engine.precision == "fp16" else None
        self._alone, self._offloads = process.world_size == 1, config.engine.offload == "cpu"
        self._weightless = _without_weights(module)
        self._batch_norm = BatchNormModes(module)
        self._local_gradient = GradientWatch()
        self._with_gradient: Tensor | None = None  # a parameter that has a gradient in this step
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # the only layout that DeepSpeed supports
            if parameter.requires_grad:  # registered before DeepSpeed's own hook, which averages
                parameter.register_post_accumulate_grad_hook(self._watch_gradient)
        if self.dtype is not None:
            module.forward = torch.autocast(self.device.type, self.dtype)(module.forward)
            for part in module.modules():
                if isinstance(part, _BatchNorm) and part.affine:
                    _normalize_in_float32(part)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # DeepSpeed may begin with a step on zero gradients: weight decay must not act
        zero_state: ZeroState = _STATES[self.stage](module)
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=options, dist_init_required=False
            )
        except (ValueError, TypeError, AssertionError) as error:  # pydantic's errors are ValueErrors
            raise ConfigError(f"DeepSpeed refuses its configuration: {error}") from error
        self.state: BackboneState
        if self.stage == 0 and self.dtype is None:
            self.state = ReplicatedBackbone(module, optimizer)
        else:
            self.state = zero_state
            zero_state.attach(self._engine)
        if config.engine.compile:
            require_compiler(process.device.type)
            module.compile(options={"fallback_random": True})
        process.watch(self._engine.seq_data_parallel_group)
        self._buffers = list(module.buffers())
        self._buffers_before = [torch.empty_like(buffer) for buffer in self._buffers]
        self._norm = torch.zeros((), device=process.device)
        self._skipped_itself = False  # DeepSpeed has skipped this step of its own accord

    def begin_step(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._local_gradient.reset()
        self._skipped_itself = False
        if self._buffers:
            broadcast_buffers(self._buffers)
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def forward(self, images: Tensor, images_of_all_ranks: int, last: bool = True) -> Tensor:
        self._batch_norm.choose(len(images), images_of_all_ranks)
        self._engine.set_gradient_accumulation_boundary(False)  # backward sets it
        embeddings: Tensor = self._engine(images)
        return embeddings.float()

    def backward(self, embeddings: Tensor, gradient: Tensor, last: bool) -> None:
        if self.loss_scale:
            gradient = gradient * self.loss_scale.value
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes a scalar; this one's gradient with respect to the embeddings is `gradient`.
        self._engine.backward((embeddings * gradient).sum(), scale_wrt_gas=False)

    @torch.no_grad()
    def finish_backward(self) -> tuple[Tensor, Tensor]:
        own_is_finite = mean_is_finite = self._local_gradient.is_finite()
        if self.stage == 0:  # gradients are whole; at other stages the norm is known after the step
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            self._norm = torch.linalg.vector_norm(torch.stack(norms)) / self._scale
            mean_is_finite = self._norm.isfinite()
        elif not self._alone:
            mean_is_finite = torch.ones_like(own_is_finite)
        return own_is_finite, mean_is_finite

    def step(self) -> bool:
        if not self._deepspeed_step():
            self._skipped_itself = True
            return False
        if self.loss_scale:
            self.loss_scale.applied()
        return True

    @torch.no_grad()
    def skip(self) -> bool:
        if self.stage == 0:
            self._engine.zero_grad()
        elif not self._skipped_itself:
            self._spoil_gradient()
            if self._deepspeed_step():
                raise PartialFCError("DeepSpeed applied a step that the ranks had agreed to skip")
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        return self.loss_scale is not None and self.loss_scale.skipped()

    def grad_norm(self) -> Tensor:
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        broadcast_buffers(self._buffers)
        if isinstance(self.state, ZeroState):
            weights = self.state.weights(device=self.device)
        else:
            weights = {f"{WEIGHTS}{name}": value for name, value in self.module.state_dict().items()}
        backbone = copy.deepcopy(self._weightless)
        backbone.load_state_dict({name.removeprefix(WEIGHTS): value for name, value in weights.items()}, assign=True)
        backbone.eval()
        del weights
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            yield backbone

    def counts(self) -> dict[str, Any]:
        return {"loss_scale": self.loss_scale.state()} if self.loss_scale else {}

    def load_counts(self, counts: dict[str, Any]) -> None:
        if self.loss_scale and "loss_scale" in counts:
            self.loss_scale.load(counts["loss_scale"])

    @property
    def _scale(self) -> float:
        return self.loss_scale.value if self.loss_scale else 1.0

    def _deepspeed_step(self) -> bool:
        """Run DeepSpeed's update; return False if it skipped the step because of a non-finite gradient."""
        if self.loss_scale:
            self._engine.optimizer.loss_scale = self.loss_scale.value  # which it divides by; it multiplies by 1.0
        try:
            self._engine.step()
        finally:
            if self.loss_scale:
                self._engine.optimizer.loss_scale = 1.0
        if self.stage:
            self._norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        return bool(self._engine.was_step_applied())

    def _watch_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._local_gradient.add(parameter.grad)
        self._with_gradient = parameter

    def _spoil_gradient(self) -> None:
        """Put Inf into the averaged gradient on all ranks: nothing else makes DeepSpeed skip a step."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        # The next step must overwrite it: so not a parameter without gradient, which DeepSpeed leaves alone, and not
        # the padding, which rank 0 does not have.
        parameter: Any = self._with_gradient
        assert parameter is not None, "a step without any gradient"
        if self.stage == 3:
            spoilt = torch.zeros_like(parameter.ds_tensor)
            if dist.get_rank() == 0:
                spoilt.view(-1)[0] = math.inf
            safe_set_local_grad(parameter, spoilt)
        else:
            safe_set_full_grad(parameter, torch.full_like(parameter, math.inf))
        if self._offloads:  # norms were taken when the gradients arrived in host memory
            norms = self._engine.optimizer.norm_for_param_grads
            for key in norms:
                norms[key] = torch.tensor(math.inf)


def _import_deepspeed(process: ProcessContext, options: dict[str, Any]) -> ModuleType:
    os.environ.setdefault("DS_ACCELERATOR", process.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, and only launchers set it
    try:
        import deepspeed
    except ImportError as error:
        raise MissingDependency(
            "engine.name=deepspeed needs DeepSpeed: pip install -c constraints.txt '.[deepspeed]'"
        ) from error
    if process.device.type == "cpu":
        # Its own all-reduce for the ranks of a CPU host takes a minute to compile at first use: gloo suffices.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed uses deprecated names of torch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    verbose = options.get("wall_clock_breakdown") or options.get("comms_logger")
    logger.handlers = [_ToLog(process.is_first, logging.INFO if verbose else logging.WARNING)]
    return deepspeed


class _ToLog(logging.Handler):
    """Writes DeepSpeed's messages in the log format of the package, on rank 0."""

    def __init__(self, shown: bool, level: int) -> None:
        super().__init__(level)
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        expected = ("OVERFLOW!", "untested optimizer")  # the trainer reports overflows; the optimizer is intended
        if self._shown and not any(words in message for words in expected):
            log(f"DeepSpeed: {message}")


def _without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` whose parameters take no memory; its buffers do."""
    weightless = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, weightless)


def _normalize_in_float32(norm: _BatchNorm) -> None:
    """Make ``norm``, whose weights will be stored in half precision, compute as under autocast: with float32 weights
    and statistics, whatever the dtype of its input.
    """
    forward_of_norm = norm.forward

    def forward(x: Tensor) -> Tensor:
        stored = norm._parameters["weight"], norm._parameters["bias"]
        try:
            for name, value in zip(("weight", "bias"), stored, strict=True):
                norm._parameters[name] = None if value is None else value.float()  # type: ignore[assignment]
            return forward_of_norm(x)
        finally:
            norm._parameters["weight"], norm._parameters["bias"] = stored

    norm.forward = forward  # type: ignore[assignment]  # its parameter has another name
