"""``python -m moejax.train`` is ``moejax train``."""

import sys

from moejax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
