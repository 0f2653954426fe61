"""ArrayRecord, read by grain: records of text, JSON objects or ``tf.train.Example`` messages."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from moejax.data.documents import Document
from moejax.data.formats.columns import first_line
from moejax.data.formats.example import example_features
from moejax.data.formats.format import Bad, Place, Record, Span
from moejax.data.formats.records import json_text, names_in_words, utf8_text

BATCH = 4 << 20
"""About so many bytes of the file are read at once."""
MOST_RECORDS = 2048
SAMPLE = 16
"""Records that decide what the records of a file are."""


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """Files of ArrayRecord, of which any record can be read. Spans are records.

    Most of the first ``SAMPLE`` records decide whether the records are JSON objects, Examples (both
    have their text in the field `data.text_field`), or text themselves.
    """

    name: str = "ArrayRecord"

    def spans(self, file: Document, size: int) -> list[Span]:
        try:
            count = len(_source(file))
        except _Unreadable:
            return [Span(0, 1)]  # its reader says why
        step = max(size * count // max(file.size, 1), 1)
        return [Span(begin, min(begin + step, count)) for begin in range(0, count, step)]

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        try:
            source = _source(file)
        except _Unreadable as error:
            yield Bad(file.name, str(error))
            return
        end = min(span.end, len(source))
        text_of = _text_reader(source)
        step = max(1, min(MOST_RECORDS, BATCH * len(source) // max(file.size, 1)))
        for begin in range(span.begin, end, step):
            keys = range(begin, min(begin + step, end))
            for key, record in zip(keys, _records(source, keys), strict=True):
                place = Place(file.name, "record", key + 1)
                text = text_of(record, text_field) if type(record) is bytes else str(record)
                yield Record(place, text) if type(text) is bytes else Bad(place, str(text))


_ERRORS = (RuntimeError, ValueError, OSError)
"""Exceptions that the library raises for damaged files."""


class _Unreadable(Exception):
    """A file that cannot be read; the message is the reason."""


def _source(file: Document) -> Any:
    import grain

    # It logs an error per reader for files that are slow to read at random, but not in order.
    logger = logging.getLogger("absl")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        source = grain.sources.ArrayRecordDataSource(file.path)
        with contextlib.suppress(*_ERRORS):  # a damaged first record; this opens the reader
            source[0]
        return source
    except _ERRORS as error:
        raise _Unreadable(f"it is not a complete ArrayRecord file ({first_line(error)})") from error
    finally:
        logger.disabled = was_disabled


def _records(source: Any, keys: range) -> Iterator[bytes | str]:
    """Records in order; the reason instead of one that is damaged."""
    try:
        yield from source.__getitems__(keys)
        return
    except _ERRORS:
        pass  # one by one it is known which record is damaged
    for key in keys:
        try:
            record = source[key]
        except _ERRORS as error:
            record = f"it is damaged ({first_line(error)})"
        yield record


def _text_reader(source: Any) -> Callable[[bytes, str], bytes | str]:
    """The function that takes the text out of the records of this file."""
    first = _records(source, range(min(SAMPLE, len(source))))
    sample = [record for record in first if isinstance(record, bytes)]
    for is_kind, reader in ((_is_object, json_text), (example_features, _example_text)):
        if 2 * sum(bool(is_kind(record)) for record in sample) > len(sample):
            return reader
    return lambda record, field: utf8_text(record)


def _is_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


def _example_text(record: bytes, field: str) -> bytes | str:
    """The text of an Example, or the reason why it has none."""
    features = example_features(record)
    if features is None:
        return "it is not a tf.train.Example, as the first records of the file are"
    if field not in features:
        names = names_in_words(sorted(features), field, "feature")
        return f"it has no feature {field!r} (data.text_field); {names}"
    values = features[field]
    if values is None:
        return f"its feature {field!r} holds numbers, not text"
    if len(values) != 1:
        return f"its feature {field!r} holds {len(values)} values, not one text"
    return utf8_text(values[0])
