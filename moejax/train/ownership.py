"""Checks that nobody else can have written a file: its owner and mode, and the folders above."""

import os
import stat
from pathlib import Path


class Untrusted(Exception):
    """Somebody else may write to a folder; the message names both."""


def check(folder: Path) -> None:
    """Checks a folder and everything above it, by the given path and by the resolved one.

    The folder itself must be the user's own (or root's), and nobody else may write to it. A folder
    above it may be shared if it is sticky, as /tmp is, or belong to the user's own group. Symbolic
    links on the way must be the user's or root's.

    Raises:
      Untrusted: a check failed.
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
    """The problem with a file, in words that follow its name; "" if there is none.

    Raises:
      FileNotFoundError: the file does not exist.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "is no ordinary file"
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _check_one(path: Path, last: bool) -> None:
    status = path.stat()
    _check_owner(path, status)
    shared = status.st_mode & stat.S_IWOTH
    if status.st_mode & stat.S_IWGRP and (last or status.st_gid not in (os.getgid(), 0)):
        shared = True
    if shared and (last or not status.st_mode & stat.S_ISVTX):
        raise Untrusted(
            f"{path} may be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
        )


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.getuid(), 0):
        raise Untrusted(f"{path} belongs to user {status.st_uid}")
