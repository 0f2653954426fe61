"""Texts as units of work: what can be read and tokenised on its own, in the order of the corpus.

A unit is some files of plain text, or a span of a file of records. Its documents belong to the
training side, to the held-out side, or to the side that a hash of their text decides later.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

from moejax.data.builtin import builtin_name
from moejax.data.documents import Document
from moejax.data.formats.files import data_files
from moejax.data.formats.format import Bad, Format, Record, Span
from moejax.data.paths import expand, name_of
from moejax.data.split import Split, check_fraction, named_sides, open_text
from moejax.errors import UserError

TRAIN, HELDOUT, BY_HASH = "train", "heldout", "by hash"

UNIT = 32 << 20
"""Bytes of text in a unit, about: so many that starting a unit costs nothing beside it, and so few
that its tokens and texts fit into the memory of many processes."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Whole files of plain text, or files of one format and the span to read of each."""

    side: str
    files: tuple[Document, ...]
    format: Format | None = None
    spans: tuple[Span, ...] = ()

    def records(self, text_field: str) -> Iterator[tuple[Document, Record | Bad]]:
        """The documents of files of records, each with its file. Raises UserError if one cannot be
        read at all."""
        assert self.format is not None
        for file, span in zip(self.files, self.spans, strict=True):
            for record in self.format.read(file, span, text_field):
                yield file, record


def weights_of(units: Sequence[Unit]) -> list[int]:
    """Bytes of input of each unit; the spans of a file share its bytes."""
    spans = collections.Counter(file.path for unit in units if unit.format for file in unit.files)
    return [sum(file.size // max(spans[file.path], 1) for file in unit.files) for unit in units]


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of a corpus before they are read.

    Attributes:
      name: name of the corpus.
      rule: the rule that chooses the held-out side, in words.
      kinds: number of files of each format, by its name; "text" for plain text.
      unread: files on neither side.
      copies: near copies left out.
      split: the documents of plain text; None if there are records.
      share: share of the text, or of the documents, to hold out by hash; 0 without such units.
      count: whether ``share`` is of the documents.
    """

    name: str
    units: tuple[Unit, ...]
    rule: str
    kinds: dict[str, int]
    unread: int = 0
    copies: int = 0
    split: Split | None = None
    share: float = 0.0
    count: bool = False


def open_texts(path: str, eval_fraction: float, eval_path: str = "", unit: str = "bytes") -> Texts:
    """The texts at ``path`` (empty: built-in) and their split.

    Plain text is split as ``split`` says. Of files of records, whose documents have no names, the
    held-out side is ``eval_path``; or the files with names of sides; or else the documents with
    the smallest hashes, as many as fit into the share, which is known when all are read.

    Raises:
      UserError: nothing to read, or a file of a format that is not read.
    """
    check_fraction(eval_fraction)
    files = data_files(expand(path)) if path else []
    own = data_files(expand(eval_path, "data.eval_path")) if eval_path else []
    if not any(format for _, format in (*files, *own)):
        return _plain(path, eval_fraction, eval_path, unit)
    name = name_of(path) if path else builtin_name()
    if not files:
        split = open_text("", eval_fraction, unit=unit).split
        files = [(document, None) for document in (*split.train, *split.heldout)]
    return _of_records(name, files, own, eval_fraction, unit)


def _plain(path: str, eval_fraction: float, eval_path: str, unit: str) -> Texts:
    text = open_text(path, eval_fraction, eval_path, unit)
    split = text.split
    units = [
        *units_of(((d, None) for d in split.train), TRAIN),
        *units_of(((d, None) for d in split.heldout), HELDOUT),
    ]
    kinds = {"text": len({d.path for d in (*split.train, *split.heldout)})}
    return Texts(text.name, tuple(units), split.rule, kinds, split.unread, text.copies, split)


_File = tuple[Document, Format | None]


def _of_records(
    name: str,
    files: Sequence[_File],
    own: Sequence[_File],
    eval_fraction: float,
    unit: str,
) -> Texts:
    formats = {file.path: format for file, format in (*files, *own)}
    documents = [file for file, _ in files]
    sides = named_sides(documents)
    train, heldout, rule, by_hash = documents, [file for file, _ in own], "data.eval_path", False
    if own:
        held = {os.path.realpath(file.path) for file in heldout}
        train = [
            file
            for file in (sides.train if sides else documents)
            if os.path.realpath(file.path) not in held
        ]
        if not train:
            raise UserError(
                "data.eval_path: it contains everything in data.path, so that nothing is left to "
                "train on; name another text"
            )
    elif sides:
        train, heldout, rule = list(sides.train), list(sides.heldout), sides.rule
    else:
        by_hash = True
        share = f"{100 * eval_fraction:.3g}%"
        of = "bytes" if unit == "bytes" else "documents"
        rule = f"{share} of the {of}, by a hash of each document's text"
    units = [
        *units_of(((d, formats[d.path]) for d in train), BY_HASH if by_hash else TRAIN),
        *units_of(((d, formats[d.path]) for d in heldout), HELDOUT),
    ]
    kinds = kinds_of((d, formats[d.path]) for d in (*train, *heldout))
    read = {os.path.realpath(file.path) for file in (*train, *heldout)}
    unread = sum(os.path.realpath(file.path) not in read for file in documents)
    return Texts(
        name,
        tuple(units),
        rule,
        kinds,
        unread,
        share=eval_fraction if by_hash else 0.0,
        count=unit != "bytes",
    )


def kinds_of(files: Iterable[_File]) -> dict[str, int]:
    """The number of files of each format."""
    return dict(collections.Counter(format.name if format else "text" for _, format in files))


def units_of(files: Iterable[_File], side: str) -> Iterator[Unit]:
    """The files in units of about ``UNIT`` bytes: large ones in spans, small ones together."""
    group: list[tuple[Document, tuple[Span, ...]]] = []
    common: Format | None = None
    total = 0

    def unit() -> Unit:
        spans = tuple(span for _, own in group for span in own)
        return Unit(side, tuple(file for file, _ in group), common, spans)

    for file, format in files:
        spans = format.spans(file, UNIT) if format else []
        if format and not spans:
            continue  # a table without rows
        if group and (format != common or len(spans) > 1 or total + file.size > UNIT):
            yield unit()
            group, total = [], 0
        if len(spans) > 1:
            yield from (Unit(side, (file,), format, (span,)) for span in spans)
        else:
            group.append((file, tuple(spans)))
            common, total = format, total + file.size
    if group:
        yield unit()
