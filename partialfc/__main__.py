"""``python -m partialfc``."""

from __future__ import annotations

import sys


def main() -> None:
    """The command's entry point; says what to install where the trainer's packages are missing."""
    try:
        from partialfc.cli.main import main as run
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == "partialfc":
            raise
        print(f"error: {missing} is not installed; the command needs: pip install 'partialfc[train]'", file=sys.stderr)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
