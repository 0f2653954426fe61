"""ArrayRecord: texts, JSON objects, and Examples of TensorFlow."""

import json

import grain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.formats.example import example_features
from tests.written import array_record_bytes, example, example_class, places, read


@given(
    names=st.lists(st.text(min_size=1, max_size=5), min_size=1, unique=True),
    values=st.lists(st.binary(max_size=300), min_size=1, max_size=3),
)
def test_examples_are_decoded_as_protobuf_encodes_them(names, values):
    made = EXAMPLE()
    for name in names:
        made.features.feature[name].bytes_list.value.extend(values)
    made.features.feature["n"].int64_list.value.extend([1, -5])
    made.features.feature["f"].float_list.value.append(2.5)
    expected = {name: list(values) for name in names} | {"n": None, "f": None}
    assert example_features(made.SerializeToString()) == expected


EXAMPLE = example_class()


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_other_bytes_are_an_example_only_if_protobuf_says_so(data):
    found = example_features(data)
    if found:
        assert set(EXAMPLE.FromString(data).features.feature) == set(found)


def test_records_are_those_that_grain_reads(tmp_path):
    path = tmp_path / "a.array_record"
    array_record_bytes([f"text {i}".encode() for i in range(5000)], path)
    source = grain.sources.ArrayRecordDataSource(str(path))
    expected = [record.decode() for record in source]
    assert read(path, 3000) == (expected, [])
    assert places(path, 3000) == [f"a.array_record, record {i + 1}" for i in range(5000)]


def test_json_objects_without_text_are_named(tmp_path):
    path = tmp_path / "a.array_record"
    rows = [json.dumps({"text": str(i)}).encode() for i in range(20)]
    rows[3], rows[17] = b'{"id": 3}', b'{"text": "cut'
    array_record_bytes(rows, path)
    for size in (1 << 16, 1 << 20):
        texts, bad = read(path, size)
        assert texts == [str(i) for i in range(20) if i not in (3, 17)]
        assert bad[0].startswith("a.array_record, record 4: it has no field 'text'")
        assert bad[1].startswith("a.array_record, record 18: it is not JSON: unterminated")


def test_examples_without_text_are_named(tmp_path):
    path = tmp_path / "a.array_record"
    two = EXAMPLE()
    two.features.feature["text"].bytes_list.value.extend([b"a", b"b"])
    number = EXAMPLE()
    number.features.feature["text"].int64_list.value.append(4)
    missing = EXAMPLE()
    missing.features.feature["body"].bytes_list.value.append(b"a")
    odd = [two.SerializeToString(), number.SerializeToString(), missing.SerializeToString()]
    array_record_bytes(
        [example(b"good"), *odd, b"{}", example(b"\xff"), *[example(b"x")] * 9], path
    )
    texts, bad = read(path)
    assert texts == ["good", *["x"] * 9]
    assert [line.partition(": ")[2] for line in bad] == [
        "its feature 'text' holds 2 values, not one text",
        "its feature 'text' holds numbers, not text",
        "it has no feature 'text' (data.text_field); its features are 'body'",
        "it is not a tf.train.Example, as the first records of the file are",
        "it is not UTF-8 (invalid start byte at byte 1)",
    ]


def test_text_may_begin_like_json(tmp_path):
    path = tmp_path / "a.array_record"
    rows = [b"int f() {", b"{ return 1; }", b'{"a": 1}', b"", b"\n\x05other"]
    array_record_bytes(rows, path)
    assert read(path) == ([row.decode() for row in rows], [])


@pytest.mark.parametrize("options", ["group_size:1", "group_size:10"])
def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path, options):
    path = tmp_path / "a.array_record"
    rows = [f"{i:03} ".encode() * 200 for i in range(200)]
    data = bytearray(array_record_bytes(rows, path, options + ",uncompressed"))
    at = data.index(b"133 133 133 133")
    data[at : at + 2] = b"xx"
    path.write_bytes(data)
    for size in (1 << 14, 1 << 20):
        texts, bad = read(path, size)
        lost = range(133, 134) if options == "group_size:1" else range(130, 140)
        assert texts == [row.decode() for i, row in enumerate(rows) if i not in lost]
        expected = [f"a.array_record, record {i + 1}: it is damaged (" for i in lost]
        assert [line[: len(start)] for line, start in zip(bad, expected, strict=True)] == expected


def test_a_truncated_file_is_one_bad_record(tmp_path):
    path = tmp_path / "a.array_record"
    data = array_record_bytes([b"text"] * 100, path)
    path.write_bytes(data[:-5])
    texts, (bad,) = read(path)
    assert texts == []
    assert bad.startswith("a.array_record: it is not a complete ArrayRecord file (")


def test_a_file_without_records_has_no_documents(tmp_path):
    path = tmp_path / "a.array_record"
    array_record_bytes([], path)
    assert read(path) == ([], [])
