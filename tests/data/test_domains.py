"""Domain labels, against Python's own tokenizer and parser."""

import ast
import dataclasses
import io
import time
import tokenize

import numpy as np
import pytest

from moejax.data.builtin import TOPICS, builtin_documents
from moejax.data.domains import (
    CODE,
    COMMENT,
    DOCSTRING,
    ENGLISH,
    NAMES,
    heldout_labels,
    label_bytes,
    token_labels,
)
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.json_file import JsonTokenizer
from moejax.errors import UserError

CASES = {
    "module": '#!/bin/sh\n# c\n\n"""doc""" # after\nx = "code"\n"not doc"\n',
    "raw_and_unicode": 'def f():\n    R"""d\\d"""\nclass A: u"d"\n',
    "not_docstrings": 'def f():\n    f"{x}"\ndef g():\n    b"b"\ndef h():\n    "a".join(x)\n',
    "operator": 'def f():\n    "a" % x\ndef g():\n    "a", "b"\ndef h():\n    x = "a"\n',
    "same_line": 'def f(): "d"; x = 1\nclass A: "d"\n',
    "header": "def f(a: 'int' = {1: ':'}[1], # c: \"d\"\n b=lambda: 0) -> 'x':\n  # c\n\n  'd'\n",
    "joined": 'def f():\n    "a" "b" \\\n    "c"\n    "d"\n',
    "hash_in_string": 'x = "# no"\ny = \'"\' # "yes"\nz = """\n# no\n"""\n',
    "escapes": 'x = "\\"#"\ny = \'\\\\\' # yes\nz = r"\\" # no"\nw = """\\"""#"""\n',
    "prefix": 'def f():\n    return"code"\nx = 1 if"a"else"b" # c\n',
    "windows": 'def f():\r\n    """a\r\n    b"""\r\n    # c\r\n    return "x\\\r\ny"\r\n',
    "nested": 'async def f():\n  "d"\n  class A(B[x]):\n\n    "d"\n    def g(a={}):\n      "d"\n',
    "not_utf8_ascii": '# é\ndef f():\n    """日本"""\n    return "é" # 🙂\n',
    "decorated": '@d(":")\nclass A:\n    # c\n    """d"""\n    x: int = 1\n    """not"""\n',
    "empty_strings": 'def f():\n    ""\nx = \'\' or """""" # c\n',
}  # fmt: skip


def labels_by_python(source: bytes) -> np.ndarray:
    """The same labels from tokenize and ast."""
    starts = np.cumsum([0] + [len(line) + 1 for line in source.split(b"\n")])
    labels = np.full(len(source), CODE, dtype=np.uint8)
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            begin = starts[token.start[0] - 1] + len(token.line[: token.start[1]].encode())
            labels[begin : begin + len(token.string.encode())] = COMMENT
    for node in ast.walk(ast.parse(source)):
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            assert doc.end_lineno is not None and doc.end_col_offset is not None
            begin = starts[doc.lineno - 1] + doc.col_offset
            labels[begin : starts[doc.end_lineno - 1] + doc.end_col_offset] = DOCSTRING
    return labels


@pytest.mark.parametrize("name", CASES)
def test_labels_agree_with_pythons_parser_on_hard_cases(name):
    source = CASES[name].encode()
    expected = labels_by_python(source)
    assert len(np.unique(expected)) > 1 or name in ("not_docstrings", "operator")
    np.testing.assert_array_equal(label_bytes(source), expected)


@pytest.mark.parametrize("name", ["argparse.py", "inspect.py", "tokenize.py", "idlelib/editor.py"])
def test_labels_agree_with_pythons_parser_on_the_library(name):
    documents = [document for document in builtin_documents() if document.name == name]
    if not documents:
        pytest.skip(f"this Python ships no {name}")
    source = documents[0].read()
    expected = labels_by_python(source)
    assert set(np.unique(expected)) == {CODE, COMMENT, DOCSTRING}
    np.testing.assert_array_equal(label_bytes(source), expected)


@pytest.mark.slow
def test_labels_agree_with_pythons_parser_on_the_whole_library():
    for document in builtin_documents():
        source = document.read()
        np.testing.assert_array_equal(label_bytes(source), labels_by_python(source), document.name)


def test_every_string_except_docstrings_is_english():
    source = b'"""doc"""\ntopics = {\'a\': r"text" # c\n}\n'
    labels = label_bytes(source, strings_are_english=True)
    text = {name: bytes(b for b, i in zip(source, labels, strict=True) if i == n)
            for n, name in enumerate(NAMES)}  # fmt: skip
    assert text["english"] == b"'a'r\"text\""
    assert (text["docstring"], text["comment"]) == (b'"""doc"""', b"# c")


@pytest.mark.parametrize(
    "source", [b"", b"'", b'"""', b"def f(:\n'''", b"\xff\x00\\", b"class", b"#", b'"\\']
)
def test_bytes_that_are_not_python_get_labels_too(source):
    assert label_bytes(source).shape == (len(source),)


@pytest.mark.slow
def test_labelling_is_fast_on_source_and_linear_on_hostile_input():
    source = b"\n".join(document.read() for document in builtin_documents()[:60])
    quoted = [quote + b'\\"' * 200_000 for quote in (b"'''", b"'", b'"', b"", b'""')]
    hostile = [*quoted, b"def\n" * 100_000, b"class(" * 50_000, b"\\" * 400_000]
    for text, least in ((source, 3e6), *((text, 4e4) for text in hostile)):  # bytes per second
        begin = time.process_time()
        label_bytes(text)
        assert len(text) / (time.process_time() - begin) > least


@pytest.fixture(scope="module")
def python_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("python")
    for i, name in enumerate(CASES):
        (root / f"{i}.py").write_bytes(CASES[name].encode())
    (root / "pydoc_data").mkdir()
    (root / TOPICS).write_text("topics = {'a': 'An English text.'}\n")
    return root


def test_token_labels_are_aligned_with_a_corpus_of_bytes(python_files):
    corpus = load_corpus(str(python_files), eval_fraction=0.3)
    for tokens, labels in zip(
        (corpus.train_N, corpus.heldout_N), token_labels(corpus), strict=True
    ):
        assert labels.shape == tokens.shape
        stream = tokens.astype(np.uint8).tobytes()
        at = 0
        for source in stream.split(b"\0"):
            expected = label_bytes(source, strings_are_english=source.startswith(b"topics"))
            np.testing.assert_array_equal(labels[at : at + len(source)], expected)
            at += len(source) + 1
        assert (labels[tokens == 0] == CODE).all()


def test_a_token_has_the_label_of_its_first_byte(python_files, tmp_path):
    train_bpe(str(python_files), 320, str(tmp_path / "t.json"), eval_fraction=0.3)
    corpus = load_corpus(str(python_files), str(tmp_path / "t.json"), 0.3)
    as_bytes = load_corpus(str(python_files), eval_fraction=0.3)
    assert len(corpus.train_N) < len(as_bytes.train_N)
    sizes = JsonTokenizer(str(tmp_path / "t.json")).token_bytes()
    first = np.cumsum(sizes[corpus.train_N]) - sizes[corpus.train_N]
    labels = token_labels(corpus)[0]
    np.testing.assert_array_equal(labels, token_labels(as_bytes)[0][first])
    assert len(np.unique(labels)) >= 3


@pytest.mark.slow
def test_the_built_in_corpus_has_all_four_domains():
    corpus = load_corpus()
    train, heldout = token_labels(corpus)
    assert (train.shape, heldout.shape) == (corpus.train_N.shape, corpus.heldout_N.shape)
    shares = np.bincount(train, minlength=4) / len(train)
    assert (shares[[CODE, COMMENT, DOCSTRING]] > 0.05).all()
    if any(document.name == TOPICS for document in builtin_documents()):
        assert shares[ENGLISH] > 0.01


def test_labels_are_refused_where_there_is_no_python_source(python_files, tmp_path):
    (tmp_path / "notes.txt").write_text("words " * 20)
    with pytest.raises(UserError, match="notes.txt' is not Python source"):
        token_labels(load_corpus(str(tmp_path)))
    prepare(str(python_files), "", str(tmp_path / "shards"))
    with pytest.raises(UserError, match="holds tokens only"):
        token_labels(load_corpus(str(tmp_path / "shards")))


def test_labels_are_refused_when_the_source_has_changed(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n" * 5)
    corpus = load_corpus(str(tmp_path))
    (tmp_path / "1.py").write_text("x = 1\n" * 4)
    with pytest.raises(UserError, match="became shorter"):
        token_labels(corpus)


def test_labels_of_the_held_out_side_alone_equal_those_of_both_or_are_absent(
    python_files, tmp_path
):
    corpus = load_corpus(str(python_files), eval_fraction=0.3)
    np.testing.assert_array_equal(heldout_labels(corpus), token_labels(corpus)[1])
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x = 1 # not a Python file\n")
    without = load_corpus(str(tmp_path), eval_fraction=0.4)
    assert heldout_labels(without) is None
    with pytest.raises(UserError):
        token_labels(without)
    assert heldout_labels(dataclasses.replace(corpus, origin=None)) is None
