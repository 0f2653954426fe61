"""``python -m moejax``: the same as the ``moejax`` command."""

import sys

from moejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
