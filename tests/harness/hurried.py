"""The command ``partialfc`` with short intervals to notice lost ranks and refresh its state: hurried.py WORDS…"""

from __future__ import annotations

import sys

from partialfc.cli.main import main as command
from partialfc.runtime.timings import Timings

HURRIED = Timings(sign_every=0.25, heartbeat=0.5, silent_after=2.5)


def main() -> None:
    """Run the command with the words of ``sys.argv``."""
    command(sys.argv[1:], HURRIED)


if __name__ == "__main__":
    main()
