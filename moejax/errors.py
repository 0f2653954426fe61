"""The one exception that stands for a user's mistake."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator


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


@contextlib.contextmanager
def starting_jax() -> Iterator[None]:
    """The first import of JAX inside: an environment variable that it cannot read is one line.

    The package is imported before its command line can run, so the command ends here. A program
    that imports the package gets a UserError.
    """
    try:
        yield
    except ValueError as error:
        problem = f"JAX does not start: {error}; correct the environment variable, or unset it"
        if not _is_command():
            raise UserError(problem) from error
        print(f"moejax: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_command() -> bool:
    """True if this process is ``moejax ...`` or ``python -m moejax...``."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return "moejax" in (os.path.basename(sys.argv[0]), module.partition(".")[0])
