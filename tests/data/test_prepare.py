"""Preparing token shards."""

import json

import numpy as np
import pytest

from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError


@pytest.fixture
def text(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for i in range(10):
        (root / f"{i}.txt").write_text(f"document {i} and its text\n" * (i + 1))
    return root


@pytest.mark.parametrize("with_bpe", [False, True])
def test_shards_are_the_same_corpus_as_the_text(text, tmp_path, with_bpe):
    tokenizer = ""
    if with_bpe:
        tokenizer = str(tmp_path / "bpe.json")
        train_bpe(str(text), 270, tokenizer)
    out = tmp_path / "deep" / "shards"
    prepare(str(text), tokenizer, str(out), 0.2)
    mapped, loaded = load_corpus(str(out)), load_corpus(str(text), tokenizer, 0.2)
    assert isinstance(mapped.train_N, np.memmap)
    assert not mapped.train_N.flags.writeable
    np.testing.assert_array_equal(mapped.train_N, loaded.train_N)
    np.testing.assert_array_equal(mapped.heldout_N, loaded.heldout_N)
    np.testing.assert_array_equal(mapped.heldout_size_M, loaded.heldout_size_M)
    for field in ("fingerprint", "vocab_size", "separator", "name", "facts", "overlap"):
        assert getattr(mapped, field) == getattr(loaded, field)
    assert sorted(path.name for path in out.iterdir()) == [
        "heldout.bin", "heldout.bytes", "heldout.starts", "index.json", "train.bin", "train.starts",
    ]  # fmt: skip
    assert json.loads((out / "index.json").read_text())["dtype"] == "uint16"


def test_a_vocabulary_above_65536_is_written_in_32_bits(text, tmp_path):
    import tokenizers

    train_bpe(str(text), 270, str(tmp_path / "small.json"))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "small.json"))
    tokenizer.add_tokens([f"unused{i}" for i in range(65536)])
    tokenizer.save(str(tmp_path / "large.json"))
    index = prepare(str(text), str(tmp_path / "large.json"), str(tmp_path / "out"), 0.2)
    assert index.dtype == "uint32"
    assert (tmp_path / "out" / "train.bin").stat().st_size == 4 * index.train_tokens
    assert load_corpus(str(tmp_path / "out")).train_N.dtype == np.uint32


def test_an_existing_folder_must_be_empty(text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare(str(text), "", str(out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="out_dir: '.*out' exists and is not an empty folder"):
        prepare(str(text), "", str(out), 0.3)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(UserError, match="out_dir: '.*0.txt' exists and is not an empty folder"):
        prepare(str(text), "", str(text / "0.txt"))
    with pytest.raises(UserError, match="out_dir: cannot write '.*below'"):
        prepare(str(text), "", str(text / "0.txt" / "below"))


def test_a_failure_leaves_nothing_behind(text, tmp_path):
    train_bpe(str(text), 270, str(tmp_path / "bpe.json"))
    (text / "latin.txt").write_bytes(b"\xe9" * 10)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="latin.txt' is not UTF-8"):
        prepare(str(text), str(tmp_path / "bpe.json"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tokens_are_not_tokenised_again(text, tmp_path):
    prepare(str(text), "", str(tmp_path / "out"))
    with pytest.raises(UserError, match="already prepared"):
        prepare(str(tmp_path / "out"), "", str(tmp_path / "again"))
    with pytest.raises(UserError, match="data.tokenizer: '.*out' already holds tokens"):
        load_corpus(str(tmp_path / "out"), str(tmp_path / "bpe.json"))


def test_shards_may_have_a_separate_held_out_text(text, tmp_path):
    (tmp_path / "own.txt").write_text("another text")
    prepare(str(text), "", str(tmp_path / "out"), eval_path=str(tmp_path / "own.txt"))
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.heldout_N.astype(np.uint8).tobytes() == b"another text"
    assert corpus.facts.train_documents == 10
    with pytest.raises(UserError, match="data.eval_path: '.*out' already holds tokens"):
        load_corpus(str(tmp_path / "out"), eval_path=str(text))
