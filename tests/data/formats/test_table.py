"""The format of a file, by what it holds; names that say something else end in one line."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc

from moejax.data.containers import refuse_containers
from moejax.data.formats.table import format_of, formats_of
from moejax.errors import UserError
from tests.written import (
    COMPRESSORS,
    array_record_bytes,
    arrow_bytes,
    json_lines,
    json_list,
    parquet_bytes,
)

LINES = json_lines(["one", "two"])
LIST = json_list(["one", "two"])
PARQUET = parquet_bytes(["one"], pyarrow.string())
STREAM = arrow_bytes(["one"], pyarrow.string(), ipc.new_stream)
FILE = arrow_bytes(["one"], pyarrow.string(), ipc.new_file)


def named(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    found = format_of(str(path))
    return found.name if found else ""


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("a.jsonl", LINES, "JSON lines"),
        ("A.JSONL", LINES, "JSON lines"),
        ("one.jsonl", LINES.splitlines()[0], "JSON lines"),
        ("a.json", LINES, "JSON lines"),
        ("a.txt", LINES, "JSON lines"),
        ("part-00000", LINES, "JSON lines"),
        ("long.txt", json_lines(["x" * 200_000] * 2), "JSON lines"),  # no line ends in the head
        ("a.json", LIST, "JSON list"),
        ("a", LIST, "JSON list"),
        ("a.jsonl", LIST, "JSON list"),
        ("a.parquet", PARQUET, "Parquet"),
        ("part-00000", PARQUET, "Parquet"),
        ("a.feather", FILE, "Arrow"),
        ("a.arrow", STREAM, "Arrow"),
        ("a.json.gz", gzip.compress(LINES), "JSON lines, gzip"),  # as in C4
        ("a.gz", gzip.compress(LINES), "JSON lines, gzip"),
        ("a.json.xz", lzma.compress(LIST), "JSON list, xz"),
        ("a.txt.gz", gzip.compress(b"text"), "plain text, gzip"),
        ("ls.1.gz", gzip.compress(b".TH LS 1"), "plain text, gzip"),
        ("part-00000", gzip.compress(b"text"), "plain text, gzip"),
        ("empty.gz", gzip.compress(b""), "plain text, gzip"),
    ],
)
def test_a_format_is_found_by_name_and_bytes(tmp_path, name, data, expected):
    assert named(tmp_path / name, data) == expected
    refuse_containers([str(tmp_path / name)], "data.path")


def test_array_record_is_found(tmp_path):
    data = array_record_bytes([b"text"], tmp_path / "written")
    assert named(tmp_path / "a.array_record", data) == named(tmp_path / "a", data) == "ArrayRecord"


@pytest.mark.parametrize(
    "name, data",
    [
        ("one.json", b'{"text": "pages"}\n'),
        ("pretty.json", b'{\n  "a": {\n    "b": 1\n  }\n}\n'),
        ("list.json", b"[1, 2, 3]"),
        ("dict.py", b'{"a": 1}\n{"b": 2}\n'),
        ("list.js", b'[{"a": 1}].map(f)'),
        ("a.md", LIST),
        ("brace.txt", b"{not json}\n{really}\n"),
        ("a.txt", b"[ ] buy milk\n"),
        ("empty.txt", b"\n"),
    ],
)
def test_text_that_begins_like_json_stays_text(tmp_path, name, data):
    assert named(tmp_path / name, data) == ""


@pytest.mark.parametrize("how, compress", COMPRESSORS.items())
def test_every_compression_is_found_with_and_without_its_suffix(tmp_path, how, compress):
    end = how.rpartition(".")[2]
    assert named(tmp_path / f"a.txt.{end}", compress(b"text")).startswith("plain text, ")
    assert named(tmp_path / "data", compress(b"text")).startswith("plain text, ")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.jsonl", PARQUET, "is Parquet, although its name ends in .jsonl; rename.*.parquet"),
        ("x.txt", PARQUET, "is Parquet, although its name ends in .txt; rename.*.parquet"),
        ("x.json", STREAM, "is Arrow, although its name ends in .json; rename.*.arrow"),
        ("x.txt", gzip.compress(b"text"), "is gzip, although its name ends in .txt; rename.*.gz"),
        ("x.gz", b"text", "is not gzip, although its name ends in .gz; .*fetch it again"),
        ("x.zst", gzip.compress(b"text"), "is not Zstandard, although its name ends in .zst"),
        ("x.jsonl.bz2", b"<html>Not found</html>", "is not bzip2, although its name ends in .bz2"),
        ("x.parquet", b"<html>Not found</html>", "is not Parquet, although its name"),
        ("x.parquet", LINES, "is JSON lines, although its name ends in .parquet"),
        ("x.arrow", PARQUET, "is Parquet, although its name ends in .arrow"),
        ("x.array_record", b"text", "is not ArrayRecord, although its name"),
        ("x.parquet.gz", gzip.compress(PARQUET), "is Parquet inside of gzip, .*unpack it"),
        ("x.gz", gzip.compress(gzip.compress(b"text")), "looks like gzip.*unpack it first"),
        ("x.tar.gz", gzip.compress(b"text"), "looks like a tar archive.*tar -xf"),
        ("x.pdf.xz", lzma.compress(b"text"), "looks like PDF"),
        ("x.gz", gzip.compress(b"%PDF-1.7"), "looks like PDF"),
        ("x.jsonl", LINES.decode().encode("utf-16"), "is UTF-16, not UTF-8; .*iconv"),
    ],
)
def test_a_name_that_says_something_else_ends_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^data.eval_path: '{path}' {message}") as error:
        format_of(str(path), "data.eval_path")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        refuse_containers([str(path)], "data.path")


def test_a_damaged_head_is_left_to_the_reader(tmp_path):
    assert named(tmp_path / "a.jsonl.gz", gzip.compress(LINES)[:12]) == "JSON lines, gzip"
    assert named(tmp_path / "a.txt.xz", lzma.compress(LINES)[:20]) == "plain text, xz"


def test_formats_of_a_folder_name_the_number_of_others(tmp_path):
    files = {"a.jsonl": LINES, "b.gz": b"no", "c.zip": b"PK\x03\x04", "d.txt": b"a"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in sorted(os.listdir(tmp_path))]
    with pytest.raises(UserError, match=r"b.gz' is not gzip.* \(nor are 1 more of 4 files\);"):
        formats_of(paths)
    found = formats_of([paths[0], paths[3]])
    assert [f.name if f else "" for f in found] == ["JSON lines", ""]
    with pytest.raises(UserError, match="cannot read .*: No such file"):
        formats_of([str(tmp_path / "none.jsonl")])


def test_json_of_one_record_per_file_is_a_text(tmp_path):
    assert named(tmp_path / "x.json", json.dumps({"text": "a"}).encode()) == ""
