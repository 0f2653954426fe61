"""The one exception that stands for a user's mistake."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a flag or a file: one line with the field, the value and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def suggest(name: str, valid: Iterable[str]) -> str:
    """``did you mean 'x'? valid: a, b, x``: the end of a message about an unknown name."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(choices) or 'none'}"
