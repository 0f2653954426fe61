"""Labels for the bytes of Python source: code, comment, docstring or English.

The labels of the built-in corpus show the specialisation of experts. They are made by two passes of
regular expressions. The first finds comments and string literals; nothing else in Python contains
a "#" or a quote, so this is exact, except for an f-string that reuses its own quote inside a
replacement field (Python 3.12). The second walks the code with comments blanked and strings masked
and labels docstrings by Python's grammar: an unprefixed, raw or unicode string literal that is the
first statement of a module, class or function (parenthesised ones count as code).
"""

import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from moejax.data.builtin import TOPICS
from moejax.data.corpus import Corpus, Origin
from moejax.data.documents import Document
from moejax.errors import UserError

CODE, COMMENT, DOCSTRING, ENGLISH = range(4)
NAMES = ("code", "comment", "docstring", "english")

# Possessive quantifiers do not backtrack, and an unclosed string ends with its line or the text:
# together, linear time on any input.
_COMMENT_OR_STRING = re.compile(
    rb"""\#[^\r\n]*+
    | \"\"\" [^"\\]*+ (?: (?: \\. | "(?!"") ) [^"\\]*+ )*+ (?:\"\"\"|\\?\Z)
    | ''' [^'\\]*+ (?: (?: \\. | '(?!'') ) [^'\\]*+ )*+ (?:'''|\\?\Z)
    | " [^"\\\r\n]*+ (?: \\(?:\r\n|.) [^"\\\r\n]*+ )*+ (?:"|(?=[\r\n])|\\?\Z)
    | ' [^'\\\r\n]*+ (?: \\(?:\r\n|.) [^'\\\r\n]*+ )*+ (?:'|(?=[\r\n])|\\?\Z)
    """,
    re.VERBOSE | re.DOTALL,
)
_MASK = 1  # replaces each byte of a string literal, as a blank replaces those of a comment
_DEFINITION = re.compile(rb"^[ \t\f]*(?:async[ \t]+)?(?:def|class)\b", re.MULTILINE)
_BRACKET_OR_COLON = re.compile(rb"[()\[\]{}:]")
_LAYOUT = re.compile(rb"(?:[ \t\f\r\n]|\\\r?\n)*+")
_STRINGS_IN_LINE = re.compile(rb"\x01+(?:(?:[ \t\f]|\\\r?\n)*\x01+)*+")
_LETTERS = re.compile(rb"[A-Za-z]*")
_END_OF_STATEMENT = re.compile(rb"[ \t\f]*(?:[\r\n;]|\Z)")


def label_bytes(source: bytes, *, strings_are_english: bool = False) -> UInt8[np.ndarray, " N"]:
    """A label (CODE, COMMENT, DOCSTRING, ENGLISH) for each byte of Python source.

    A comment runs from "#" to the end of its line, without the line break. A docstring includes its
    quotes and prefix. Every other string literal is ENGLISH with `strings_are_english`, otherwise
    CODE. Invalid Python is labelled as far as it can be parsed.
    """
    starts, ends, is_comment = _find_comments_and_strings(source)
    text = np.frombuffer(source, dtype=np.uint8)
    mask = _paint(len(source), starts, ends, np.where(is_comment, ord(" "), _MASK))
    masked = np.where(mask == 0, text, mask).tobytes()
    rest = ENGLISH if strings_are_english else CODE
    labels = _paint(len(source), starts, ends, np.where(is_comment, COMMENT, rest))
    for start, end in _docstrings(source, masked):
        labels[start:end] = DOCSTRING
    return labels


def token_labels(corpus: Corpus) -> tuple[UInt8[np.ndarray, " N"], UInt8[np.ndarray, " M"]]:
    """Labels of the training and the held-out tokens of a corpus, one per token.

    A token of several bytes takes the label of its first byte; separators are CODE. Works for
    Python source tokenised as bytes or by a byte-level BPE. Raises UserError for any other corpus,
    and if the files have changed since they were loaded.
    """
    split = corpus.origin.split if corpus.origin else None
    if corpus.origin is None or split is None:
        raise UserError(
            f"data.path: {corpus.name!r} holds tokens only; labels need the Python source"
        )
    return (
        _stream_labels(split.train, corpus.train_N[:], corpus.origin),
        _stream_labels(split.heldout, corpus.heldout_N[:], corpus.origin),
    )


def heldout_labels(corpus: Corpus) -> UInt8[np.ndarray, " M"] | None:
    """Labels of the held-out tokens (see `token_labels`); None for a corpus that has none."""
    origin = corpus.origin
    if origin is None or not origin.split or not origin.tokenizer.is_byte_level:
        return None
    heldout = origin.split.heldout
    if not heldout or not all(document.name.endswith(".py") for document in heldout):
        return None
    return _stream_labels(heldout, corpus.heldout_N[:], origin)


def _stream_labels(
    documents: tuple[Document, ...], tokens_N: np.ndarray, origin: Origin
) -> np.ndarray:
    parts = []
    for document in documents:
        if not document.name.endswith(".py"):
            raise UserError(f"data.path: {document.path!r} is not Python source; it has no labels")
        parts.append(label_bytes(document.read(), strings_are_english=document.name == TOPICS))
        parts.append(np.array([CODE], dtype=np.uint8))
    labels = np.concatenate(parts[:-1])
    ends = np.cumsum(origin.tokenizer.token_bytes()[tokens_N])
    if ends[-1] != len(labels):
        raise UserError(
            "data.path: the source files have changed since they were loaded; run again"
        )
    return labels[np.concatenate([[0], ends[:-1]])]


def _find_comments_and_strings(source: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and "is a comment" flags of all comments and prefixed string literals."""
    spans = [match.span() for match in _COMMENT_OR_STRING.finditer(source)]
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    text = np.frombuffer(b"\0\0\0" + source, dtype=np.uint8)  # three bytes before every start
    is_comment = text[starts + 3] == ord("#")
    first, second, third = (text[starts + 3 - distance] for distance in (1, 2, 3))
    one = _IN_PREFIX[first] & ~_IN_NAME[second]
    two = _IN_PREFIX[first] & _IN_PREFIX[second] & ~_IN_NAME[third]
    return starts - np.where(is_comment, 0, one + 2 * two), ends, is_comment


def _byte_set(members: bytes) -> np.ndarray:
    return np.isin(np.arange(256), np.frombuffer(members, dtype=np.uint8))


_IN_PREFIX = _byte_set(b"rRbBuUfFtT")
_IN_NAME = _byte_set(b"_" + bytes(c for c in range(256) if chr(c).isalnum() or c >= 0x80))


def _paint(length: int, starts: np.ndarray, ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An array with `values[i]` at `starts[i]:ends[i]` and 0 elsewhere."""
    change = np.zeros(length + 1, dtype=np.int16)
    change[starts] += values.astype(np.int16)  # spans do not overlap: no index occurs twice
    change[ends] -= values.astype(np.int16)
    return np.cumsum(change[:-1], dtype=np.int16).astype(np.uint8)


def _docstrings(source: bytes, masked: bytes) -> Iterator[tuple[int, int]]:
    bodies = [3 if source.startswith(b"\xef\xbb\xbf") else 0]
    headers = [match.end() for match in _DEFINITION.finditer(masked)]
    limits = [*headers, len(masked)][1:]  # a header ends before the next begins
    bodies += [_after_header(masked, *span) for span in zip(headers, limits, strict=True)]
    for body in bodies:
        strings = _STRINGS_IN_LINE.match(masked, _end(_LAYOUT, masked, body))
        if strings is None or not _END_OF_STATEMENT.match(masked, strings.end()):
            continue
        prefix = source[strings.start() : _end(_LETTERS, source, strings.start())]
        if set(prefix.lower()) <= set(b"ru"):  # bytes and f-strings are no docstrings
            yield strings.span()


def _after_header(masked: bytes, begin: int, limit: int) -> int:
    """The position after the colon that ends a `def` or `class` header; the limit without one."""
    depth = 0
    for match in _BRACKET_OR_COLON.finditer(masked, begin, limit):
        char = match.group()
        if char == b":" and depth == 0:
            return match.end()
        depth += (char in b"([{") - (char in b")]}")
    return limit


def _end(pattern: re.Pattern[bytes], text: bytes, begin: int) -> int:
    """The end of a match of `pattern`, which may be empty."""
    match = pattern.match(text, begin)
    return begin if match is None else match.end()
