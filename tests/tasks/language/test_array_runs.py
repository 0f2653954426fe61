"""Runs on token arrays of other programs, from the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moejax import cli
from moejax.data.tokenizers.bpe import train_bpe
from tests.token_arrays import llmc, megatron, nanogpt

PAGE = f"{Path(__file__).parents[3]}/configs/lm.py:size=debug,experts=4"
VOCAB = 258  # of the tokenizer: 256 bytes, the separator and one merge


def counting(count, seed):
    """Documents in which every id is the one before it plus one."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 200) + np.arange(rng.integers(20, 40)) for _ in range(count)]


TRAIN, HELD = counting(120, 0), counting(30, 1)


def write_nanogpt(folder):
    nanogpt(folder / "train.bin", TRAIN)
    nanogpt(folder / "val.bin", HELD)


def write_llmc(folder):
    llmc(folder / "count_train_000001.bin", TRAIN[:60])
    llmc(folder / "count_train_000002.bin", TRAIN[60:])
    llmc(folder / "count_val_000000.bin", HELD)


def write_megatron(folder):
    for side, documents in (("train", TRAIN), ("val", HELD)):
        (folder / side).mkdir()
        with_eod = [[np.append(document, 0)] for document in documents]
        megatron(folder / side / "count_text_document", with_eod, np.int32)


def train(folder, workdir, capsys, *more):
    """The rows of evaluations after 30 and 60 steps, and the printed lines."""
    code = cli.main(
        [
            "train", f"--config={PAGE}", f"--workdir={workdir}", f"--config.data.path={folder}",
            "--config.train.steps=60", "--config.train.eval_every=30", "--config.train.seq_len=16",
            "--config.train.log_every=30", "--config.train.eval_rows=16", *more,
        ]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] != "train"], printed.out + printed.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "write, line",
    [
        (write_nanogpt, "2 files of nanoGPT .bin, uint16"),
        (write_megatron, "2 files of Megatron .bin/.idx, int32"),
    ],
)
def test_a_run_trains_on_the_arrays_of_another_program(tmp_path, capsys, write, line):
    folder = tmp_path / "count"
    folder.mkdir()
    write(folder)
    rows, lines = train(folder, tmp_path / "run", capsys, f"--config.model.vocab_size={VOCAB}")
    # Ids follow from the one before, but the first of a document; uniform is log 258 = 5.55.
    assert rows[-1]["loss"] < rows[0]["loss"] < 4.0
    assert f"{line}; a vocabulary of {VOCAB} ids (model.vocab_size)" in lines
    assert "bits_per_byte" not in rows[-1] and "data.tokenizer" in lines
    known = write is write_megatron  # its index tells where documents begin
    assert ("where documents begin is not known" in lines) != known
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert line in json.dumps(about)


@pytest.mark.slow
def test_a_run_with_the_tokenizer_of_the_arrays_packs_documents_and_has_bits_per_byte(
    tmp_path, capsys
):
    folder = tmp_path / "count"
    folder.mkdir()
    write_llmc(folder)
    (tmp_path / "text.txt").write_text("to and fro " * 100)
    train_bpe(str(tmp_path / "text.txt"), VOCAB, str(tmp_path / "bpe.json"))
    rows, lines = train(
        folder,
        tmp_path / "run",
        capsys,
        f"--config.data.tokenizer={tmp_path / 'bpe.json'}",
        "--config.data.packing=best_fit",
    )
    assert "30 documents beside 120 to train on" in lines
    assert "in a 50-byte window that the training text has too" in lines
    # One byte for each id but the merge, of two.
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["loss"] / math.log(2), rel=0.02)
