"""The default corpus."""

import pathlib
import time

import pytest

from moejax.data.builtin import TOPICS, builtin_documents, builtin_text
from moejax.data.load import load_corpus
from moejax.data.split import open_text
from moejax.errors import UserError


def test_it_is_the_library_source_without_tests_and_packages(tmp_path):
    for name in [
        "os.py", "json/decoder.py", "doctest.py", "test/test_os.py", "unittest/test/t.py",
        "idlelib/idle_test/t.py", "lib2to3/tests/t.py", "site-packages/jax/core.py", "LICENSE.txt",
        "dist-packages/x.py", "json/__pycache__/d.py", "_sysconfigdata__linux_.py", "config-3/c.py",
    ]:  # fmt: skip
        path = pathlib.Path(tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    names = [document.name for document in builtin_documents(str(tmp_path))]
    assert names == ["doctest.py", "json/decoder.py", "os.py"]


def test_the_running_python_has_several_megabytes_of_it():
    documents = builtin_documents()
    assert sum(document.size for document in documents) > 3_000_000
    names = {document.name for document in documents}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any("test" in name.split("/")[:-1] for name in names)


def test_it_loads_in_seconds_with_its_copies_found():
    load_corpus()  # the first read may wait for the disk
    builtin_text.cache_clear()
    begin = time.process_time()
    corpus = load_corpus()
    assert time.process_time() - begin < 3.0  # 0.7 where nothing else runs
    assert len(corpus.train_N) > 10 * len(corpus.heldout_N) > 1_000_000


def test_its_held_out_side_does_not_copy_its_training_side():
    """As files by a hash of their names, 24.5 % of it (Python 3.11.7) was."""
    corpus = load_corpus()
    assert corpus.overlap is not None and corpus.overlap.complete
    assert corpus.overlap.share < 0.08
    assert corpus.facts.copies == len(builtin_text().copies) > 10
    kept = {document.name for document in builtin_text().documents}
    assert not kept & set(builtin_text().copies)
    tables = [name for name in builtin_text().copies if name.startswith("encodings/")]
    assert len(tables) > 10  # most of them


def test_a_package_stays_on_one_side():
    split = open_text("", 0.05).split
    train, heldout = (
        {d.name.split("/")[0] for d in side if "/" in d.name}
        for side in (split.train, split.heldout)
    )
    assert heldout and not train & heldout
    sizes = [sum(d.size for d in side) for side in (split.train, split.heldout)]
    assert 0.04 < sizes[1] / sum(sizes) < 0.06


def test_the_english_topics_are_trained_on_and_no_file_dominates_the_heldout_text():
    documents = builtin_documents()
    split = open_text("", 0.05).split
    if TOPICS in {document.name for document in documents}:
        assert TOPICS in {document.name for document in split.train}
    sizes = [document.size for document in split.heldout]
    assert max(sizes) < 0.5 * sum(sizes)


def test_a_python_without_sources_asks_for_a_path(tmp_path):
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(UserError, match="data.path"):
            builtin_documents(str(root))
    (tmp_path / "only.pyc").write_bytes(b"x")
    with pytest.raises(UserError, match="no library source .* set data.path to a file or folder"):
        builtin_documents(str(tmp_path))
