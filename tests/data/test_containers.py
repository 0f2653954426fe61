"""Files that are not text are refused; documents that do not look like text are reported."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile

import pytest

from moejax.data.census import Census
from moejax.data.containers import kind_of
from moejax.data.documents import find_documents, pieces
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError

RECORDS = "".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(9)).encode()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def parquet_bytes() -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), buffer)
    return buffer.getvalue()


def arrow_bytes() -> bytes:
    import pyarrow

    buffer = io.BytesIO()
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:  # as datasets.save_to_disk
        writer.write_table(table)
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


WRITTEN = {
    "jsonl": (RECORDS, "JSON lines"),
    "parquet": (parquet_bytes(), "Parquet"),
    "arrow": (arrow_bytes(), "Arrow"),
    "gz": (gzip.compress(b"text"), "gzip"),
    "bz2": (bz2.compress(b"text"), "bzip2"),
    "xz": (lzma.compress(b"text"), "xz"),
    "zst": (b"\x28\xb5\x2f\xfd rest", "Zstandard"),
    "zip": (zip_bytes(), "a zip archive"),
    "safetensors": (safetensors_bytes(), "weights of a model"),
    "pkl": (pickle.dumps(list(range(99)), protocol=4), "a Python pickle"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "png": (b"\x89PNG\r\n\x1a\n", "a picture, sound or film"),
}


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_container_is_refused_by_its_name_and_by_its_bytes(tmp_path, suffix):
    data, looks_like = WRITTEN[suffix]
    for name, content in ((f"a.{suffix}", data), (f"A.{suffix.upper()}", b"any"), ("a.txt", data)):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_corpus(str(path))
        assert str(error.value).startswith(f"data.path: {str(path)!r} looks like {looks_like}")
        assert "\n" not in str(error.value) and ";" in str(error.value)  # and a remedy
        path.unlink()


@pytest.mark.parametrize("suffix", ["docx", "tar", "txt.gz", "jsonl.zst", "ckpt"])
def test_known_names_are_refused_whatever_the_content(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"some text")
    with pytest.raises(UserError, match="which is not text"):
        load_corpus(str(tmp_path / f"a.{suffix}"))


@pytest.mark.parametrize("name", ["a", "a.txt", "a.json"])
def test_a_json_list_of_records_is_refused_by_its_bytes(tmp_path, name):
    (tmp_path / name).write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    with pytest.raises(UserError, match="looks like a JSON list of records, which is not text"):
        load_corpus(str(tmp_path / name))


def test_a_folder_with_a_container_is_refused_wherever_text_is_read(tmp_path):
    root, text = tmp_path / "texts", tmp_path / "text.txt"
    (root / "deep").mkdir(parents=True)
    for i in range(3):
        (root / f"{i}.txt").write_text("words " * 20)
    (root / "deep" / "a.parquet").write_bytes(parquet_bytes())
    (root / "deep" / "b.jsonl").write_bytes(RECORDS)
    text.write_text("words " * 20)
    message = r"'.*a.parquet' looks like Parquet.*1 more of 5 files.*out of the folder"
    with pytest.raises(UserError, match=f"data.path: {message}"):
        load_corpus(str(root))
    with pytest.raises(UserError, match=f"data.eval_path: {message}"):
        load_corpus(str(text), eval_path=str(root))
    with pytest.raises(UserError, match=f"data.path: {message}"):
        train_bpe(str(root), 300, str(tmp_path / "bpe.json"))
    with pytest.raises(UserError, match=f"data.path: {message}"):
        prepare(str(root), "", str(tmp_path / "shards"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "texts"]


def test_a_hugging_face_folder_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{\n  "_data_files": []\n}')
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(arrow_bytes())
    with pytest.raises(UserError, match="Arrow, as in a Hugging Face dataset.*load_from_disk"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    "name, text",
    [
        ("code.js", "{ let a = 1 }\n{ let b = 2 }\n"),
        ("one.json", '{"pages": 3}\n'),
        ("pretty.json", '{\n  "a": {\n    "b": 1\n  }\n}\n'),
        ("list.json", "[1, 2, 3]"),
        ("bz.txt", "BZh9 wrote this."),
        ("list.js", '[{"a": 1}].map(f)'),
        ("corpus.pt", "Um texto em portugu\u00eas."),
        ("corpus.so", "Qoraal Soomaali ah."),
        ("riff.txt", "RIFF: a short phrase, repeated"),
        ("Makefile", "all:\n\ttrue\n"),
    ],
)
def test_text_is_not_mistaken_for_a_container(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert kind_of(str(tmp_path / name)) is None


def looks_like(path: str) -> str:
    kind = kind_of(path)
    return kind.name if kind else ""


def test_json_records_are_recognised_by_content(tmp_path):
    (tmp_path / "a.json").write_bytes(RECORDS)
    assert looks_like(str(tmp_path / "a.json")) == "JSON lines"
    (tmp_path / "b.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert looks_like(str(tmp_path / "b.json")) == "a JSON list of records"
    long = json.dumps({"text": "x" * 200_000})  # no line ends in the first bytes
    (tmp_path / "c.txt").write_text(f"{long}\n{long}\n")
    assert looks_like(str(tmp_path / "c.txt")) == "JSON lines"


def test_documents_that_do_not_look_like_text_are_counted_once_each(tmp_path):
    files = {
        "a.txt": b"plain\ttext\r\n" * 9,
        "b.txt": "caf\u00e9".encode("latin-1"),
        "c.txt": "utf-16".encode("utf-16"),
        "d.dat": bytes(range(1, 32)) * 9,
        "e.dat": b"\xff\0" * (1 << 20),  # several pieces
    }
    root = tmp_path / "text"
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    census = Census()
    for piece in pieces(find_documents(str(root))):
        census.add(piece)
    assert (census.documents, census.not_utf8, census.binary) == (5, 3, 3)
    assert (census.first_not_utf8, census.first_binary) == ("b.txt", "c.txt")
    assert "of 5 documents 3 are not UTF-8 (the first: 'b.txt') and 3 hold" in census.warning()
    corpus = load_corpus(str(root))
    assert "not UTF-8" in corpus.facts.warning
    prepare(str(root), "", str(tmp_path / "shards"))
    assert load_corpus(str(tmp_path / "shards")).facts == corpus.facts
