"""The command ``partialfc``, several times as fast to notice who is lost and to renew its state: hurried.py WORDS…"""

from __future__ import annotations

import sys
from typing import Any

from partialfc.runs import folder
from partialfc.runtime import liveness


def hurry() -> None:
    """Make the constants of watching small; a run's own ``run.timeout`` is for its config to say."""
    for module, name, value in (
        (liveness, "_INTERVAL", 0.25),
        (liveness, "_SILENT_AFTER", 2.5),
        (folder, "_HEARTBEAT", 0.5),
    ):
        _set(module, name, value)


def _set(module: Any, name: str, value: float) -> None:
    assert getattr(module, name) > value, f"{module.__name__}.{name}"
    setattr(module, name, value)


if __name__ == "__main__":
    from partialfc.__main__ import main

    hurry()
    sys.argv[0] = "partialfc"
    main()
