"""Files of records as a corpus: the same in memory and prepared, however it is divided."""

import functools
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax.data import documents, encode, units
from moejax.data.corpus import Corpus
from moejax.data.load import Wanted, load_corpus, training_pieces
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from tests.written import json_lines, write_all

TEXTS = [f"document {i} " + "and its words " * (i % 7) + "\u00e9\u4e16" for i in range(60)]


def write_lines(path: Path, texts, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    path = write_lines(folder / "a.jsonl", TEXTS)
    train_bpe(str(path), 300, str(folder / "bpe.json"))
    return str(folder / "bpe.json")


def documents_of(corpus: Corpus, tokenizer: str = "") -> tuple[list[str], list[str]]:
    """The texts of both sides, cut out of the streams at the starts."""
    loaded = load_tokenizer(tokenizer)
    sides = []
    for token_N, start_D in (
        (corpus.train_N, corpus.train_start_D),
        (corpus.heldout_N, corpus.heldout_start_D),
    ):
        assert start_D is not None and start_D[0] == 0
        assert np.all(np.asarray(token_N)[start_D[1:] - 1] == corpus.separator)
        ends = [*(start_D[1:] - 1).tolist(), len(token_N)]
        skipped = len(corpus.opening)
        sides.append(
            [
                loaded.decode(token_N[begin + skipped : end].tolist())
                for begin, end in zip(start_D.tolist(), ends, strict=True)
            ]
        )
    return sides[0], sides[1]


def same(a: Corpus, b: Corpus) -> None:
    np.testing.assert_array_equal(a.train_N, b.train_N)
    for name in ("heldout_N", "heldout_size_M", "train_start_D", "heldout_start_D"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("fingerprint", "vocab_size", "separator", "opening", "facts", "overlap"):
        assert getattr(a, name) == getattr(b, name)


# ---------------------------------------------------------------- one corpus, however read


def test_every_format_gives_the_same_corpus_in_memory_and_prepared(tmp_path, bpe):
    files = write_all(tmp_path, TEXTS)
    expected = None
    for number, path in enumerate(files.values()):
        loaded = load_corpus(str(path), bpe, 0.2)
        train, heldout = documents_of(loaded, bpe)
        assert sorted(train + heldout) == sorted(TEXTS)
        assert [t for t in TEXTS if t in train] == train, "in the order of the file"
        expected = expected or loaded.fingerprint
        assert loaded.fingerprint == expected, path.name
        if number % 8 == 0:
            prepare(str(path), bpe, str(tmp_path / f"out{number}"), 0.2)
            same(load_corpus(str(tmp_path / f"out{number}")), loaded)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    unit=st.integers(1, 3000),
    chunk=st.integers(1, 3000),
    piece=st.integers(4, 200),
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=15),
)
def test_units_chunks_and_pieces_of_any_size_give_the_same_corpus(
    tmp_path_factory, bpe, unit, chunk, piece, texts
):
    texts = [text.encode("utf-8", "ignore").decode().replace("\0", "") for text in texts]
    texts = [*texts, "first always", "second always", *texts[:3]]
    folder = tmp_path_factory.mktemp("sizes")
    write_lines(folder / "text" / "a.jsonl", texts)
    (folder / "text" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[:2] + ["third"])))
    path = str(folder / "text")
    whole = load_corpus(path, "", 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT", unit)
        patch.setattr(encode, "CHUNK", chunk)
        patch.setattr(encode, "BATCH", chunk)
        patch.setattr(encode, "cut", functools.partial(documents.cut, max_bytes=piece))
        cut = load_corpus(path, "", 0.3)
        same(cut, whole)
        prepare(path, "", str(folder / "out"), 0.3)
        same(load_corpus(str(folder / "out")), whole)
        train, heldout = documents_of(load_corpus(path, bpe, 0.3), bpe)
    assert sorted(train + heldout) == sorted({*texts, "third"} - {""})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "ignore"))
    ),
    st.integers(4, 50),
)
def test_files_read_in_pieces_are_cut_as_in_memory(tmp_path_factory, lines, size):
    data = b"\n".join(lines) + b"."
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(data)
    for start in (0, len(data) // 2):
        file = documents.Document("a.txt", str(path), len(data) - start, start)
        read = list(documents.pieces([file], size))
        assert read == list(documents.cut(file, data[start:], size))
        assert b"".join(piece.data for piece in read) == data[start:]


def test_plain_text_in_small_chunks_is_the_same_corpus(tmp_path, monkeypatch, bpe):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"text {i} \u4e16\u754c\n" * (3 * i + 1))
    whole, tokens = load_corpus(str(tmp_path)), load_corpus(str(tmp_path), bpe)
    monkeypatch.setattr(encode, "CHUNK", 100)
    monkeypatch.setattr(units, "UNIT", 150)
    monkeypatch.setattr(encode, "pieces", functools.partial(documents.pieces, max_bytes=64))
    same(load_corpus(str(tmp_path)), whole)
    assert documents_of(load_corpus(str(tmp_path), bpe), bpe) == documents_of(tokens, bpe)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_processes_make_the_same_shards_as_one(tmp_path, monkeypatch, bpe):
    for number in range(9):
        write_lines(tmp_path / "text" / f"{number}.jsonl", TEXTS[number::9])
    path = str(tmp_path / "text")
    for name, tokenizer in (("bytes", ""), ("bpe", bpe)):
        for workers in (1, 3):
            prepare(path, tokenizer, str(tmp_path / f"{name}{workers}"), 0.2, workers=workers)
        for file in (tmp_path / f"{name}1").iterdir():
            assert file.read_bytes() == (tmp_path / f"{name}3" / file.name).read_bytes()
        same(load_corpus(str(tmp_path / f"{name}3")), load_corpus(path, tokenizer, 0.2))


# ---------------------------------------------------------------- copies and sides


def test_copies_are_left_out_on_both_sides_and_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*TEXTS, *TEXTS[:10], *TEXTS[:5]])
    corpus = load_corpus(str(path), "", 0.2)
    train, heldout = documents_of(corpus)
    assert sorted(train + heldout) == sorted(TEXTS)
    assert corpus.facts.duplicates == 15


def test_kept_copies_are_never_on_both_sides(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*TEXTS, *TEXTS, *TEXTS[:5]])
    corpus = load_corpus(str(path), "", 0.2, duplicates="keep")
    train, heldout = documents_of(corpus)
    assert not set(train) & set(heldout)
    assert Counter(train + heldout) == Counter([*TEXTS, *TEXTS, *TEXTS[:5]])
    assert corpus.facts.duplicates == 0


def test_a_held_out_document_is_not_trained_on(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    own = write_lines(tmp_path / "own.jsonl", [TEXTS[3], "only here", TEXTS[3]])
    corpus = load_corpus(str(path), eval_path=str(own))
    train, heldout = documents_of(corpus)
    assert heldout == [TEXTS[3], "only here"]
    assert train == [text for text in TEXTS if text != TEXTS[3]]
    assert corpus.facts.duplicates == 2


def test_plain_text_has_its_copies_left_out_too(tmp_path):
    for name in ("train/a", "train/b", "train/c", "val/d", "val/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        same = name in ("train/b", "val/d", "val/e")
        (tmp_path / f"{name}.txt").write_text("the same" if same else f"text of {name}")
    corpus = load_corpus(str(tmp_path))
    assert documents_of(corpus) == (["text of train/a", "text of train/c"], ["the same"])
    assert corpus.facts.duplicates == 2


def test_the_held_out_text_may_have_another_format(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "own.txt").write_text("a plain text")
    assert documents_of(load_corpus(str(path), eval_path=str(tmp_path / "own.txt")))[1] == [
        "a plain text"
    ]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("trained on")
    corpus = load_corpus(str(tmp_path / "plain"), eval_path=str(path))
    assert documents_of(corpus) == (["trained on"], TEXTS)
    assert corpus.facts.formats == {"text": 1, "JSON lines": 1}


def test_named_sides_of_parquet_files_are_used(tmp_path):
    files = write_all(tmp_path, TEXTS)
    folder = tmp_path / "saved"
    folder.mkdir()
    os.link(files["groups.parquet"], folder / "train-00000-of-00001.parquet")
    (tmp_path / "other").mkdir()
    other = write_all(tmp_path / "other", ["held out", "too"])
    os.link(other["plain.parquet"], folder / "validation-00000-of-00001.parquet")
    os.link(other["plain.parquet"], folder / "test-00000-of-00001.parquet")
    corpus = load_corpus(str(folder))
    assert documents_of(corpus) == (TEXTS, ["held out", "too"])
    assert corpus.facts.split == "what is called 'validation'"
    assert corpus.facts.unread_documents == 1


# ---------------------------------------------------------------- paths


def test_a_readme_beside_records_is_not_read(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "README.md").write_text("about these")
    corpus = load_corpus(str(tmp_path), "", 0.2)
    assert sorted(sum(documents_of(corpus), [])) == sorted(TEXTS)
    assert corpus.facts.formats == {"JSON lines": 1}


def test_lists_globs_and_two_formats_of_a_folder_are_one_corpus(tmp_path):
    write_lines(tmp_path / "text" / "a.jsonl", TEXTS[:20])
    packed = gzip.compress(json_lines(TEXTS[20:]))
    (tmp_path / "text" / "b.jsonl.gz").write_bytes(packed)
    root = tmp_path / "text"
    found = [
        load_corpus(path, "", 0.2)
        for path in (
            str(root),
            f"{root}/*",
            f"{root}/a.jsonl, {root}/b.jsonl.gz",
            f"{root}/*.jsonl,{root}/*.gz,{root}/a*",
        )
    ]
    assert len({corpus.fingerprint for corpus in found}) == 1
    assert found[0].facts.formats == {"JSON lines": 1, "JSON lines, gzip": 1}
    assert sorted(sum(documents_of(found[0]), [])) == sorted(TEXTS)


def test_caches_of_a_saved_dataset_are_not_read(tmp_path):
    files = write_all(tmp_path, TEXTS)
    folder = tmp_path / "saved"
    folder.mkdir()
    os.link(files["string.stream.arrow"], folder / "data-00000-of-00001.arrow")
    os.link(files["string.file.arrow"], folder / "cache-0123.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    assert load_corpus(str(folder), "", 0.2).facts.duplicates == 0


# ---------------------------------------------------------------- bad records


def bad_file(folder: Path) -> Path:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[5:5] = ['{"text": 5}', '{"text": ""}', "nonsense"]
    path = folder / "bad.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("unit", [32 << 20, 100])
def test_bad_records_fail_with_their_line(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(units, "UNIT", unit)
    path = bad_file(tmp_path)
    expected = r"data.path: bad.jsonl:6: its field 'text' is a number.*data.on_error=skip"
    with pytest.raises(UserError, match=expected):
        load_corpus(str(path))
    with pytest.raises(UserError, match=expected):
        prepare(str(path), "", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("unit", [32 << 20, 100])
def test_bad_records_are_skipped_counted_and_the_first_is_named(tmp_path, monkeypatch, unit, bpe):
    monkeypatch.setattr(units, "UNIT", unit)
    path = bad_file(tmp_path)
    corpus = load_corpus(str(path), bpe, 0.2, on_error="skip")
    facts = corpus.facts
    assert (facts.bad_records, facts.empty_documents) == (2, 1)
    assert facts.first_bad_record == "bad.jsonl:6: its field 'text' is a number, not text"
    assert sorted(sum(documents_of(corpus, bpe), [])) == sorted(TEXTS)
    clean = write_lines(tmp_path / "clean.jsonl", TEXTS)
    assert load_corpus(str(clean), bpe, 0.2).fingerprint == corpus.fingerprint
    prepare(str(path), bpe, str(tmp_path / "out"), 0.2, on_error="skip")
    same(load_corpus(str(tmp_path / "out")), corpus)


def test_files_that_are_not_utf8_are_skipped_by_tokenizers_only(tmp_path, bpe):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert load_corpus(str(tmp_path), "", 0.3, on_error="skip").facts.bad_records == 0
    facts = load_corpus(str(tmp_path), bpe, 0.3, on_error="skip").facts
    assert facts.bad_records == 1
    assert facts.first_bad_record == f"{tmp_path}/latin.txt: it is not UTF-8"
    assert train_bpe(str(tmp_path), 258, str(tmp_path / "x.json"), on_error="skip") >= 257
    with pytest.raises(UserError, match=r"latin.txt' is not UTF-8"):
        load_corpus(str(tmp_path), bpe, 0.3)


def test_a_tokenizer_is_trained_on_the_training_side(tmp_path, bpe):
    path = write_lines(tmp_path / "a.jsonl", [*TEXTS, "", *TEXTS[:9]])
    wanted = Wanted(str(path), "", 0.2)
    texts = [piece.data.decode() for piece in training_pieces(wanted)]
    assert texts == documents_of(load_corpus(str(path), bpe, 0.2), bpe)[0]


# ---------------------------------------------------------------- mistakes


def test_records_without_any_text_are_a_mistake(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="data.path: no document has any text"):
        load_corpus(str(path))
    files = write_all(tmp_path, [])
    for name in ("groups.parquet", "string.file.arrow", "string.stream.arrow"):
        with pytest.raises(UserError, match="data.path: no document has any text"):
            load_corpus(str(files[name]))
    write_lines(tmp_path / "one.jsonl", ["a single one"])
    with pytest.raises(UserError, match="data.path: it holds one document"):
        load_corpus(str(tmp_path / "one.jsonl"))


def test_tokens_and_hub_names_are_not_prepared(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(9, dtype=np.uint16))
    write_lines(tmp_path / "a.jsonl", TEXTS)
    for path, words in (
        (str(tmp_path / "ids.npy"), "holds token ids, which a run reads as they are"),
        ("hf://some/name", "read only while training"),
    ):
        with pytest.raises(UserError, match=f"data.path.*{words}"):
            prepare(path, "", str(tmp_path / "out"))
        with pytest.raises(UserError, match=f"data.eval_path.*{words}"):
            prepare(str(tmp_path / "a.jsonl"), "", str(tmp_path / "out"), eval_path=path)
    assert not (tmp_path / "out").exists()


def test_a_long_document_that_is_not_text_is_counted_once(tmp_path, monkeypatch):
    for side in ("train", "val"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.txt").write_text(f"a text of {side}\n" * 30)
    (tmp_path / "train" / "latin.txt").write_bytes(b"caf\xe9 and more\n" * 40)
    monkeypatch.setattr(encode, "CHUNK", 100)
    monkeypatch.setattr(encode, "pieces", functools.partial(documents.pieces, max_bytes=50))
    assert load_corpus(str(tmp_path)).facts.warning.startswith("of 3 documents 1 are not UTF-8")
