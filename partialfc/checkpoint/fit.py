"""The one check that a checkpoint holds the tensors that a model or head expects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from partialfc.errors import ConfigError


def require_fit(
    checkpoint: Path,
    expected: Mapping[str, Sequence[int]],
    stored: Mapping[str, TensorStorageMetadata],
    growing: Collection[str] = (),
) -> None:
    """Require that ``stored`` has the names and shapes of ``expected``, no more and no fewer.

    DCP itself would cut a larger tensor to the smaller shape, and leave the rest of a larger one as it is.

    Args:
        expected: whole shapes by name.
        growing: names of tensors that may have fewer rows in the checkpoint.

    Raises:
        ConfigError: a tensor is missing or has another shape, or there is one more.
    """
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which this run does not have"
        raise ConfigError(f"{checkpoint} does not fit this model or head: it {problem}; {_ADVICE}")
    for name, shape in expected.items():
        here, there = list(shape), list(stored[name].size)
        grown = name in growing and there[1:] == here[1:] and there[0] <= here[0]
        if here != there and not grown:
            raise ConfigError(
                f"{checkpoint} does not fit this model or head: {name} has shape {there} there and {here} in this run; "
                f"{_ADVICE}"
            )


_ADVICE = "use the code and options of the model, and the head, that wrote it, or start another run"
