"""The command as a module: ``python -m partialfc``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; if a package of the trainer is missing, say how to install it."""
    try:
        from partialfc.cli.main import main as run

        run()
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == "partialfc":
            raise
        print(f"error: {missing} is not installed: pip install 'partialfc[train]'", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
