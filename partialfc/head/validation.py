"""Checks of a head's constructor arguments."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from partialfc.errors import ConfigError
from partialfc.head.center_loss import CenterLoss
from partialfc.head.sample_rate import SampleRate
from partialfc.head.softmax.products import PRECISIONS
from partialfc.losses import Loss, Samples
from partialfc.losses.base import NEEDS

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_sizes(num_classes: int, embedding_dim: int, seed: int, memory_budget_mb: float) -> None:
    """Raise ConfigError unless all are numbers of their kind, and all but the seed positive."""
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim), ("seed", seed)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ConfigError(f"{name} must be an int, got {value!r}")
    if num_classes < 1 or embedding_dim < 1:
        raise ConfigError(f"num_classes and embedding_dim must be at least 1, got {num_classes} and {embedding_dim}")
    if not _is_number(memory_budget_mb) or not memory_budget_mb > 0:
        raise ConfigError(f"memory_budget_mb must be a positive number, got {memory_budget_mb!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_options(
    sample_rate: SampleRate,
    center_loss: CenterLoss | None,
    filter_threshold: float | None,
    on_nonfinite: str,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    matmul_precision: str | None,
) -> None:
    """Raise ConfigError for an option of the wrong type or out of its range."""
    if not callable(sample_rate) and not (_is_number(sample_rate) and 0.0 < sample_rate <= 1.0):
        raise ConfigError(f"sample_rate must be a number in (0, 1] or a function of the step, got {sample_rate!r}")
    if filter_threshold is not None and not (_is_number(filter_threshold) and -1.0 <= filter_threshold <= 1.0):
        raise ConfigError(f"filter_threshold is a cosine, in [-1, 1], got {filter_threshold!r}")
    if center_loss is not None and not isinstance(center_loss, CenterLoss):
        raise ConfigError(f"center_loss must be a CenterLoss, e.g. CenterLoss(weight=0.003), got {center_loss!r}")
    if on_nonfinite not in ("raise", "propagate"):
        raise ConfigError(f'on_nonfinite must be "raise" or "propagate", got {on_nonfinite!r}')
    if weight_dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"weight_dtype must be torch.float32, torch.float64 or torch.bfloat16, got {weight_dtype}")
    if compute_dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"compute_dtype must be torch.float32 or torch.float64, got {compute_dtype}")
    if matmul_precision is not None and matmul_precision not in PRECISIONS:
        raise ConfigError(f"matmul_precision must be one of {PRECISIONS}, got {matmul_precision!r}")


def check_loss(loss: Loss) -> None:
    """Raise ConfigError unless ``loss`` keeps the contract of :class:`~partialfc.losses.Loss`, in a trial run."""
    if not isinstance(loss, Loss):
        raise ConfigError(f"loss must be a partialfc.losses.Loss, e.g. losses.ArcFace(), got {loss!r}")
    name = type(loss).__name__
    if not loss.needs <= NEEDS:
        raise ConfigError(f"{name}.needs may hold {sorted(NEEDS)}, got {sorted(loss.needs)}")
    if loss.raw_logits and (loss.sub_centers is not None or not loss.negatives_are_linear):
        raise ConfigError(f"{name} works on raw logits: it cannot have sub-centers or override negative_logits")
    tensors = [*loss.parameters(), *loss.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return
    cosine = torch.tensor([0.3, 0.6], dtype=torch.float64, device=tensors[0].device if tensors else None)
    samples = _trial_samples(loss, cosine)
    with torch.enable_grad():
        _check_logits(name, loss, cosine, samples)
    _check_state(name, loss, samples)


def _trial_samples(loss: Loss, cosine: Tensor) -> Samples:
    """Return two samples with everything that ``loss`` needs."""
    ones = torch.ones_like(cosine)
    return Samples(
        norms=(10 * ones).requires_grad_("norms" in loss.needs),
        valid=ones.bool(),
        positions=ones.long(),
        step=0,
        seed=0,
        target_cosine=cosine if "target_cosine_first" in loss.needs else None,
        noise=ones if "noise" in loss.needs else None,
        state=loss.stateful.state,
    )


def _check_logits(name: str, loss: Loss, cosine: Tensor, samples: Samples) -> None:
    ones = torch.ones_like(cosine)
    _check_shape(f"{name}.target_logit", loss.target_logit(cosine.clone().requires_grad_(), samples), (2,))
    chunk = torch.zeros(2, 3, device=cosine.device, requires_grad=True)
    negatives = loss.negative_logits(chunk, samples)
    _check_shape(f"{name}.negative_logits", negatives, (2, 3))
    _check_shape(f"{name}.objective", loss.objective(ones, ones, ones), (2,))
    penalty = loss.penalty(samples)
    if penalty is not None:
        _check_shape(f"{name}.penalty", penalty, (2,))
    variables = [tensor for tensor in (*loss.parameters(), samples.norms) if tensor.requires_grad]
    if variables and negatives.requires_grad:
        grads = torch.autograd.grad(negatives.sum(), variables, allow_unused=True)
        if any(grad is not None for grad in grads):
            raise ConfigError(
                f"{name}.negative_logits depends on a parameter of the loss or on samples.norms, whose gradient "
                "would be lost; they may enter target_logit, objective and penalty, parameters also logit_offset"
            )


def _check_state(name: str, loss: Loss, samples: Samples) -> None:
    if samples.state is not None:
        statistics = loss.statistics(samples)
        if statistics is None:
            raise ConfigError(f"{name} has a state but no statistics() for it to follow")
        _check_shape(f"{name}.next_state", loss.next_state(samples.state, statistics), tuple(samples.state.shape))


def _check_shape(name: str, result: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(result.shape) != expected:
        raise ConfigError(f"{name} must keep the shape {list(expected)} of its input, got {list(result.shape)}")


_owners: WeakKeyDictionary[Loss, ref[nn.Module]] = WeakKeyDictionary()


def register_owner(loss: Loss, head: Any) -> None:
    """Make ``head`` the owner of ``loss``, and move ``loss`` to its device.

    Raises:
        ConfigError: the loss has a state or parameters, and another head owns it.
    """
    if loss.stateful.state is not None or any(True for _ in loss.parameters()):
        holder = loss.stateful
        owner: Any = _owners[holder]() if holder in _owners else None
        if owner is not None and owner.loss.stateful is holder:
            raise ConfigError(f"this {type(holder).__name__} already belongs to a head; give each head its own")
        _owners[holder] = ref(head)
    if not head.weight.is_meta:
        loss.to(head.weight.device)
