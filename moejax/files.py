"""Files that are whole or not there, and one line when a disk takes no more."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from moejax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""A disk or a quota that is full, one that cannot be written to, a file as large as it may be."""


def cannot_write(path: str | Path, error: OSError) -> str:
    """A line about a file that could not be written, with the remedy."""
    why = error.strerror or str(error)
    return f"{path} cannot be written: {why}; make room or mend the disk and run again"


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, what cannot be written is one line that names the file.

    Raises:
      UserError: in the place of OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A file to write in the place of ``path``, which it takes in one rename when all is there.

    Whatever goes wrong inside, ``path`` stays as it was and nothing is left beside it.

    Raises:
      UserError: in the place of OSError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
