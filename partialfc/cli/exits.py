"""Exit codes of the command, and the ways to end it."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

FAILED = 1
WRONG_USAGE = 2
STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint written; start the command again


def exit_now(code: int) -> NoReturn:
    """End the process without the interpreter's own shutdown.

    Native threads of a broken process group may never end, or abort during the shutdown; a launcher would then restart
    a run that is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(error: Exception, code: int) -> NoReturn:
    """Print an error as one line and end with ``code``.

    torchrun passes no exit code on, so the code and the message also go to the file that ``PARTIALFC_CODE_FILE`` names.
    """
    sys.stdout.flush()
    with contextlib.suppress(OSError, KeyError):
        Path(os.environ["PARTIALFC_CODE_FILE"]).write_text(f"{code}\n{error}\n")
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    exit_now(code)
