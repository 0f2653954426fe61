"""Finding files, splitting them, cutting them into pieces."""

import os
import pathlib

import pytest

from moejax.data.documents import Document, find_documents, piece_batches, pieces
from moejax.errors import UserError


def write(root: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


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


def test_an_unreadable_path_is_an_error_that_names_it(tmp_path):
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
