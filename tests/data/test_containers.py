"""Files that are not text are refused; documents that do not look like text are reported."""

import io
import pickle
import tarfile
import zipfile

import pytest

from moejax.data.census import Census
from moejax.data.containers import Contents, contents_of
from moejax.data.documents import find_documents, pieces
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


WRITTEN = {
    "tar": (tar_bytes(), "a tar archive"),
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


@pytest.mark.parametrize("suffix", ["docx", "tar", "tgz", "lz4", "tfrecord", "ckpt"])
def test_known_names_are_refused_whatever_the_content(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"some text")
    with pytest.raises(UserError, match="which is not text"):
        load_corpus(str(tmp_path / f"a.{suffix}"))


def test_a_folder_with_a_container_is_refused_wherever_text_is_read(tmp_path):
    root, text = tmp_path / "texts", tmp_path / "text.txt"
    (root / "deep").mkdir(parents=True)
    for i in range(3):
        (root / f"{i}.txt").write_text("words " * 20)
    (root / "deep" / "a.zip").write_bytes(zip_bytes())
    (root / "deep" / "b.pdf").write_bytes(b"%PDF-1.7")
    text.write_text("words " * 20)
    message = r"'.*a.zip' looks like a zip archive.*1 more of 5 files.*out of the folder"
    with pytest.raises(UserError, match=f"data.path: {message}"):
        load_corpus(str(root))
    with pytest.raises(UserError, match=f"data.eval_path: {message}"):
        load_corpus(str(text), eval_path=str(root))
    with pytest.raises(UserError, match=f"data.path: {message}"):
        train_bpe(str(root), 300, str(tmp_path / "bpe.json"))
    with pytest.raises(UserError, match=f"data.path: {message}"):
        prepare(str(root), "", str(tmp_path / "shards"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "texts"]


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
    assert contents_of(str(tmp_path / name)) == Contents(None)


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
