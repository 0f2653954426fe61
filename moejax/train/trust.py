"""Whether anybody else could have written a file: owners and permissions, also of folders above."""

import os
import stat
from pathlib import Path


class Untrusted(Exception):
    """Somebody else may write there; the message says who and where."""


def check(folder: Path) -> None:
    """Checks a folder and everything above it, by the path as it is given and as it resolves.

    The folder itself must be the user's own (or root's), and nobody else may write to it. A folder
    above it may be shared if it is sticky, as /tmp is, or belong to the user's own group. Symbolic
    links on the way must be the user's or root's.

    Raises:
      Untrusted: it is not so.
    """
    given = Path(os.path.abspath(folder))
    _check_one(given.resolve(), last=True)
    for path in (*given.parents, given):
        if path.is_symlink():
            _check_owner(path, path.lstat())
    for path in {*given.parents, *given.resolve().parents}:
        if not path.is_symlink():
            _check_one(path, last=False)


def problem_of_file(path: Path) -> str:
    """What is wrong with a file, in words that follow its name; "" if nothing is.

    Raises:
      FileNotFoundError: it is not there.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        return "is no ordinary file"
    if about.st_uid not in (os.getuid(), 0):
        return f"belongs to user {about.st_uid}"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(about.st_mode):o})"
    return ""


def _check_one(path: Path, last: bool) -> None:
    about = path.stat()
    _check_owner(path, about)
    shared = about.st_mode & stat.S_IWOTH
    if about.st_mode & stat.S_IWGRP and (last or about.st_gid not in (os.getgid(), 0)):
        shared = True
    if shared and (last or not about.st_mode & stat.S_ISVTX):
        raise Untrusted(
            f"{path} may be written to by others (mode {stat.S_IMODE(about.st_mode):o})"
        )


def _check_owner(path: Path, about: os.stat_result) -> None:
    if about.st_uid not in (os.getuid(), 0):
        raise Untrusted(f"{path} belongs to user {about.st_uid}")
