"""The hidden folder of a preparation, beside the folder that it makes."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from moejax.errors import UserError

WORTH_KEEPING = 256 << 20
"""Bytes of unfinished work that outlive a failure; less is made again in seconds."""
LOCK = "lock"


@contextlib.contextmanager
def working_folder(out_dir: str) -> Iterator[str]:
    """The folder ``.NAME.unfinished``, for one process at a time.

    At the end it is removed. After a failure it stays if what is in it took long to make; after a
    kill it stays anyway.

    Raises:
      UserError: another process has it.
    """
    parent, name = os.path.split(out_dir)
    missing = [p for p in (Path(parent), *Path(parent).parents) if not p.exists()]
    folder = os.path.join(parent, f".{name}.unfinished")
    with _locked(folder, out_dir):
        try:
            yield folder
            shutil.rmtree(folder)
        except UserError as error:
            if _size(folder) < WORTH_KEEPING:
                raise
            raise UserError(
                f"{error} (what is done is kept in {folder!r}; the same command goes on from there)"
            ) from error
        finally:
            if os.path.isdir(folder) and _size(folder) < WORTH_KEEPING:
                shutil.rmtree(folder)
                for made in missing:
                    with contextlib.suppress(OSError):  # something else is in it by now
                        made.rmdir()


def remove_others(folder: str, keys: Collection[str]) -> None:
    """Remove what was made of a text that has changed since: files whose names do not begin with
    one of the keys, which are of one length."""
    known = set(keys)
    width = len(next(iter(known), ""))
    for entry in list(os.scandir(folder)):
        if entry.name != LOCK and entry.name[:width] not in known:
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


@contextlib.contextmanager
def _locked(folder: str, out_dir: str) -> Iterator[None]:
    path = os.path.join(folder, LOCK)
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            lock = open(path, "w")
        except FileNotFoundError:
            continue  # removed just now, by whoever has finished
        with lock:
            _lock(lock, out_dir)
            if os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                yield
                return


def _lock(lock: TextIO, out_dir: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"out_dir: another process is preparing {out_dir!r}; wait for it, or choose another "
            "folder"
        ) from error


def _size(folder: str) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in os.scandir(folder))
