"""Near copies among documents, and the overlap of two sides, against counting in Python."""

import pathlib

import numpy as np
import pytest

from moejax.data import duplicates
from moejax.data.documents import find_documents
from moejax.data.duplicates import overlap, window_hashes, without_copies
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare

RNG = np.random.default_rng(0)


def letters(count: int, rng=RNG) -> bytes:
    return rng.integers(97, 123, count, dtype=np.uint8).tobytes()


def documents_of(root: pathlib.Path, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return find_documents(str(root))


def shared_bytes(train: list[bytes], heldout: list[bytes], window: int) -> float:
    """The definition, by sets of strings."""
    known = {text[i : i + window] for text in train for i in range(len(text) - window + 1)}
    covered = 0
    for text in heldout:
        inside = np.zeros(len(text), bool)
        for i in range(len(text) - window + 1):
            if text[i : i + window] in known:
                inside[i : i + window] = True
        covered += int(inside.sum())
    return covered / sum(map(len, heldout))


@pytest.mark.parametrize("width", [1, 2, 3, 32, 50, 63])
def test_equal_windows_have_equal_hashes(width):
    text = np.random.default_rng(1).integers(0, 3, 500).astype(np.uint8)
    hashes = window_hashes(text, width)
    windows = [text[i : i + width].tobytes() for i in range(len(text) - width + 1)]
    assert len(hashes) == len(windows)
    pairs = {(h, w) for h, w in zip(hashes.tolist(), windows, strict=True)}
    assert len(pairs) == len(set(windows)) == len(set(hashes.tolist()))
    assert len(window_hashes(text[: width - 1], width)) == 0


def test_the_overlap_is_the_share_of_held_out_bytes_in_windows_of_the_training_text(tmp_path):
    shared = letters(400)
    train = {"train/a": letters(300) + shared[:120] + letters(100), "train/b": shared[300:]}
    held = {"heldout/a": letters(90) + shared + letters(10), "heldout/b": letters(49)}
    documents = documents_of(tmp_path, train | held)
    sides = [[d for d in documents if d.name.startswith(side)] for side in ("train", "heldout")]
    found = overlap(*sides)
    assert found.share == shared_bytes(list(train.values()), list(held.values()), 50)
    assert 0.39 < found.share < 0.42  # 220 of 549
    sizes = (sum(map(len, train.values())), sum(map(len, held.values())))
    assert (found.train_bytes, found.heldout_bytes) == sizes and found.complete


def test_a_window_across_two_stretches_is_found(tmp_path, monkeypatch):
    text = letters(1000)
    documents = documents_of(tmp_path, {"train": text, "held": text[230:290]})
    monkeypatch.setattr(duplicates, "STRETCH", 256)
    assert overlap(documents[1:], documents[:1]).share == 1.0


def test_a_large_text_is_compared_in_evenly_spread_stretches_and_marked_incomplete(
    tmp_path, monkeypatch
):
    files = {f"train/{i}": letters(900) for i in range(40)}
    documents = documents_of(tmp_path, files | {"held": files["train/0"] + files["train/39"]})
    monkeypatch.setattr(duplicates, "STRETCH", 300)
    monkeypatch.setattr(duplicates, "MOST_TRAIN", 9_000)
    found = overlap([d for d in documents if d.name != "held"], documents[:1])
    assert not found.complete and 9_000 <= found.train_bytes <= 9_300
    assert 0.15 < found.share < 0.5  # a third, or a quarter, of either


def test_near_copies_are_left_out_and_the_larger_one_stays(tmp_path):
    table = letters(6000)
    changed = bytearray(table)
    changed[3000:3300] = letters(300)
    files = {
        "a.txt": bytes(changed),  # 95 % a copy of the larger table
        "b.txt": table + letters(500),
        "exact.txt": table + letters(0),
        "other.txt": letters(6000),
        "half.txt": table[:3000] + letters(3000),
    }
    related = without_copies(documents_of(tmp_path, files))
    assert related.copies == ("a.txt", "exact.txt")
    assert [d.name for d in related.documents] == ["b.txt", "half.txt", "other.txt"]
    groups = related.groups  # half a table in common: one side of a split
    assert groups["half.txt"] == groups["b.txt"] != groups["other.txt"]


def test_a_folder_is_a_group(tmp_path):
    files = {name: letters(200) for name in ("p/a", "p/q/b", "r/a", "s")}
    groups = without_copies(documents_of(tmp_path, files)).groups
    assert groups["p/a"] == groups["p/q/b"]
    assert len(set(groups.values())) == 3


def test_copies_and_groups_do_not_depend_on_the_order(tmp_path):
    base = letters(3000)
    files = {f"{i}": base[i * 40 : i * 40 + 2000] + letters(200) for i in range(12)}
    documents = documents_of(tmp_path, files)
    first, again = without_copies(documents), without_copies(documents[::-1])
    assert set(first.copies) == set(again.copies) and len(first.copies) > 1


def test_a_corpus_and_its_shards_have_the_same_overlap(tmp_path):
    half = letters(2000)
    documents_of(tmp_path / "text", {"train/a": half, "val/b": half[:1000] + letters(1000)})
    corpus = load_corpus(str(tmp_path / "text"))
    assert corpus.overlap is not None
    assert corpus.overlap.share == pytest.approx(0.5, abs=0.002)
    prepare(str(tmp_path / "text"), "", str(tmp_path / "shards"))
    assert load_corpus(str(tmp_path / "shards")).overlap == corpus.overlap
