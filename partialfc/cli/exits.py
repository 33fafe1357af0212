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
    """End the process without the interpreter's shutdown.

    Native threads of a broken process group may hang or abort during the shutdown; a launcher would then restart a
    finished run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(error: Exception, code: int) -> NoReturn:
    """Print an error as one line and end with ``code``.

    torchrun does not pass on exit codes, so code and message also go to the file named by ``PARTIALFC_CODE_FILE``.
    """
    sys.stdout.flush()
    with contextlib.suppress(OSError, KeyError):
        file = Path(os.environ["PARTIALFC_CODE_FILE"])
        # Ranks that lose a rank to its bad data fail too, with a code that says less.
        if not (file.exists() and file.read_text().startswith(f"{WRONG_USAGE}\n")):
            file.write_text(f"{code}\n{error}\n")
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    exit_now(code)
