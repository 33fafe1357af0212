"""Compare the head on this device with float64 on a CPU, from the same weights."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from partialfc import PartialFC, losses

from .cases import SMALL, USUAL, Case, Outcome, all_cases, run_case, wide_cases
from .measure import Bench, Entries, first_line
from .products import tf32_products

#: Tolerated distance from float64 in each mode of the products, relative to the largest number.
TOLERANCES = {"fast": 5e-3}
EXACT_TOLERANCE = 2e-5
_MODE_NAMES = ("highest", "exact", "fast")


class RoundedArcFace(losses.ArcFace):
    """ArcFace with negative logits rounded to bfloat16: an error that the comparison has to notice."""

    def negative_logits(self, cosine: Tensor, samples: losses.Samples) -> Tensor:
        logits = self.scale * cosine
        return logits + (logits.bfloat16().to(logits.dtype) - logits).detach()


def run(bench: Bench, entries: Entries) -> None:
    comparison = Comparison(bench, entries)
    modes = precision_modes()
    entries["modes of matmul_precision"] = ", ".join(filter(None, modes)) or "none: the head has no such argument"
    for mode in modes:
        comparison.control(mode)
    wide = [] if bench.small else [*wide_cases()]
    cases = [*all_cases(), *wide]
    for mode in modes:
        comparison.compare(mode or "default", cases, mode)
    with tf32_products():  # reported, whatever the outcome: float32 heads that follow the process's flags get this
        arcface = [Case(f"arcface, rate {rate}", rate=rate) for rate in (1.0, 0.1)]
        comparison.compare("TF32 flag on", [*arcface, *wide], None, may_fail=False)
    entries.measure("initial weight, GPU − CPU", lambda: initial_weight_difference(bench))


def precision_modes() -> list[str | None]:
    """Return the modes of the head's argument ``matmul_precision``; [None] if it has no such argument."""
    parameter = inspect.signature(PartialFC.__init__).parameters.get("matmul_precision")
    if parameter is None:
        return [None]
    try:
        hint = typing.get_type_hints(PartialFC.__init__)["matmul_precision"]
        names = [name for part in (hint, *typing.get_args(hint)) for name in typing.get_args(part)]
    except (NameError, TypeError):
        names = []
    names = [name for name in names or _MODE_NAMES if isinstance(name, str)]
    accepted: list[str | None] = [name for name in dict.fromkeys(names) if _is_accepted(name)]
    return accepted or [None]


def _is_accepted(mode: str) -> bool:
    options: dict[str, Any] = {"matmul_precision": mode}
    try:
        PartialFC(2, 2, losses.ArcFace(), **options)
    except ValueError:  # the base of ConfigError
        return False
    return True


class Comparison:
    """Runs cases on the device and in float64, and records their distance."""

    def __init__(self, bench: Bench, entries: Entries) -> None:
        self.bench, self.entries = bench, entries
        self.sizes = SMALL if bench.small else USUAL
        self._references: dict[str, Outcome] = {}

    def compare(self, name: str, cases: Iterable[Case], mode: str | None, may_fail: bool = True) -> None:
        """Record the worst errors of the cases, and the cases over their tolerance."""
        errors: dict[str, Any] = {}
        worst: dict[str, float] = {"loss": 0.0, "embedding gradient": 0.0, "weight": 0.0}
        over, left_out = [], []
        for case in cases:
            if self.bench.lacks(3):
                left_out.append(case.name)
                continue
            try:
                found = self.errors(case, mode)
            except Exception as error:
                errors[case.name] = first_line(error)
                over.append(f"{case.name}: {first_line(error)}")
                continue
            errors[case.name] = found
            if not case.tolerance:
                worst = {what: max(value, found[what]) for what, value in worst.items()}
            if max(found.values()) > max(case.tolerance, tolerance(mode)):
                over.append(f"{case.name}: {', '.join(f'{what} {value:.1e}' for what, value in found.items())}")
        self.entries.details[name] = errors
        self.entries[name] = {
            "cases": len(errors),
            "left out": len(left_out),
            "tolerance": tolerance(mode),
            **{f"{what}, worst": value for what, value in worst.items()},
            "over tolerance": len(over),
        }
        if over:
            self.entries[f"{name}: over tolerance"] = over
        if may_fail:
            self.entries.problems += [f"{name}: over tolerance: {case}" for case in over]

    def control(self, mode: str | None) -> None:
        """Check that a deliberate error is noticed."""
        case = Case("arcface, rate 1.0")
        expected = self.reference(case)
        wrong = run_case(Case(case.name, RoundedArcFace), self.sizes, self.bench.device, False, _options(mode))
        found = wrong.errors(expected)
        noticed = max(found.values()) > tolerance(mode)
        self.entries[f"negative control, {mode or 'default'}: logits rounded to bf16"] = {
            **found,
            "tolerance": tolerance(mode),
            "noticed": noticed,
        }
        if not noticed:
            self.entries.problems.append(f"the tolerance of {mode or 'the default'} cannot fail: logits in bf16 pass")

    def errors(self, case: Case, mode: str | None) -> dict[str, float]:
        found = run_case(case, self.sizes, self.bench.device, False, _options(mode))
        return found.errors(self.reference(case))

    def reference(self, case: Case) -> Outcome:
        """Return the case in float64 on the CPU; computed once."""
        if case.name not in self._references:
            self._references[case.name] = run_case(case, self.sizes, "cpu", exact=True)
        return self._references[case.name]


def _options(mode: str | None) -> dict[str, Any]:
    return {} if mode is None else {"matmul_precision": mode}


def tolerance(mode: str | None) -> float:
    """Return the largest error of a correct head in this mode."""
    return TOLERANCES.get(mode or "", EXACT_TOLERANCE)


def initial_weight_difference(bench: Bench) -> dict[str, float]:
    """Return the distance of weights drawn from one seed on two devices, relative to their standard deviation."""
    drawn = [PartialFC(5000, 64, losses.ArcFace(), seed=3, device=device).weight for device in ("cpu", bench.device)]
    expected, found = (weight.detach().cpu().double() for weight in drawn)
    largest = float((found - expected).abs().max() / expected.std())
    return {"largest": largest, "share that differs": float((found != expected).double().mean())}
