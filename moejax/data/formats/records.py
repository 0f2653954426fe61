"""The text of one record in JSON, and the words for a record that has none."""

import json
from collections.abc import Iterable

LONGEST = 1 << 28
"""Bytes of one record that are read at most, so that a file without ends of lines is not read into
memory whole."""

TOO_LONG = f"the record is longer than {LONGEST >> 20} MiB; split it"
BOM = b"\xef\xbb\xbf"
_MOST_NAMES = 8


def json_text(data: bytes, field: str) -> bytes | str:
    """The text of a JSON object in UTF-8, or a reason in words (a str) why it has none."""
    try:
        record = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except RecursionError:
        return "it is not JSON: its lists or objects are nested too deeply"
    except json.JSONDecodeError as error:
        return f"it is not JSON: {error.msg[0].lower()}{error.msg[1:]}, column {error.pos + 1}"
    except ValueError as error:  # numbers of more than 4300 digits
        return f"it is not readable JSON: {error}"
    if type(record) is not dict:
        return f"it is {_kind(record)}, not an object with the field {field!r}"
    text = record.get(field)
    if type(text) is not str:
        return no_text(field, record)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        return (
            f"its text has half of a surrogate pair, \\u{ord(text[error.start]):04x}, which is not "
            f"a character (character {error.start + 1})"
        )


def no_text(field: str, record: dict[str, object]) -> str:
    """The reason why a record has no text in a field."""
    if field in record:
        return f"its field {field!r} is {_kind(record[field])}, not text"
    return f"it has no field {field!r} (data.text_field); {names_in_words(record, field)}"


def names_in_words(names: Iterable[str], field: str, noun: str = "field") -> str:
    """The fields that there are, for a message about one that is missing."""
    names = list(names)
    words = ", ".join(repr(name[:40]) for name in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    nested = field.partition(".")[0] in names and field not in names
    inner = f"; {noun}s inside of {noun}s are not read: move the text to one of its own"
    return f"its {noun}s are {words or 'none'}{more}{inner if nested else ''}"


def utf8_text(data: bytes) -> bytes | str:
    """The bytes themselves if they are UTF-8, otherwise the reason why they are no text."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return not_utf8(error)
    return data


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"it is not UTF-8 ({error.reason} at byte {error.start + 1})"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a text", list: "a list", dict: "an object"}.get(type(value), "something else")
