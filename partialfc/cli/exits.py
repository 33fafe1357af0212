"""Exit codes of the command, and the ways to end it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from partialfc.files import write_atomically
from partialfc.tracking.console import printable

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

    torchrun does not pass on exit codes, and restarts whatever fails; so a launcher names a file for both in
    ``PARTIALFC_CODE_FILE``; once it holds :data:`WRONG_USAGE`, ranks end as if all were well.
    """
    sys.stdout.flush()
    message = printable(str(error))
    told = _tell_launcher(message, code)
    prefix = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    sys.stderr.write(f"{prefix}error: {message}\n")  # in one piece: other ranks write there too
    sys.stderr.flush()
    exit_now(0 if told == WRONG_USAGE else code)


def leave_to_launcher(error: Exception, code: int) -> None:
    """End as if all were well, with ``error`` in the launcher's file; return if no launcher has named one.

    For work that is not restarted: the launcher prints the error, once, and torchrun adds no report of its own. The
    first error stays: that of a rank which misses another one says less.
    """
    if _tell_launcher(printable(str(error)), code, final=(FAILED, WRONG_USAGE)) is not None:
        exit_now(0)


def _tell_launcher(message: str, code: int, final: tuple[int, ...] = (WRONG_USAGE,)) -> int | None:
    """Leave an error in the launcher's file and return the code that the file holds; None if there is no such file.

    An error there stays if its code is one of ``final``: ranks that lose a rank to its bad data fail too, with a code
    that says less.
    """
    try:
        file = Path(os.environ["PARTIALFC_CODE_FILE"])
        found = file.read_text().partition("\n")[0] if file.exists() else ""
        if found in map(str, final):
            return int(found)
        write_atomically(file, f"{code}\n{message}\n")
    except (OSError, KeyError):
        return None
    return code
