"""Serialised ``tf.train.Example`` messages, without TensorFlow.

A message of Protocol Buffers is a row of fields: a key (number and wire type) and a value. An
Example is nested: features = 1, entries of a map = 1, each with name = 1 and feature = 2; a feature
has a list of bytes = 1, of floats = 2 or of integers = 3, and a list of bytes has values = 1.
"""

from collections.abc import Iterator

LENGTH = 2
"""The wire type of values that have a length: bytes, text and messages."""


def example_features(data: bytes) -> dict[str, list[bytes] | None] | None:
    """The features of an Example by name: their bytes, or None for numbers.

    None if the data are no Example, or one without features.
    """
    try:
        features: dict[str, list[bytes] | None] = {}
        for part in _only(data, 1):
            for entry in _only(part, 1):
                name, feature = b"", b""
                for number, value in _fields(entry):
                    if number == 1:
                        name = value
                    elif number == 2:
                        feature = value
                    else:
                        return None
                features[name.decode()] = _values(feature)
    except (ValueError, IndexError):
        return None
    return features or None


def _values(feature: bytes) -> list[bytes] | None:
    values: list[bytes] | None = []
    for number, value in _fields(feature):
        if number not in (1, 2, 3):
            raise ValueError
        values = list(_only(value, 1)) if number == 1 else None
    return values


def _only(data: bytes, wanted: int) -> Iterator[bytes]:
    """The values of a message that has only fields of one number."""
    for number, value in _fields(data):
        if number != wanted:
            raise ValueError
        yield value


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and values of the fields of a message, all of them with a length.

    Raises ValueError or IndexError for other data.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        size, at = _varint(data, at)
        if key & 7 != LENGTH or at + size > len(data):
            raise ValueError
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError
