"""`moejax data inspect`: what is in data, and what would be refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from moejax import cli
from moejax.data import encode, units
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.survey import survey
from moejax.data.survey_text import survey_lines
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError
from tests.written import write_all

TEXTS = [f"document {i} {'and its words ' * (i % 7)}" for i in range(60)]
FIRST = "first\nof all \U0001f600\t\u05e9\u05dc\u05d5\u05dd"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Records and files of every kind of trouble."""
    root = tmp_path / "data"
    root.mkdir()
    lines = [json.dumps({"text": text}) for text in [FIRST, *TEXTS, *TEXTS[:4]]]
    lines[10:10] = [f"nonsense {i}" for i in range(7)]
    lines[30:30] = ['{"text": ""}'] * 3
    (root / "a.jsonl").write_text("\n".join(lines))
    (root / "b.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "x"}\n{"text": "' + b"y" * 5000 + b'"}')
    )
    (root / "c.parquet").write_bytes(b"PAR1 and no more")
    (root / "no.pdf").write_bytes(b"%PDF-1.7 ...")
    (root / "README.md").write_text("about these")
    other = write_all(tmp_path, ["other column"])["plain.parquet"]
    (root / "d.parquet").write_bytes(other.read_bytes().replace(b"text", b"tekst"))
    return root


@pytest.mark.parametrize("size", [32 << 20, 200])
def test_everything_is_counted_and_nothing_ends_it(folder, monkeypatch, size):
    monkeypatch.setattr(units, "UNIT", size)
    monkeypatch.setattr(encode, "CHUNK", size)
    found = survey(str(folder))
    sizes = [len(text.encode()) for text in [FIRST, *TEXTS, *TEXTS[:4], "x", "y" * 5000]]
    assert (found.kind, found.name, found.tokenizer) == ("text", "data", "bytes")
    assert found.documents == len(sizes) == sum(found.lengths.values())
    assert found.bytes == found.tokens == sum(sizes)
    assert (found.duplicates, found.empty) == (4, 3)
    assert found.formats["JSON lines"] == 1 and found.formats["JSON lines, gzip"] == 1
    assert found.shortest == {"tokens": 1, "bytes": 1, "place": "b.jsonl.gz:1"}
    assert found.longest == {"tokens": 5000, "bytes": 5000, "place": "b.jsonl.gz:2"}
    assert found.first[0] == "first\\nof all \U0001f600\\t\u05e9\u05dc\u05d5\u05dd"
    assert found.first[1:] == [text.rstrip("\n")[:120] for text in TEXTS[:2]]
    for low, count in found.lengths.items():
        assert count == sum(int(low) <= size < 2 * int(low) for size in sizes)
    assert found.bad >= 7
    expecting = "it is not JSON: expecting value, column 1"
    assert found.first_bad == [f"a.jsonl:{n}: {expecting}" for n in range(11, 16)]
    refused = {Path(file["path"]).name: file["reason"] for file in found.refused}
    assert refused["no.pdf"].startswith("looks like PDF, which is not text; convert it")
    assert [Path(path).name for path in found.ignored] == ["README.md"]
    lines = survey_lines(found)
    assert "  and 2 more" not in lines or found.bad == 7
    assert all("\n" not in line for line in lines)
    assert next(line for line in lines if line.startswith("documents ")) == "documents   67"


def test_a_missing_column_refuses_its_file_only(tmp_path):
    files = write_all(tmp_path, TEXTS)
    root = tmp_path / "data"
    root.mkdir()
    for name in ("plain.parquet", "a.jsonl"):
        (root / name).write_bytes(files[name].read_bytes())
    found = survey(str(root), text_field="words")
    assert [Path(file["path"]).name for file in found.refused] == ["plain.parquet"]
    assert "data.text_field" in found.refused[0]["reason"]
    assert (found.documents, found.bad) == (0, len(TEXTS))
    assert (found.lengths, found.first, found.shortest) == ({}, [], {})
    assert survey_lines(found)


def test_tokens_are_those_of_the_tokenizer(tmp_path, folder):
    bpe = str(tmp_path / "bpe.json")
    train_bpe(str(folder / "a.jsonl"), 300, bpe, on_error="skip")
    (folder / "latin.jsonl").write_text('{"text": "in \\u00e4 file"}\n')
    found = survey(str(folder / "a.jsonl"), bpe, first=1)
    corpus = load_corpus(str(folder / "a.jsonl"), bpe, 0.2, on_error="skip", duplicates="keep")
    assert found.documents is not None and found.bytes is not None
    assert found.tokens == len(corpus.train_N) + len(corpus.heldout_N) - (found.documents - 2)
    assert found.bytes > found.tokens
    assert found.first == ["first\\nof all \U0001f600\\t\u05e9\u05dc\u05d5\u05dd"]


def test_plain_text_that_is_not_text_is_counted(tmp_path):
    root = tmp_path / "plain"
    root.mkdir()
    (root / "a.txt").write_text("a text")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "nul.txt").write_bytes(b"a\0b")
    found = survey(str(root))
    assert (found.documents, found.not_utf8, found.binary) == (3, 1, 1)
    assert found.first_not_utf8 == str(root / "latin.txt")
    assert found.longest["place"] == str(root / "a.txt")
    bpe = str(tmp_path / "bpe.json")
    train_bpe(str(root), 257, bpe, on_error="skip", eval_path=str(root / "nul.txt"))
    found = survey(str(root), bpe)
    assert (found.documents, found.bad) == (2, 1)
    assert found.first_bad == [f"{root}/latin.txt: it is not UTF-8"]


def test_shards_are_described_and_verified(tmp_path, folder):
    out, bpe = tmp_path / "out", str(tmp_path / "bpe.json")
    train_bpe(str(folder / "a.jsonl"), 300, bpe, on_error="skip")
    index = prepare(str(folder / "a.jsonl"), bpe, str(out), 0.2, licence="CC0", on_error="skip")
    found = survey(str(out), bpe, first=2)
    assert (found.kind, found.tokenizer) == ("prepared shards", "bpe.json")
    assert found.documents == 61 and found.duplicates == 0
    assert found.bytes == sum(len(text.encode()) for text in [FIRST, *TEXTS])
    assert found.tokens == index.train_tokens + index.heldout_tokens - 59
    assert found.split["fingerprint"] == index.fingerprint == found.shards["fingerprint"]
    assert found.shards["licence"] == "CC0"
    assert (found.bad, found.empty) == (7, 3)
    assert len(found.first) == 2 and all(line.startswith(("first", "docu")) for line in found.first)
    assert survey(str(out)).first[0].startswith("ids ")
    assert json.loads(json.dumps(found.__dict__)) == found.__dict__
    other = str(tmp_path / "other.json")
    train_bpe(str(folder / "a.jsonl"), 290, other, on_error="skip")
    with pytest.raises(UserError, match="--tokenizer=.*other.json' is not the tokenizer of these"):
        survey(str(out), other)
    data = bytearray((out / "train.bin").read_bytes())
    data[0] ^= 1
    (out / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match="was changed after it was prepared"):
        survey(str(out))


def test_token_arrays_are_described(tmp_path):
    ids = np.array([5, 6, 7, 3, 9, 3, 5, 6, 7, 3] * 5, np.uint16)
    for name in ("train", "val"):
        ids.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "x.npy").write_bytes(b"no array")
    found = survey(str(tmp_path))
    assert found.kind == "token arrays" and found.tokens == 100
    assert found.documents is None and found.bytes is None
    assert [Path(file["path"]).name for file in found.refused] == ["x.npy"]
    assert found.first[0].startswith("ids 5 6 7 3 9")
    assert "documents   not known" in survey_lines(found)


def test_the_command_prints_lines_or_json(folder, capsys):
    assert cli.main(["data", "inspect", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("data        data, text\nfiles       JSON lines (1), ")
    assert not printed.err
    assert cli.main(["data", "inspect", str(folder), "--json", "--first=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"documents", "bytes", "tokens", "lengths", "refused"} <= set(found)
    assert found["first"] == []


@pytest.mark.parametrize(
    "arguments, words",
    {
        "nowhere": "PATH: cannot read 'nowhere': No such file",
        "{folder} --first=-1": "--first=-1 must be",
        "hf://name": "PATH='hf://name' is not on this machine",
        "{folder} --tokenizer=nowhere.json": "data.tokenizer",
        "{folder} --tokeniser=x": "unknown flag --tokeniser",
    }.items(),
)
def test_mistakes_are_one_line(folder, capsys, arguments, words):
    assert cli.main(["data", "inspect", *arguments.format(folder=folder).split()]) == 2
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1


def test_the_help_names_every_key(capsys):
    from moejax.data.survey import Survey

    assert cli.main(["data", "inspect", "--help"]) == 0
    text = capsys.readouterr().out
    for name in Survey.__dataclass_fields__:
        assert name in text, name
