"""Loading a corpus from files."""

import dataclasses
import types

import numpy as np
import pytest

from moejax.data import load as corpus_lib
from moejax.data.load import load_corpus
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.interface import escaped
from moejax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for i in range(10):
        (root / f"{i}.txt").write_text(f"file {i} says {'ab' * (i + 1)} and é\n")
    return root


def documents_of(corpus, tokens) -> list[bytes]:
    return tokens.astype(np.uint8).tobytes().split(bytes([corpus.separator]))


def test_training_and_heldout_text_are_the_files_each_once(folder):
    for path in folder.iterdir():
        path.write_text(f"{path.stem} says {'ab' * 20} and \u00e9\n")  # of one size: none is cut
    corpus = load_corpus(str(folder), eval_fraction=0.2)
    train, heldout = documents_of(corpus, corpus.train_N), documents_of(corpus, corpus.heldout_N)
    assert (len(train), len(heldout)) == (8, 2)
    assert sorted(train + heldout) == sorted(path.read_bytes() for path in folder.iterdir())
    assert (corpus.vocab_size, corpus.separator, corpus.name) == (256, 0, "text")
    assert corpus.train_N.dtype == corpus.heldout_N.dtype == np.uint16
    assert corpus.heldout_size_M is not None
    assert corpus.heldout_size_M.tolist() == [1] * len(corpus.heldout_N)


def test_load_reads_the_config_section(folder):
    config = types.SimpleNamespace(
        path=str(folder),
        tokenizer="",
        eval_fraction=0.2,
        eval_path="",
        split="bytes",
        text_field="text",
        bos="auto",
        duplicates="drop",
        on_error="fail",
    )
    assert corpus_lib.load(config).fingerprint == load_corpus(str(folder), "", 0.2).fingerprint


def test_the_fingerprint_changes_with_the_text_and_with_the_split_and_with_nothing_else(folder):
    first = load_corpus(str(folder)).fingerprint
    folder = folder.rename(folder.parent / "moved")
    assert load_corpus(str(folder)).fingerprint == first
    assert load_corpus(str(folder), eval_fraction=0.3).fingerprint != first
    (folder / "3.txt").write_text((folder / "3.txt").read_text().replace("says", "Says"))
    assert load_corpus(str(folder)).fingerprint != first


def test_a_single_file_is_split_at_its_tail(folder):
    corpus = load_corpus(str(folder / "9.txt"), eval_fraction=0.3)
    text = (folder / "9.txt").read_bytes()
    joined = np.concatenate([corpus.train_N, corpus.heldout_N]).astype(np.uint8).tobytes()
    assert joined == text
    assert len(corpus.heldout_N) == round(0.3 * len(text))


def test_any_bytes_can_be_trained_on_as_bytes(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 4)
    corpus = load_corpus(str(tmp_path))
    assert set(corpus.train_N.tolist()) == set(range(256))


def test_bytes_of_held_out_tokens_are_exact_with_a_tokenizer(folder, tmp_path):
    train_bpe(str(folder), 280, str(tmp_path / "t.json"))
    corpus = load_corpus(str(folder), str(tmp_path / "t.json"), 0.2)
    as_bytes = load_corpus(str(folder), "", 0.2)
    assert corpus.vocab_size == 280
    assert len(corpus.heldout_N) < len(as_bytes.heldout_N)
    text = as_bytes.heldout_N.astype(np.uint8).tobytes()
    assert corpus.origin is not None and corpus.heldout_size_M is not None
    tokenizer = corpus.origin.tokenizer
    at = 0
    for token, size in zip(corpus.heldout_N, corpus.heldout_size_M, strict=True):
        own = text[at : at + size]
        at += int(size)
        if token == corpus.separator:
            assert own == b"\0"
        elif all(byte < 128 for byte in own):
            assert tokenizer.token_text()[token] == escaped(own.decode())
    assert at == len(text)
    assert corpus.origin.split is not None
    documents = len(corpus.origin.split.train)
    assert (corpus.train_N == corpus.separator).sum() == documents - 1


def test_a_corpus_cannot_be_changed_by_assignment(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_corpus(str(folder)).vocab_size = 3  # type: ignore[misc]


def test_a_missing_path_is_an_error_that_names_it():
    with pytest.raises(UserError, match="data.path: cannot read '/no/such/text'"):
        load_corpus("/no/such/text")
