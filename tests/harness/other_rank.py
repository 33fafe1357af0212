"""The command ``partialfc`` with further words on one rank: other_rank.py RANK WORD… -- WORDS…

Where the environment names an ``OTHER_FOLDER``, that rank works there, and imports what lies there first.
"""

from __future__ import annotations

import os
import sys


def become_other(words: list[str]) -> None:
    own = tuple(word.partition("=")[0] + "=" for word in words if "=" in word)
    sys.argv = [word for word in sys.argv if not own or not word.startswith(own)] + words
    folder = os.environ.get("OTHER_FOLDER")
    if folder:
        os.chdir(folder)
        sys.path.insert(0, folder)


if __name__ == "__main__":
    rank, *words = sys.argv[1:]
    end = words.index("--")
    sys.argv = ["partialfc", *words[end + 1 :]]
    if os.environ["RANK"] == rank:
        become_other(words[:end])
    from partialfc.__main__ import main

    main()
