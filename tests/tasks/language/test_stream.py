"""Text that is read while it is trained on: the order, the sides, and what is refused."""

import collections
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moejax.config import default
from moejax.data.source import Positioned
from moejax.data.stream import blocks, sides, units
from moejax.errors import UserError
from moejax.tasks.language import stream
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.task import build
from tests.environment import of_a_user

LENGTH, BATCH, ROWS = 16, 8, 24
DOCUMENTS = 200


def text_of(number: int) -> str:
    """A document of 3 to 120 letters, no 17 of which are anywhere else."""
    return f"<{number}>" + "".join(f" {number}.{i}" for i in range(number * 37 % 17))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Units of a few documents, and blocks of 12 rows."""
    monkeypatch.setattr(units, "UNIT", 600)
    monkeypatch.setattr(blocks, "BLOCK", 12 * LENGTH)
    monkeypatch.setattr(sides, "SAMPLE", 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JSON lines in three files."""
    folder = tmp_path_factory.mktemp("corpus") / "web"
    folder.mkdir()
    for file in range(3):
        lines = [json.dumps({"text": text_of(n)}) + "\n" for n in range(file, DOCUMENTS, 3)]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    return folder


def source(path, seed=0, seq_len=LENGTH, **data) -> stream.StreamSource:
    config = default()
    config.train.update({"seq_len": seq_len, "batch_size": BATCH, "seed": seed, "eval_rows": ROWS})
    config.data.update({"path": str(path), "stream": True, "eval_fraction": 0.1, **data})
    found = build(config)[1]
    assert isinstance(found, stream.StreamSource)
    return found


def tokens(source: TextSource, step: int) -> np.ndarray:
    return source.train_batch(step)["tokens"]


def held_out(source: stream.StreamSource) -> set[bytes]:
    """All documents of the corpus that are never trained on."""
    texts = (text_of(number).encode() for number in range(DOCUMENTS))
    return {text for text in texts if source.survey.sides.is_held_out(text)}


def documents_read(source: stream.StreamSource) -> list[bytes]:
    """The held-out documents that were read."""
    return bytes(np.asarray(source.corpus.heldout_N).astype(np.uint8)).split(b"\0")


def rows_of(documents: list[bytes]) -> collections.Counter[bytes]:
    """The rows of documents in this order, by hand."""
    joined = b"\0".join(documents)
    starts = range(0, len(joined) - LENGTH, LENGTH)
    return collections.Counter(joined[at : at + LENGTH + 1] for at in starts)


def documents_of(source: stream.StreamSource, epoch: int) -> list[bytes]:
    """The documents of an epoch in the order of reading."""
    return [bytes(x.token_N.astype(np.uint8)) for x in source.documents(epoch, 0, 0)]


def epoch_of_rows(source: stream.StreamSource, begin: int, count: int) -> collections.Counter:
    steps = range(begin // BATCH, -(-(begin + count) // BATCH))
    found = np.concatenate([tokens(source, step) for step in steps])[begin % BATCH :][:count]
    return collections.Counter(bytes(row.astype(np.uint8)) for row in found)


# ---------------------------------------------------------------- order


def test_every_row_of_an_epochs_text_is_trained_on_once_an_epoch_and_in_another_order(folder):
    own = source(folder)
    begin = 0
    for epoch in range(3):
        documents = documents_of(own, epoch)
        wanted = rows_of(documents)
        count = wanted.total()
        assert count == (len(b"\0".join(documents)) - 1) // LENGTH
        assert epoch_of_rows(own, begin, count) == wanted, epoch
        begin += count
    first, second = documents_of(own, 0), documents_of(own, 1)
    assert first != second and sorted(first) == sorted(second)


def test_rows_of_a_block_are_shuffled_and_blocks_follow_the_text(folder):
    own = source(folder)
    joined = b"\0".join(documents_of(own, 0))
    begins = [joined.index(bytes(row.astype(np.uint8))) for row in tokens(own, 0)]
    begins += [joined.index(bytes(row.astype(np.uint8))) for row in tokens(own, 1)]
    begins += [joined.index(bytes(row.astype(np.uint8))) for row in tokens(own, 2)]
    assert sorted(begins[:12]) == [LENGTH * row for row in range(12)] != begins[:12]
    assert sorted(begins[12:24]) == [LENGTH * row for row in range(12, 24)] != begins[12:24]


def test_a_batch_is_a_function_of_the_step_alone(folder):
    """Three epochs: forward, backward, again, and in another process, with and without its note."""
    own = source(folder)
    wanted = [tokens(own, step) for step in range(200)]
    assert own.train._begins[-1].epoch >= 2
    for step in (199, 0, 117, 118, 60, 60, 3):
        np.testing.assert_array_equal(tokens(own, step), wanted[step], err_msg=str(step))
    note = json.loads(json.dumps(own.position(117)))
    for notes in ([], [note], [None], [[1, 2]]):
        other = source(folder)
        assert isinstance(other, Positioned)
        for each in notes:
            other.resume(each)
        for step in (117, 118, 130, 5, 117):
            np.testing.assert_array_equal(tokens(other, step), wanted[step], err_msg=str(step))


def test_a_resumed_run_reads_no_more_than_a_block_before_its_first_step(folder, monkeypatch):
    own = source(folder)
    tokens(own, 150)
    other = source(folder)
    other.resume(own.position(150))
    read: list[int] = []
    inner = units.FileUnits.read
    monkeypatch.setattr(
        units.FileUnits, "read", lambda *args: (read.append(args[1]), inner(*args))[1]
    )
    tokens(other, 150)
    # Rows of 150 steps are 75 units; a block has under 4 of them, and 2 more are read ahead.
    assert 0 < len(read) < 20


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_packed_rows_have_every_document_once_an_epoch(folder, packing):
    """Rows that take every document whole."""
    length = 128
    own = source(folder, packing=packing, seq_len=length)
    wanted = sorted(documents_of(own, 0))
    found: list[bytes] = []
    step = 0
    while len(found) < 2 * len(wanted):
        batch = own.train_batch(step)
        for tokens_L, segment_L, valid_L in zip(
            batch["tokens"], batch["segment"], batch["valid"], strict=True
        ):
            for number in range(segment_L[valid_L].max() + 1):
                inputs = np.flatnonzero(valid_L & (segment_L == number))
                document = tokens_L[inputs[0] + 1 : inputs[-1] + 2]
                assert tokens_L[inputs[0]] == document[-1] == 0  # separators
                found.append(bytes(document[:-1].astype(np.uint8)))
        step += 1
    # An epoch ends in the middle of a batch, and its rows are of blocks in the order of the text.
    assert sorted(found[: len(wanted)]) == sorted(found[len(wanted) : 2 * len(wanted)]) == wanted
    whole = [own.train_batch(at) for at in range(step)]
    other = source(folder, packing=packing, seq_len=length)
    other.resume(own.position(step - 1))
    for name, array in other.train_batch(step - 1).items():
        np.testing.assert_array_equal(array, whole[-1][name])
    assert own.facts()["packing"].startswith(f"{packing}: ")


def test_some_rows_of_a_batch_are_those_of_the_whole(folder):
    own = source(folder)
    whole = own.train.batch(20)
    for share in (slice(0, 4), slice(4, 8), slice(2, 3)):
        part = own.train.batch(20, share)
        for name, array in whole.items():
            np.testing.assert_array_equal(part[name], array[share])
    assert whole["row"].tolist() == list(range(160, 168)) and whole["valid"].all()
    assert {name: x.shape for name, x in whole.items()} == {
        name: x.shape for name, x in own.shapes(BATCH).items()
    }


def test_seeds_change_the_order_and_neither_the_held_out_rows_nor_the_fingerprint(folder):
    one, other = source(folder), source(folder, seed=1)
    assert not np.array_equal(tokens(one, 0), tokens(other, 0))
    assert one.fingerprint == other.fingerprint
    for a, b in zip(one.eval_batches(8, ROWS), other.eval_batches(8, ROWS), strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


# ---------------------------------------------------------------- sides


def test_held_out_documents_are_evaluated_and_never_trained_on(folder):
    own = source(folder)
    held = held_out(own)
    every = {text_of(number).encode() for number in range(DOCUMENTS)}
    assert 8 <= len(held) <= 32  # a tenth of 200, within three standard deviations
    assert set(documents_of(own, 0)) == set(documents_of(own, 1)) == every - held
    read = documents_read(own)
    assert set(read) <= held and len(read) == len(set(read)) == own.corpus.facts.heldout_documents
    assert own.evaluated["rows"] == ROWS and own.survey.complete == (len(read) == len(held))


def test_copies_of_a_document_are_on_one_side(tmp_path):
    texts = [text_of(number) for number in range(60)] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    own = source(tmp_path, eval_fraction=0.3)
    trained = documents_of(own, 0)
    held = documents_read(own)
    assert not set(trained) & set(held)
    assert set(collections.Counter(trained).values()) == {4} and len(held) == len(set(held))


def test_documents_of_the_evaluation_text_are_not_trained_on(folder, tmp_path):
    other = tmp_path / "other.jsonl"
    texts = [*(text_of(n) for n in range(60, 90)), *(f"new {n} " * 4 for n in range(9))]
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    own = source(folder, eval_path=str(other))
    held = set(documents_read(own))
    assert held and held <= {t.encode() for t in texts}
    trained = documents_of(own, 0)
    assert not held & set(trained)
    known = {text_of(number).encode() for number in range(DOCUMENTS)}
    assert set(trained) == known - held


def test_files_named_by_side_are_the_sides(tmp_path):
    for side, numbers in (("train", range(40)), ("valid", range(40, 60)), ("test", range(60, 70))):
        lines = "".join(json.dumps({"text": text_of(number)}) + "\n" for number in numbers)
        (tmp_path / f"{side}.jsonl").write_text(lines)
    own = source(tmp_path)
    assert sorted(documents_of(own, 0)) == sorted(text_of(n).encode() for n in range(40))
    held = set(documents_read(own))
    assert held and held <= {text_of(number).encode() for number in range(40, 60)}


def test_the_bytes_of_an_evaluation_are_those_of_its_targets(folder):
    own = source(folder)
    assert own.evaluated == {"rows": ROWS, "tokens": ROWS * LENGTH, "bytes": ROWS * LENGTH}


# ---------------------------------------------------------------- formats and tokenizers


def test_a_long_plain_text_is_documents_of_whole_lines(tmp_path):
    lines = [f"line {n} of é text\n" * (n % 5 + 1) for n in range(300)]
    (tmp_path / "book.txt").write_text("".join(lines))
    own = source(tmp_path)
    parts = parts_of(own)
    assert b"".join(parts) == "".join(lines).encode()
    assert len(parts) == -(-len(b"".join(parts)) // 600)
    assert all(part.endswith(b"\n") and len(part) < 700 for part in parts)


def parts_of(own: stream.StreamSource) -> list[bytes]:
    """The documents of all units in the order of the files."""
    reader = own.survey.sides.train
    return [record.data for unit in range(len(reader.texts)) for _, record in reader.read(unit)]


def test_a_text_without_lines_is_cut_between_characters(tmp_path):
    (tmp_path / "one.txt").write_text("é" * 2001)
    own = source(tmp_path, eval_fraction=0.2)
    parts = parts_of(own)
    assert b"".join(parts).decode() == "é" * 2001 and all(part.decode() for part in parts)


def test_tokens_are_those_of_the_tokenizer_with_its_separator_between_documents(folder, tmp_path):
    from moejax.data.tokenizers.bpe import train_bpe
    from moejax.data.tokenizers.load import load_tokenizer

    (tmp_path / "text.txt").write_text("\n".join(map(text_of, range(DOCUMENTS))))
    train_bpe(str(tmp_path / "text.txt"), 300, str(tmp_path / "bpe.json"))
    own = source(folder, tokenizer=str(tmp_path / "bpe.json"))
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    documents = [tokenizer.decode(x.token_N.tolist()) for x in own.documents(0, 0, 0)]
    assert set(documents) == {text_of(n) for n in range(DOCUMENTS)} - {
        text.decode() for text in held_out(own)
    }
    first = np.concatenate([tokens(own, step) for step in (0, 1, 2)])[:12]
    inputs = {tuple(row) for row in first.tolist()}
    joined = [t for x in own.documents(0, 0, 0) for t in [tokenizer.separator, *x.token_N]][1:]
    assert inputs == {tuple(joined[i * LENGTH :][: LENGTH + 1]) for i in range(12)}
    bits = own.evaluated
    assert bits["bytes"] > bits["tokens"] == ROWS * LENGTH


def test_a_record_that_cannot_be_read_ends_the_run_or_is_left_out(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"data\.path: \d\.jsonl:6[78] .*data\.on_error=skip"):
        documents_of(source(tmp_path), 0)
    own, whole = source(tmp_path, on_error="skip"), source(folder)
    assert sorted(documents_of(own, 0)) == sorted(documents_of(whole, 0))
    assert (
        "moejax: warning: data.on_error=skip: 1 record(s) left out so far"
        in capsys.readouterr().err
    )
    assert own.fingerprint != whole.fingerprint


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_names_sizes_contents_and_the_split(folder, tmp_path):
    wanted = source(folder).fingerprint
    assert source(folder).fingerprint == wanted

    def changed(old: str, new: str, name: str = "0.jsonl") -> str:
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        copy.mkdir()
        for file in folder.iterdir():
            text = file.read_text()
            (copy / (name if file.name == "0.jsonl" else file.name)).write_text(
                text.replace(old, new)
            )
        return source(copy).fingerprint

    assert changed("<0>", "<0>") == wanted
    assert changed("<0>", "<0>", "other.jsonl") != wanted
    assert changed("<0>", "<000>") != wanted
    assert changed(".3 ", ".3,") != wanted
    assert source(folder, eval_fraction=0.2).fingerprint != wanted


# ---------------------------------------------------------------- remarks and mistakes


def test_a_run_says_the_order_the_sides_and_what_was_read(folder):
    own = source(folder)
    facts = own.facts()
    assert facts["stream"].startswith("JSON lines in 2") and "parts, 0.0 MB" in facts["stream"]
    assert facts["order"] == "files and their parts shuffled, then rows within blocks of 12"
    assert facts["held out"].startswith("10% of the documents, by a digest of their bytes, never")
    assert own.size() == (None, len(own.corpus.heldout_N)) and own.baselines()["bigram"] > 0
    assert own.token_counts(256).sum() == len(own.corpus.train_N)
    assert json.loads(json.dumps(own.about()))["evaluated"]["rows"] == ROWS
    batch = own.eval_batches(8, ROWS)[0]
    assert own.probe_arrays(batch, ROWS)["token"].shape == (8, LENGTH)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": ""}, "data.stream=True: the built-in text fits into memory"),
        ({"mixture": "{}"}, "data.mixture='{}' does not go with a stream"),
        ({"eval_fraction": 1e-9}, "data.eval_fraction=1e-09: none of the documents"),
        ({"text_field": "body"}, "has no field 'body'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(folder, fields, message):
    with pytest.raises(UserError) as error:
        source(fields.pop("path", folder), **fields)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_little_text_for_a_row_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("few")
    (tmp_path / "val.txt").write_text("enough of them for one row")
    with pytest.raises(UserError, match=r"train\.seq_len=16: the text to train on is too short"):
        source(tmp_path).train_batch(0)


def test_prepared_shards_are_not_streamed(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"data\.stream=True: the tokens in .*use data\.stream=False"
    ):
        source(tmp_path)


def test_a_source_that_is_gone_has_no_thread(folder):
    before = threading.enumerate()
    own = source(folder)
    tokens(own, 0)
    threads = [t for t in threading.enumerate() if t not in before]
    assert [t.name[:21] for t in threads] == ["grain-thread-prefetch"]
    del own
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


EXIT = """
import sys
from moejax.config import default
from moejax.tasks.language.task import build

config = default()
config.train.update({"seq_len": 16, "batch_size": 8})
config.data.update({"path": sys.argv[1], "stream": True})
source = build(config)[1]
source.train_batch(0)
"""


@pytest.mark.slow
def test_python_exits_while_blocks_are_read_ahead(folder):
    """Many times, since what the thread does at that moment differs."""
    for _ in range(5):
        argv = [sys.executable, "-c", EXIT, str(folder)]
        ended = subprocess.run(
            argv, env=of_a_user(), capture_output=True, text=True, check=False, timeout=60
        )
        assert (ended.returncode, ended.stderr) == (0, "")
