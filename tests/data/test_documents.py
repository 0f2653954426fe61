"""Finding files, splitting them, cutting them into pieces."""

import os
import pathlib

import pytest

from moejax.data.documents import Document, find_documents, piece_batches, pieces, split_documents
from moejax.errors import UserError


def write(root: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def named(count: int) -> list[Document]:
    return [Document(f"{i}.txt", f"/nowhere/{i}.txt", 10) for i in range(count)]


def test_a_folder_gives_its_visible_files_sorted_by_relative_path(tmp_path):
    files = {"b.txt": b"b", "a/z.txt": b"z", "a.txt": b"a", ".git/x": b"x", "a/.h": b"h", "e": b""}
    documents = find_documents(write(tmp_path, files))
    assert [document.name for document in documents] == ["a.txt", "a/z.txt", "b.txt"]
    assert [document.read() for document in documents] == [b"a", b"z", b"b"]


def test_links_to_files_are_read_and_links_to_folders_are_not_followed(tmp_path):
    root = write(tmp_path / "corpus", {"a": b"a"})
    outside = write(tmp_path / "outside", {"t": b"text"})
    os.symlink(os.path.join(outside, "t"), os.path.join(root, "linked"))
    os.symlink(root, os.path.join(root, "loop"))
    assert [document.name for document in find_documents(root)] == ["a", "linked"]


def test_a_single_file_is_one_document(tmp_path):
    path = os.path.join(write(tmp_path, {"a.txt": b"text"}), "a.txt")
    assert find_documents(path) == [Document("a.txt", path, 4)]


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="data.path: cannot read '.*nothing': No such file"):
        find_documents(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="data.path: '.*empty' holds no text"):
        find_documents(str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.path: '.*file' holds no text"):
        find_documents(str(tmp_path / "file"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="'.*pipe' is neither a file nor a folder"):
        find_documents(str(tmp_path / "pipe"))
    os.symlink("gone", tmp_path / "broken")
    with pytest.raises(UserError, match="data.path: cannot read '.*broken': No such file"):
        find_documents(str(tmp_path))


def test_a_file_that_vanishes_or_shrinks_before_it_is_read_is_an_error(tmp_path):
    root = write(tmp_path, {"a": b"aaaa", "b": b"bbbb"})
    a, b = find_documents(root)
    (tmp_path / "a").write_bytes(b"aa")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="'.*a' became shorter"):
        a.read()
    with pytest.raises(UserError, match="cannot read '.*b'"):
        b.read()


@pytest.mark.parametrize("count, fraction, heldout", [(100, 0.05, 5), (2, 0.9, 1), (3, 0.01, 1)])
def test_the_split_holds_out_the_fraction_and_leaves_both_sides_a_file(count, fraction, heldout):
    documents = named(count)
    split = split_documents(documents, fraction)
    assert len(split.heldout) == heldout
    assert sorted(split.train + split.heldout, key=documents.index) == documents
    assert not set(split.train) & set(split.heldout)


def test_the_split_depends_on_names_only_and_adding_a_file_moves_at_most_one():
    documents = named(100)
    heldout = {document.name for document in split_documents(documents, 0.1).heldout}
    shuffled = [Document(d.name, "/elsewhere", 99) for d in reversed(documents)]
    assert {document.name for document in split_documents(shuffled, 0.1).heldout} == heldout
    moved = 0
    for extra in range(30):
        more = [*documents, Document(f"new{extra}", "/nowhere", 10)]
        after = {document.name for document in split_documents(more, 0.1).heldout}
        assert len(heldout - after) <= 1
        moved += len(heldout - after)
    assert moved > 0  # some additions do displace a file


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match="data.eval_fraction"):
        split_documents(named(3), fraction)


def test_a_single_file_is_cut_at_its_tail_between_characters(tmp_path):
    text = "é" * 50
    root = write(tmp_path, {"a.txt": text.encode()})
    split = split_documents(find_documents(root), 0.05)  # 5 of 100 bytes: inside an é
    head, tail = split.train[0].read(), split.heldout[0].read()
    assert (head + tail).decode() == text
    assert len(tail) == 6
    assert len(head.decode()) == 47


def test_a_file_of_one_byte_cannot_be_split(tmp_path):
    root = write(tmp_path, {"a.txt": b"x"})
    with pytest.raises(UserError, match="1 byte"):
        split_documents(find_documents(root), 0.5)


def test_pieces_join_to_the_documents_and_end_after_lines_or_characters(tmp_path):
    texts = {"lines": b"one\ntwo\nthree\n" * 20, "accents": "é".encode() * 100, "raw": b"\x80" * 90}
    documents = find_documents(write(tmp_path, texts))
    found = list(pieces(documents, max_bytes=33))
    assert max(len(piece.data) for piece in found) <= 33
    for document in documents:
        own = [piece for piece in found if piece.document is document]
        assert b"".join(piece.data for piece in own) == texts[document.name]
        assert [piece.is_first for piece in own] == [True] + [False] * (len(own) - 1)
        assert 2 < len(own) < 15
        if document.name == "lines":
            assert all(piece.data.endswith(b"\n") for piece in own)
        if document.name == "accents":
            assert all(piece.data.decode() for piece in own)


def test_piece_batches_hold_all_pieces_in_order(tmp_path):
    documents = find_documents(write(tmp_path, {f"{i}": b"12345" for i in range(7)}))
    batches = list(piece_batches(documents, max_bytes=10))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert [piece for batch in batches for piece in batch] == list(pieces(documents))
