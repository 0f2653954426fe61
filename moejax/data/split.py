"""The held-out part of a text: by names, by a text of its own, or a share by a hash of names."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence

from moejax.data.builtin import builtin_documents, builtin_name, builtin_text
from moejax.data.containers import refuse_containers
from moejax.data.documents import Document, character_start
from moejax.data.paths import expand, name_of
from moejax.errors import UserError

_COUNT_SALT = b"moejax held-out split 1\0"
"""Salt of the split by documents, as in version 0.1.0."""

# Any fixed value would do. This is the first of 2.1, 2.2, ... that trains on the only English file
# of the built-in corpus and keeps every group below an eighth of the held-out side.
_SPLIT_SALT = b"moejax held-out split 2.7\0"

TRAIN_NAMES = ("train", "training")
EVAL_FOLDERS = ("val", "validation", "valid", "dev", "test")
"""Names of the held-out side beside ``train``; the first that exists is used."""
SIDE = re.compile(
    rf"(?:[\w-]+\.)?({'|'.join((*TRAIN_NAMES, *EVAL_FOLDERS))})(?:[-_.]?\d[\w-]*)?(?:\.\w+)?"
)
"""File names of one side: train.txt, wiki.valid.tokens, test-00000-of-00002.txt."""
MOST_BESIDE = 0.1
"""Largest share of the bytes outside the sides: with more, the names mean something else."""
FILLED = 0.9
"""Filled part of the share at which no further document is added."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Training and held-out documents.

    ``rule``: the rule of the split in words. ``unread``: number of documents on neither side.
    """

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    rule: str = ""
    unread: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents before tokenising: their split, and the number of near copies left out of it."""

    name: str
    split: Split
    copies: int = 0


def open_text(path: str, eval_fraction: float, eval_path: str = "", unit: str = "bytes") -> Text:
    """The text at `path` (empty: built-in) and its split, before tokenising.

    ``unit``: unit of `eval_fraction`. "documents" splits as version 0.1.0 did: near copies stay,
    and names of sides are ignored (see ``split_by_count``).
    """
    own = expand(eval_path, "data.eval_path") if eval_path else []
    named = expand(path) if path else []
    for documents in filter(None, (named, own)):
        refuse_containers([document.path for document in documents], documents[0].field)
    name = name_of(path) if path else builtin_name()
    if unit == "documents" and not own:
        return Text(name, split_by_count(named or builtin_documents(), eval_fraction))
    if path:
        return Text(name, split_text(named, eval_fraction, own))
    related = builtin_text()
    if own:
        split = split_text(related.documents, eval_fraction, own)
    else:
        split = split_documents(related.documents, eval_fraction, related.groups)
    return Text(name, split, len(related.copies))


def split_text(
    documents: Sequence[Document],
    eval_fraction: float,
    own: Sequence[Document] = (),
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Split documents into a training and a held-out side.

    The held-out side is ``own`` if given, otherwise the side with such a name (see
    ``named_sides``), otherwise a share of the bytes (see ``split_documents``). Documents of ``own``
    are removed from the training side.
    """
    check_fraction(eval_fraction)
    sides = named_sides(documents)
    if own:
        held = {os.path.realpath(document.path) for document in own}
        train = tuple(sides.train if sides else documents)
        train = tuple(d for d in train if os.path.realpath(d.path) not in held)
        if not train:
            raise UserError(
                "data.eval_path: it contains everything in data.path, so that nothing is left to "
                "train on; name another text"
            )
        unread = (
            len(documents) - len(train) - sum(os.path.realpath(d.path) in held for d in documents)
        )
        return Split(train, tuple(own), "data.eval_path", unread)
    return sides or split_documents(documents, eval_fraction, groups)


def named_sides(documents: Sequence[Document]) -> Split | None:
    """The sides of a corpus with folders or files named train and validation.

    The held-out side is the first of ``EVAL_FOLDERS`` that exists; documents of the others, and
    outside the sides, are not read. None if a side is missing or more than a tenth of the bytes lie
    outside the sides: then the names mean something else.
    """
    sides: dict[str, list[Document]] = {}
    beside = 0
    for document in documents:
        side = _side(document.name)
        sides.setdefault(side, []).append(document)
        beside += document.size if not side else 0
    train = [d for name in TRAIN_NAMES for d in sides.get(name, ())]
    name = next((name for name in EVAL_FOLDERS if name in sides), "")
    if not train or not name or beside > MOST_BESIDE * sum(d.size for d in documents):
        return None
    heldout = sides[name]
    unread = len(documents) - len(train) - len(heldout)
    return Split(tuple(train), tuple(heldout), f"what is called {name!r}", unread)


def _side(name: str) -> str:
    """The side in a document's name: that of its outermost folder with one, or of the file."""
    *folders, file = name.lower().split("/")
    for folder in folders:
        if folder in (*TRAIN_NAMES, *EVAL_FOLDERS):
            return folder
    match = SIDE.fullmatch(file)
    return match[1] if match else ""


def check_fraction(eval_fraction: float) -> None:
    """Raise UserError unless the fraction is a share."""
    if not 0.0 < eval_fraction < 1.0:
        raise UserError(
            f"data.eval_fraction: {eval_fraction} is not between 0 and 1 (both excluded)"
        )


def split_documents(
    documents: Sequence[Document],
    eval_fraction: float,
    groups: Mapping[str, str] | None = None,
) -> Split:
    """Hold out `eval_fraction` of the bytes.

    Documents are held out in the order of a hash of their names as long as they fit into the share.
    If they fill less than nine tenths of it, the end of the first document that did not fit is
    added, so that one document is cut. The choice depends on names and sizes alone.

    With `groups` (the group of each document, by name) groups stay whole, and none is cut: the
    smallest group that did not fit is added if this brings the size closer to the share.
    """
    check_fraction(eval_fraction)
    if len(documents) == 1 and documents[0].size < 2:
        raise UserError(
            f"data.path: {documents[0].path!r} holds 1 byte; nothing is left to hold out"
        )
    total = sum(document.size for document in documents)
    wanted = min(max(round(eval_fraction * total), 1), total - 1)
    ranked = sorted(_by_group(documents, groups).items(), key=lambda item: _hash(item[0]))
    held: set[str] = set()
    missing, cut = wanted, None
    for _, own in ranked:
        size = sum(document.size for document in own)
        if size <= missing:
            held |= {document.name for document in own}
            missing -= size
        elif cut is None or (groups and size < sum(document.size for document in cut)):
            cut = own
        if missing <= (1 - FILLED) * wanted:
            break
    tail: list[Document] = []
    if cut is not None and missing > (1 - FILLED) * wanted:
        size = sum(document.size for document in cut)
        if groups is None:
            head, end = _cut(cut[0], missing)
            tail, documents = [end], [head if d is cut[0] else d for d in documents]
        elif size < 2 * missing and size < total - (wanted - missing):
            held |= {document.name for document in cut}
    return Split(
        train=tuple(document for document in documents if document.name not in held),
        heldout=tuple(
            sorted(
                [*(document for document in documents if document.name in held), *tail],
                key=lambda document: os.fsencode(document.name),
            )
        ),
        rule=f"{100 * eval_fraction:.3g}% of the bytes, by a hash of the names",
    )


def split_by_count(documents: Sequence[Document], eval_fraction: float) -> Split:
    """Hold out `eval_fraction` of the documents, those with the smallest hashes of their names.

    Each side gets at least one document. If there is a single document, its end is held out.
    """
    if len(documents) == 1:
        return split_documents(documents, eval_fraction)
    check_fraction(eval_fraction)
    count = min(max(round(eval_fraction * len(documents)), 1), len(documents) - 1)
    ranked = sorted(documents, key=lambda document: _hash(document.name, _COUNT_SALT))
    heldout = {document.name for document in ranked[:count]}
    return Split(
        train=tuple(document for document in documents if document.name not in heldout),
        heldout=tuple(document for document in documents if document.name in heldout),
        rule=f"{100 * eval_fraction:.3g}% of the documents, by a hash of the names",
    )


def _by_group(
    documents: Sequence[Document], groups: Mapping[str, str] | None
) -> dict[str, list[Document]]:
    by_group: dict[str, list[Document]] = {}
    for document in documents:
        key = groups[document.name] if groups else document.name
        by_group.setdefault(key, []).append(document)
    return by_group


def _hash(name: str, salt: bytes = _SPLIT_SALT) -> bytes:
    return hashlib.sha256(salt + os.fsencode(name)).digest()


def _cut(document: Document, tail: int) -> tuple[Document, Document]:
    """Head and tail of one document, cut between UTF-8 characters."""
    cut = max(document.size - tail, 1)
    # A character begins at most three bytes before any of its own.
    near = dataclasses.replace(
        document, start=document.start + max(cut - 3, 0), size=min(cut, 3) + 1
    )
    cut = max(cut - min(cut, 3) + character_start(near.read(), min(cut, 3)), 1)
    head = dataclasses.replace(document, size=cut)
    end = dataclasses.replace(document, size=document.size - cut, start=document.start + cut)
    return head, end
