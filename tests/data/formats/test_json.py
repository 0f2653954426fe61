"""JSON lines and lists: what is no text is named with its line and its reason."""

import json
import time
import tracemalloc

import pytest

from moejax.data.documents import Document
from moejax.data.formats import records
from moejax.data.formats.format import Record
from moejax.data.formats.table import format_of
from tests.written import TEXTS, json_list, places, read

GOOD = b'{"text": "good"}'

BAD = {
    "cut off": (b'{"text": "cut o', "it is not JSON: unterminated string starting at, column 10"),
    "words": (b"not json", "it is not JSON: expecting value, column 1"),
    "two": (b'{"text": "a"} {"text": "b"}', "it is not JSON: extra data, column 15"),
    "control": (b'{"text": "a\x00b"}', "it is not JSON: invalid control character at, column 12"),
    "missing": (b'{"id": 1, "body": "x"}', "it has no field 'text' (data.text_field); its fields "
                "are 'id', 'body'"),
    "empty": (b"{}", "it has no field 'text' (data.text_field); its fields are none"),
    "null": (b'{"text": null}', "its field 'text' is null, not text"),
    "number": (b'{"text": 3.5}', "its field 'text' is a number, not text"),
    "bool": (b'{"text": true}', "its field 'text' is true or false, not text"),
    "list": (b'{"text": ["a"]}', "its field 'text' is a list, not text"),
    "object": (b'{"text": {"en": "a"}}', "its field 'text' is an object, not text"),
    "no object": (b'"only text"', "it is a text, not an object with the field 'text'"),
    "a list": (b'["a"]', "it is a list, not an object with the field 'text'"),
    "utf-8": (b'{"text": "caf\xe9"}', "it is not UTF-8 (invalid continuation byte at byte 14)"),
    "surrogate": (rb'{"text": "a\ud83d b"}', r"its text has half of a surrogate pair, \ud83d, "
                  "which is not a character (character 2)"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
             "it is not JSON: its lists or objects are nested too deeply"),
    "digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "it is not readable JSON: Exceeds the "
               "limit (4300 digits)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, name):
    line, reason = BAD[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD, GOOD]))
    for size in (len(line) // 15 + 1, 20 + len(line) // 2, 1 << 20):
        texts, bad = read(path, size)
        assert texts == ["good"] * 3
        assert len(bad) == 1 and bad[0].startswith(f"a.jsonl:3: {reason}")


@pytest.mark.parametrize("name", sorted(set(BAD) - {"cut off", "two"}))
def test_a_bad_element_of_a_list_is_named_and_the_others_are_read(tmp_path, name):
    element, reason = BAD[name]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join([GOOD, element, GOOD]) + b"]")
    texts, bad = read(path)
    assert texts == ["good"] * 2
    assert len(bad) == 1 and bad[0].startswith(f"a.json, record 2: {reason}")


@pytest.mark.parametrize(
    "data, texts, reason",
    [
        (b'[{"text": "a"}, {"text": "b', ["a"], "record 2: the list has no end"),
        (b'[{"text": "a"}, {"text": "b"}', ["a"], "record 2: the list has no end"),
        (b'[{"text": "a"},', ["a"], "record 2: the list has no end"),
        (b'[{"text": "a"}]]', ["a"], "record 2: the file goes on after the end of the list"),
        (b'[{"text": "a"}, {"text": "b"}}]', ["a"], "record 2: it has a } without a {"),
        (b'[{"text": "a"},]', ["a"], "record 2: it is not JSON: expecting value"),
        (b'[{"text": "a"},,{"text": "b"}]', ["a", "b"], "record 2: it is not JSON"),
        (b'[{"text": "a"} {"text": "b"}]', [], "record 1: it is not JSON: extra data"),
        (b'[{"text": "a\\"}, {"text": "b"}]', [], "record 1: the list has no end"),
    ],
)
def test_a_damaged_list_gives_what_precedes_the_damage(tmp_path, data, texts, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    found, bad = read(path)
    assert found == texts and bad[0].startswith(f"a.json, {reason}")


def test_an_empty_list_has_no_documents(tmp_path):
    for data in (b'[{"text": "a"}]', b'[ {"text":"a"} ] \n'):
        (tmp_path / "a.json").write_bytes(data)
        assert read(tmp_path / "a.json") == (["a"], [])
    from moejax.data.formats.json_list import JsonList

    (tmp_path / "b.json").write_bytes(b" [ \n ] ")
    file = Document("b.json", str(tmp_path / "b.json"), 7)
    assert list(JsonList().read(file, JsonList().spans(file, 1)[0], "text")) == []


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_list_is_cut_the_same_whatever_the_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("moejax.data.formats.json_list.CHUNK", chunk)
    texts = [text[:40] for text in TEXTS] + ['\\"', "\\", "\\\\", '"', "]", "}{", ","]
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_bytes(json_list(texts, indent))
        assert read(path) == (texts, [])


def test_another_field_and_a_nested_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "x", "meta": {"text": "y"}}\n')
    assert read(path, text_field="body") == (["x"], [])
    _, (bad,) = read(path, text_field="meta.text")
    assert bad == (
        "a.jsonl:1: it has no field 'meta.text' (data.text_field); its fields are 'body', 'meta'; "
        "fields inside of fields are not read: move the text to one of its own"
    )


def test_a_message_about_a_missing_field_stays_short(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({f"{i}" * 100: 1 for i in range(50)}) + "\n")
    _, (bad,) = read(path)
    assert len(bad) < 600 and bad.endswith(" and 42 more")


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" + GOOD + b"\n") * 3)  # of three files behind one another
    assert read(path, 10) == (["good"] * 3, [])


def test_a_record_above_the_limit_is_bad_and_is_not_loaded(tmp_path, monkeypatch):
    for module in ("json_lines", "json_list"):
        monkeypatch.setattr(f"moejax.data.formats.{module}.LONGEST", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + b'{"text": "' + b"x" * 700_000 + b'"}\n' + GOOD + b"\n")
    for size in (500, 1 << 20):
        assert read(path, size) == (["good"] * 2, [f"a.jsonl:2: {records.TOO_LONG}"])
    assert places(path, 500)[-1] == "a.jsonl:3"
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + GOOD + b', {"text": "' + b"x" * 700_000 + b'"}]')
    texts, (bad,) = read(path)
    assert texts == ["good"] and records.TOO_LONG in bad


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_one_record_of_50_megabytes_is_read_in_linear_time(tmp_path, name):
    text = "It's long.\n" * 5_000_000
    path = tmp_path / name
    rows = [json.dumps({"text": t}) for t in ("a", text, "b")]
    path.write_text("\n".join(rows) if name == "a.jsonl" else f"[{','.join(rows)}]")
    began = time.process_time()
    found, bad = read(path, 1 << 22)
    assert time.process_time() - began < 10  # quadratic time would be minutes
    assert (found, bad) == (["a", text, "b"], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    import gzip

    import zstandard

    text = "some words of text " * 60
    rows = [json.dumps({"text": text})] * 20_000  # 23 MB
    data = ("\n".join(rows) if "jsonl" in name else f"[{','.join(rows)}]").encode()
    packed = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    path = tmp_path / name
    path.write_bytes(packed.get(name.rpartition(".")[2], bytes)(data))
    del data, rows
    found = format_of(str(path))
    assert found is not None
    file = Document(name, str(path), path.stat().st_size)
    span = found.spans(file, 1 << 30)[0]
    next(found.read(file, span, "text"))  # imports
    tracemalloc.start()
    count = sum(isinstance(record, Record) for record in found.read(file, span, "text"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 4 << 20
