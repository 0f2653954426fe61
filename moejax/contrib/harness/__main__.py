"""The harness's command line with the model "moejax": ``python -m moejax.contrib.harness``."""

import sys

from lm_eval.__main__ import cli_evaluate

from moejax.contrib.harness import model
from moejax.errors import UserError

assert model.NAME  # the import registers it

if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"moejax: error: {error}")
