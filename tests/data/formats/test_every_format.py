"""Claims that hold for every format: documents come back as written, in any spans, and damage is
reported in words."""

import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.documents import Document
from moejax.data.formats.table import FORMATS, format_of
from moejax.errors import UserError
from tests.written import TEXTS, places, read, write_all


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("formats"))


def test_every_format_of_the_table_is_written(files):
    kinds = {type(format_of(str(path))) for path in files.values()}
    assert kinds == {type(make(None)) for make in FORMATS.values()}


def test_documents_come_back_as_they_were_written(files):
    for name, path in files.items():
        assert read(path) == (list(TEXTS), []), name


def test_any_spans_give_the_same_documents_at_the_same_places(files):
    rng = random.Random(5)
    several = set()
    for name, path in files.items():
        whole = places(path, 1 << 30)
        bytes_ = path.stat().st_size
        for size in (bytes_ // 150 + 1, bytes_ // 10, rng.randint(bytes_ // 100 + 1, bytes_)):
            assert read(path, size)[0] == list(TEXTS), (name, size)
            assert places(path, size) == whole, (name, size)
            file = Document(name, str(path), bytes_)
            found = format_of(str(path))
            assert found is not None
            spans = found.spans(file, size)
            assert all(a.end == b.begin for a, b in zip(spans, spans[1:], strict=False))
            several |= {name} if len(spans) > 1 else set()
    assert {"a.jsonl", "groups.parquet", "string.file.arrow", "string.stream.arrow"} <= several
    assert "text.group_size-1.array_record" in several


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    size=st.integers(1, 300),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_lines_belong_to_the_span_in_which_they_begin(tmp_path_factory, texts, size, end):
    from tests.written import json_lines

    path = tmp_path_factory.getbasetemp() / "spans.jsonl"
    path.write_bytes(json_lines(texts, end=end) or b"\n")
    assert read(path, size) == (texts, [])
    step = 2 if end == "\n\n" else 1
    assert places(path, size) == [f"spans.jsonl:{1 + step * i}" for i in range(len(texts))]


def test_formats_travel_to_other_processes(files):
    for path in files.values():
        found = format_of(str(path))
        assert pickle.loads(pickle.dumps(found)) == found


def silent(name: str) -> bool:
    """True for formats in which a part can look like the whole: rows of lines or frames."""
    return name.startswith("parts-") or name.endswith((".jsonl", ".ndjson", "lines.json"))


ROUNDS = [pytest.param(1, id="few"), pytest.param(5, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_truncation_leaves_the_documents_before_it_and_a_reason(files, tmp_path, rounds):
    rng = random.Random(7)
    for name, path in files.items():
        data = path.read_bytes()
        for cut in sorted({len(data) - 1, *(rng.randrange(1, len(data)) for _ in range(rounds))}):
            damaged = tmp_path / name
            damaged.write_bytes(data[:cut])
            try:
                if format_of(str(damaged)) is None:
                    assert name.endswith(".json") and cut < 200, (name, cut)
                    continue
                texts, bad = read(damaged, rng.choice([300, 1 << 20]))
            except UserError as error:
                assert "\n" not in str(error) and str(damaged) in str(error)
                continue
            assert texts == list(TEXTS)[: len(texts)], (name, cut)
            assert bad or silent(name), (name, cut)
            assert all(line.startswith(name) for line in bad)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_changed_bytes_end_in_words(files, tmp_path, rounds):
    """Never in another exception."""
    rng = random.Random(11)
    for name, path in files.items():
        data = bytearray(path.read_bytes())
        for _ in range(rounds):
            at = rng.randrange(len(data))
            changed = bytearray(data)
            changed[at] ^= 1 << rng.randrange(8)
            damaged = tmp_path / name
            damaged.write_bytes(changed)
            try:
                if format_of(str(damaged)) is not None:
                    read(damaged)
            except UserError as error:
                assert "\n" not in str(error)
