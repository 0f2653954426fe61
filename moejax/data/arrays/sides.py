"""Training and held-out arrays: by a path of their own, by names, or a share of the tokens."""

import dataclasses
import os
import re
from collections.abc import Sequence

from moejax.data.arrays.table import ArrayFile, Found, check_others, find_arrays
from moejax.data.split import EVAL_FOLDERS, MOST_BESIDE, TRAIN_NAMES
from moejax.errors import UserError

WORD = re.compile(
    rf"(?:^|[-_.])({'|'.join((*TRAIN_NAMES, *EVAL_FOLDERS))})(?=[-_.]|\d|$)", re.IGNORECASE
)
"""The word that names a side in the name of a file: train.bin, fineweb_val_000000.bin."""
OWN_PATH = "data.eval_path"


@dataclasses.dataclass(frozen=True)
class Sides:
    """Files of both sides. Without any held-out ones, a share of the training tokens is held out.

    ``rule``: the rule in words.
    """

    train: tuple[ArrayFile, ...]
    heldout: tuple[ArrayFile, ...]
    rule: str = ""


def choose_sides(found: Found, eval_path: str = "") -> Sides:
    """The files of ``data.path`` on both sides, as for text (`moejax.data.split.split_text`).

    Raises UserError if ``eval_path`` holds no token arrays, or all of the arrays.
    """
    named = _named_sides(found.files)
    check_others(found, has_sides=named is not None)
    if not eval_path:
        return named or Sides(found.files, ())
    own = find_arrays(eval_path, OWN_PATH)
    if own is None:
        raise UserError(
            f"{OWN_PATH}: {eval_path!r} names no token arrays (.bin, .idx, .npy), but data.path "
            "does; name arrays that the same tokenizer made"
        )
    check_others(own, has_sides=False)
    held = {os.path.realpath(file.path) for file in own.files}
    train = named.train if named else found.files
    train = tuple(file for file in train if os.path.realpath(file.path) not in held)
    if not train:
        raise UserError(
            f"{OWN_PATH}: it contains everything in data.path, so that nothing is left to train "
            "on; name other arrays"
        )
    shared = sum(os.path.realpath(file.path) in held for file in found.files)
    return Sides(train, own.files, _rule(OWN_PATH, len(found.files) - len(train) - shared))


def _named_sides(files: Sequence[ArrayFile]) -> Sides | None:
    """Sides by names of folders or files; None if one is missing, or if more than a tenth of the
    bytes are on neither."""
    sides: dict[str, list[ArrayFile]] = {}
    for file in files:
        sides.setdefault(side_of(file.name), []).append(file)
    train = [file for name in TRAIN_NAMES for file in sides.get(name, ())]
    name = next((name for name in EVAL_FOLDERS if name in sides), "")
    beside = sum(file.size for file in sides.get("", ()))
    if not train or not name or beside > MOST_BESIDE * sum(file.size for file in files):
        return None
    heldout = sides[name]
    unread = len(files) - len(train) - len(heldout)
    return Sides(tuple(train), tuple(heldout), _rule(f"what is called {name!r}", unread))


def _rule(rule: str, unread: int) -> str:
    return f"{rule}, with {unread} files on neither side" if unread else rule


def side_of(name: str) -> str:
    """The side in a name: that of its outermost folder with one, or the last in the file's name."""
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in (*TRAIN_NAMES, *EVAL_FOLDERS):
            return folder
    words = WORD.findall(os.path.splitext(file)[0])
    return words[-1].lower() if words else ""
