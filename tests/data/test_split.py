"""The choice of held-out documents."""

import hashlib
import pathlib

import pytest

from moejax.data.documents import Document, find_documents
from moejax.data.load import load_corpus
from moejax.data.split import named_sides, open_text, split_documents
from moejax.errors import UserError


def sized(*sizes: int) -> list[Document]:
    return [Document(f"{i}.txt", f"/nowhere/{i}.txt", size) for i, size in enumerate(sizes)]


def write(root: pathlib.Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def names(documents) -> set[str]:
    return {document.name for document in documents}


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "sizes",
    [
        [100] * 100,
        [10_000] + [10] * 50,  # of 50 small files, half a share
        [9_000, 9_000],
        list(range(1, 200, 3)),
        [7_500_000, *[54] * 50],
    ],
)
def test_the_share_is_a_share_of_the_bytes(tmp_path, sizes, fraction):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * size)
    documents = find_documents(str(tmp_path))
    split = split_documents(documents, fraction)
    train, heldout = (sum(d.size for d in side) for side in (split.train, split.heldout))
    assert train + heldout == sum(sizes) and min(train, heldout) > 0
    assert 0.9 * fraction * sum(sizes) - 1 <= heldout <= fraction * sum(sizes) + 1
    cut = names(split.train) & names(split.heldout)
    assert len(cut) <= 1  # of every other document both sides have all or nothing
    for side in (split.train, split.heldout):
        assert list(side) == sorted(side, key=lambda d: d.name)


def test_the_split_depends_on_names_and_sizes_alone_and_adding_a_file_moves_few():
    documents = sized(*[100] * 100)
    heldout = names(split_documents(documents, 0.1).heldout)
    assert len(heldout) == 10
    shuffled = [Document(d.name, "/elsewhere", 100) for d in reversed(documents)]
    assert names(split_documents(shuffled, 0.1).heldout) == heldout
    moved = 0
    for extra in range(30):
        after = names(split_documents([*documents, Document(f"new{extra}", "/", 100)], 0.1).heldout)
        assert len(heldout - after) <= 1
        moved += len(heldout - after)
    assert moved > 0  # some additions do displace a file


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match="data.eval_fraction"):
        split_documents(sized(10, 10, 10), fraction)


def test_a_single_file_is_cut_at_its_tail_between_characters(tmp_path):
    text = "\u00e9" * 50
    root = write(tmp_path, {"a.txt": text})
    split = split_documents(find_documents(root), 0.05)  # 5 of 100 bytes: inside a character
    head, tail = split.train[0].read(), split.heldout[0].read()
    assert (head + tail).decode() == text
    assert len(tail) == 6
    assert len(head.decode()) == 47


def test_a_file_of_one_byte_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="1 byte"):
        split_documents(find_documents(write(tmp_path, {"a.txt": "x"})), 0.5)


def test_a_group_stays_on_one_side():
    documents = sized(*[100] * 60)
    groups = {d.name: f"group {int(d.name[:-4]) // 4}" for d in documents}
    split = split_documents(documents, 0.2, groups)
    held = {groups[d.name] for d in split.heldout}
    assert len(held) == 3 and len(split.heldout) == 12
    assert not held & {groups[d.name] for d in split.train}
    # With groups larger than the share the nearest whole number of them is held out.
    halves = {d.name: f"half {int(d.name[:-4]) // 30}" for d in documents}
    assert len(split_documents(documents, 0.3, halves).heldout) == 30


@pytest.mark.parametrize(
    "files, train, heldout",
    [
        (["train/a", "train/b/c", "validation/a"], {"train/a", "train/b/c"}, {"validation/a"}),
        (["train/a", "valid/a", "test/a"], {"train/a"}, {"valid/a"}),
        (["training/a", "test/a", "README.md"], {"training/a"}, {"test/a"}),
        (["en/train/a", "en/dev/a"], {"en/train/a"}, {"en/dev/a"}),
        (
            ["de/train.txt", "en/train/test/a", "de/val.txt"],
            {"de/train.txt", "en/train/test/a"},
            {"de/val.txt"},
        ),
        (["train.txt", "val.txt", "test.txt"], {"train.txt"}, {"val.txt"}),
        (["wiki.train.tokens", "wiki.valid.tokens"], {"wiki.train.tokens"}, {"wiki.valid.tokens"}),
        (
            ["train-00000-of-00002.txt", "train-00001-of-00002.txt", "dev.txt"],
            {"train-00000-of-00002.txt", "train-00001-of-00002.txt"},
            {"dev.txt"},
        ),
    ],
)
def test_the_names_train_and_validation_are_respected(tmp_path, files, train, heldout):
    root = write(tmp_path, {name: ("R" if name == "README.md" else "text " * 40) for name in files})
    split = open_text(root, 0.05).split
    assert (names(split.train), names(split.heldout)) == (train, heldout)
    assert split.unread == len(files) - len(train) - len(heldout)


@pytest.mark.parametrize(
    "files",
    [
        ["train/a", "b", "c"],  # half a split
        ["train_model.txt", "test_model.txt", "validate.txt"],  # other words
        ["train/a", "test/a", "src/a", "src/b"],  # most lies beside them
    ],
)
def test_other_names_are_split_by_a_hash(tmp_path, files):
    documents = find_documents(write(tmp_path, {name: "text " * 40 for name in files}))
    assert named_sides(documents) is None
    split = split_documents(documents, 0.5)
    assert names(split.train) | names(split.heldout) == set(files)


def test_a_separate_held_out_text_is_held_out_and_not_trained_on(tmp_path):
    root = write(tmp_path, {"t/a.txt": "a" * 50, "t/b.txt": "b" * 50, "own.txt": "c" * 50})
    corpus = load_corpus(f"{root}/t", eval_path=f"{root}/own.txt")
    assert set(corpus.heldout_N.tolist()) == {ord("c")}
    assert set(corpus.train_N.tolist()) == {ord("a"), 0, ord("b")}
    inside = load_corpus(f"{root}/t", eval_path=f"{root}/t/b.txt")
    assert set(inside.heldout_N.tolist()) == {ord("b")} and len(inside.train_N) == 50
    with pytest.raises(UserError, match="data.eval_path: .*nothing is left"):
        load_corpus(f"{root}/t", eval_path=f"{root}/t")
    with pytest.raises(UserError, match="data.eval_path: cannot read '.*none'"):
        load_corpus(f"{root}/t", eval_path=f"{root}/none")


def test_with_a_separate_held_out_text_only_the_train_folder_is_trained_on(tmp_path):
    files = {"t/train/a": "a" * 50, "t/test/a": "b" * 50, "own.txt": "c" * 50}
    root = write(tmp_path, files)
    split = open_text(f"{root}/t", 0.05, f"{root}/own.txt").split
    assert (names(split.train), names(split.heldout)) == ({"train/a"}, {"own.txt"})
    assert split.unread == 1


def test_a_split_by_documents_equals_that_of_version_0_1_0(tmp_path: pathlib.Path):
    """The rule of version 0.1.0: the smallest SHA-256 of its salt and the names, whatever the
    names say and however large the documents are."""
    paths = [f"train/{n}.txt" for n in range(12)] + ["validation/a.txt", "b.txt"]
    write(tmp_path, {path: "x" * (1 + 50 * n) for n, path in enumerate(paths)})
    split = open_text(str(tmp_path), 0.2, unit="documents").split
    salt = b"moejax held-out split 1\0"
    ranked = sorted(paths, key=lambda path: hashlib.sha256(salt + path.encode()).digest())
    assert names(split.heldout) == {*ranked[:3]}  # round(0.2 x 14)
    assert names(split.train) == {*ranked[3:]}
