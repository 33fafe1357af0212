"""The modes of ``matmul_precision``: each keeps its contract against a dense computation in float64.

A CPU rounds the operands as a GPU does and sums in float32, so what separates a mode from float64 here is what does on
a GPU, but for the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from partialfc import CenterLoss, PartialFC, losses
from partialfc.errors import ConfigError
from partialfc.head.softmax.float32 import full_float32
from partialfc.head.softmax.products import PRECISIONS, Precision, Products
from tests.harness.dense_reference import CenterTerm, Dense, Extras, Negatives, base_of, dense_head, sub_centers_of
from tests.harness.loss_cases import LOSSES, make_loss

CLASSES, DIM, BATCH = 1000, 512, 96
COSINES = [0.3, 0.9, 0.98]


@dataclass
class Contract:
    """Errors relative to the loss, to a gradient's norm, and to the norm of a row that is not tiny."""

    loss: float
    gradient: float
    worst_row: float


CONTRACTS: dict[Precision, Contract] = {"exact": Contract(1e-5, 1e-5, 1e-4), "fast": Contract(5e-4, 3e-3, 4e-2)}


def strain(spec: dict[str, Any]) -> float:
    """Return how much more the error of a cosine matters to this loss than to ArcFace at scale 64."""
    base = base_of(spec)
    steepness = {"mv_am_softmax": 1.12, "curricularface": 2.0}.get(base["name"], 1.0)
    focus = 3.0 if spec["name"] == "focal" else 1.0  # (1 − p)²·nll
    return max(1.0, make_loss(base).scale / 64) * steepness * focus


@dataclass
class Task:
    """One step of a head in training, with classes in pairs that look alike."""

    name: str
    cosine: float
    sample_rate: float = 1.0
    filter_threshold: float | None = None
    correct_sampling: bool = False
    memory_budget_mb: float = 256

    @property
    def spec(self) -> dict[str, Any]:
        return LOSSES[self.name]


@dataclass
class Inputs:
    embeddings: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor
    centers: Tensor
    extras: Extras


def make_inputs(task: Task) -> Inputs:
    generator = torch.Generator().manual_seed(11)

    def unit(*shape: int) -> Tensor:
        vectors = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(vectors, dim=-1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sub_centers = sub_centers_of(task.spec)
    shape = (CLASSES,) if sub_centers is None else (CLASSES, sub_centers)
    weight = unit(*shape)
    weight[1::2] = torch.nn.functional.normalize(0.6 * weight[0::2] + 0.8 * weight[1::2], dim=-1)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels[5] = -1
    own = weight[labels.clamp(min=0)]
    own = own if sub_centers is None else own[:, 0]
    across = unit(BATCH)
    across = torch.nn.functional.normalize(across - (across * own).sum(1, keepdim=True) * own)
    cosines = task.cosine - 0.02 * uniform(BATCH, 1)
    embeddings = (cosines * own + (1 - cosines**2).sqrt() * across) * (10 + 20 * uniform(BATCH, 1))
    weight = weight * (0.5 + uniform(*shape, 1))
    name = base_of(task.spec)["name"]
    state = {"curricularface": [0.3], "adaface": [20.0, 6.0]}.get(name)
    extras = Extras(
        None if state is None else torch.tensor(state, dtype=torch.float64),
        bias=torch.tensor([8.5], dtype=torch.float64, requires_grad=True) if name == "uce" else None,
    )
    centers = torch.randn(CLASSES, DIM, generator=generator)
    return Inputs(embeddings.float(), labels, weight.float(), 0.1 * uniform(CLASSES).float(), centers, extras)


@dataclass
class Errors:
    """Relative errors of one step: see :class:`Contract`."""

    true_loss: float
    loss: float
    gradients: dict[str, float]
    worst_rows: dict[str, float]
    largest: dict[str, float]  # relative to a gradient's largest entry


def errors_of_a_step(task: Task, precision: Precision | None) -> Errors:
    """Take a step in a mode, and compare it with the dense computation."""
    inputs = make_inputs(task)
    head = PartialFC(
        CLASSES,
        DIM,
        make_loss(task.spec),
        sample_rate=task.sample_rate,
        center_loss=CenterLoss(weight=0.003, alpha=0.5),
        filter_threshold=task.filter_threshold,
        correct_sampling=task.correct_sampling,
        matmul_precision=precision,
        memory_budget_mb=task.memory_budget_mb,
    )
    with torch.no_grad():
        head.weight.copy_(inputs.weight)
        if head.bias is not None:
            head.bias.copy_(inputs.bias)
        assert head.center_loss is not None
        head.center_loss.centers.copy_(inputs.centers)
        for name in ("state", "bias"):
            if getattr(inputs.extras, name) is not None:
                getattr(head.loss.stateful, name).copy_(getattr(inputs.extras, name))
    embeddings = inputs.embeddings.clone().requires_grad_()
    out = head(embeddings, inputs.labels)
    out.loss.backward()
    active = torch.zeros(CLASSES, dtype=torch.bool)
    active[head.weight.grad.coalesce().indices()[0]] = True
    weight_if_sampled = 1 / task.sample_rate if task.correct_sampling else 1.0
    expected: Dense = dense_head(
        task.spec,
        inputs.embeddings,
        inputs.labels,
        inputs.weight,
        None if head.bias is None else inputs.bias,
        Negatives(active, task.filter_threshold, weight_if_sampled),
        CenterTerm(inputs.centers, 0.003, 0.5),
        inputs.extras,
    )
    gradients = {
        "embeddings": (embeddings.grad, expected.grad_embeddings),
        "weight": (head.weight.grad.to_dense(), expected.grad_weight),
    }
    if head.bias is not None and expected.grad_bias is not None:
        gradients["bias"] = (head.bias.grad.to_dense(), expected.grad_bias)
    return Errors(
        float(expected.softmax_loss),
        float(((out.softmax_loss - expected.softmax_loss) / expected.softmax_loss.clamp_min(1e-30)).abs()),
        {name: float((value - true).norm() / true.norm()) for name, (value, true) in gradients.items()},
        {name: worst_row(value, true) for name, (value, true) in gradients.items() if true.dim() > 1},
        {name: float((value - true).abs().max() / true.abs().max()) for name, (value, true) in gradients.items()},
    )


def worst_row(value: Tensor, true: Tensor) -> float:
    """Return the largest relative error of a row, of those with at least a hundredth of the largest norm."""
    norms = true.flatten(1).norm(dim=1)
    error = (value - true).flatten(1).norm(dim=1)
    return float((error / norms)[norms >= 1e-2 * norms.max()].max())


def check(task: Task, precision: Precision) -> None:
    contract, errors, strained = CONTRACTS[precision], errors_of_a_step(task, precision), strain(task.spec)
    # One or two samples make a tiny loss: nothing averages the errors of their logits.
    assert errors.loss <= contract.loss * strained * (10 if errors.true_loss < 1e-2 else 1)
    for name, error in errors.gradients.items():
        assert error <= contract.gradient * strained, name
    for name, error in errors.worst_rows.items():
        if name == "embeddings" or sub_centers_of(task.spec) is None:  # of two sub-centers as near, either is taken
            assert error <= contract.worst_row * strained, name


NAMES = [name for name in LOSSES if not name.startswith("elastic")]  # whose draws no negative sees
CASES = [(name, cosine, precision) for name in NAMES for cosine in COSINES for precision in CONTRACTS]
SOME = [CASES[6 * i + (2 * i + j) % 6] for i in range(len(NAMES)) for j in (0, 3)]  # each loss in each mode


@pytest.mark.parametrize(("name", "cosine", "precision"), SOME)
def test_each_mode_keeps_its_contract(name: str, cosine: float, precision: Precision) -> None:
    check(Task(name, cosine), precision)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cosine", "precision"), sorted(set(CASES) - set(SOME)))
def test_each_mode_keeps_its_contract_in_every_state(name: str, cosine: float, precision: Precision) -> None:
    check(Task(name, cosine), precision)


def check_largest(name: str, cosine: float) -> None:
    """Check each gradient of ``exact`` to 1e-5 of its largest entry, where float32 reaches half of that."""
    task = Task(name, cosine)
    in_float32, exact = (errors_of_a_step(task, precision).largest for precision in ("highest", "exact"))
    for part, error in exact.items():
        assert error <= max(1e-5 * strain(task.spec), 2 * in_float32[part]), part


@pytest.mark.parametrize("name", ["arcface", "softmax", "sub-center arcface", "circle", "magface"])
@pytest.mark.parametrize("cosine", [0.9, 0.98])
def test_exact_gradients_are_within_1e_5_of_their_largest_entry(name: str, cosine: float) -> None:
    check_largest(name, cosine)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", COSINES)
def test_exact_gradients_of_every_loss_are_within_1e_5_of_their_largest_entry(name: str, cosine: float) -> None:
    check_largest(name, cosine)


@pytest.mark.parametrize("precision", CONTRACTS)
@pytest.mark.parametrize("name", ["arcface", "softmax", "curricularface", "sub-center arcface", "uce"])
def test_options_keep_the_contract(name: str, precision: Precision) -> None:
    check(Task(name, 0.3, sample_rate=0.3, correct_sampling=True), precision)
    check(Task(name, 0.9, filter_threshold=0.3, memory_budget_mb=1.0), precision)  # many chunks, the last a small one


@pytest.mark.parametrize("precision", CONTRACTS)
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_log_sum_exp_is_not_shifted(precision: Precision, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.nn.functional.normalize(torch.randn(n, DIM, generator=generator)) for n in (128, 4096))
    products = Products(precision, torch.float32)
    logits = products.logits(products.logit_embeddings(x, scale), products.logit_weights(w), torch.empty(128, 4096))
    true = scale * x.double() @ w.double().t()
    error = logits.double().logsumexp(1) - true.logsumexp(1)
    assert float(error.mean().abs()) <= (3e-4 if precision == "fast" else 1e-6)
    assert float(error.abs().max()) <= (4e-3 if precision == "fast" else 2e-5)


def test_products_of_odd_sizes_and_of_nothing() -> None:
    for precision in PRECISIONS:
        products = Products(precision, torch.float32)
        for batch, classes, dim in ((3, 13, 5), (1, 1, 1), (0, 4, 8), (5, 0, 8)):
            x, w = (torch.nn.functional.normalize(torch.randn(n, dim)) for n in (batch, classes))
            logits = torch.full((batch, classes), torch.nan)
            products.logits(products.logit_embeddings(x, 2.0), products.logit_weights(w), logits)
            tolerance = 1e-2 if precision == "fast" else 1e-4
            torch.testing.assert_close(logits, 2 * x @ w.t(), rtol=tolerance, atol=tolerance)
            grads, total = products.split(logits), torch.ones(batch, dim)
            products.add_embedding_grad(grads, products.split(w), total)
            torch.testing.assert_close(total, 1 + logits @ w, rtol=tolerance, atol=tolerance)
            rows = products.weight_grad(grads, products.weighted_embeddings(x))
            torch.testing.assert_close(rows, logits.t() @ x, rtol=tolerance, atol=tolerance)


def test_derivatives_kept_from_the_forward_pass_are_those_that_backward_forms() -> None:
    for precision in PRECISIONS:
        kept, formed = (_weight_grad(precision, budget) for budget in (64.0, 0.7))
        assert float((kept - formed).norm() / formed.norm()) <= 1e-6


def _weight_grad(precision: Precision, budget: float) -> Tensor:
    inputs = make_inputs(Task("arcface", 0.3))
    head = PartialFC(CLASSES, DIM, losses.ArcFace(), matmul_precision=precision, memory_budget_mb=budget)
    head(inputs.embeddings, inputs.labels).loss.backward()
    grad: Tensor = head.weight.grad.to_dense()
    return grad


def test_float64_is_always_exact() -> None:
    inputs = make_inputs(Task("arcface", 0.9))
    grads = []
    for precision in PRECISIONS:
        head = PartialFC(
            CLASSES, DIM, losses.ArcFace(), weight_dtype=torch.float64, matmul_precision=precision, device="cpu"
        )
        head(inputs.embeddings.double(), inputs.labels).loss.backward()
        grads.append(head.weight.grad.to_dense())
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"matmul_precision must be one of \('highest', 'exact', 'fast'\), got 'tf32'"
    ):
        PartialFC(10, 4, losses.ArcFace(), matmul_precision="tf32")  # type: ignore[arg-type]


def test_settings_of_the_process_for_tf32_do_not_matter_and_stay() -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        for setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
            chosen = cuda.fp32_precision, cpu.fp32_precision
            for _ in range(2):
                with pytest.raises(ZeroDivisionError):
                    _fail_in_float32(cuda, cpu)
                assert (cuda.fp32_precision, cpu.fp32_precision) == chosen
            assert torch.get_float32_matmul_precision() == setting
            errors = errors_of_a_step(Task("arcface", 0.3), None)
            assert max(errors.loss, *errors.gradients.values()) <= 1e-5
    finally:
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision, cpu.fp32_precision = before


def _fail_in_float32(cuda: Any, cpu: Any) -> None:
    with full_float32(), full_float32():
        assert cuda.fp32_precision not in ("tf32", "bf16")
        assert cpu.fp32_precision not in ("tf32", "bf16")
        raise ZeroDivisionError
