"""A converted model is a run's workdir: the other commands work on it, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moejax import cli
from moejax.record.probe import Probe
from tests.hf import folders

pytestmark = pytest.mark.slow

SMALL = (
    "--config.train.seq_len=16",
    "--config.train.batch_size=8",
    "--config.train.eval_rows=8",
    "--config.report.probe_rows=4",
    "--config.mesh.data=1",
)


def moejax(*argv: str) -> None:
    assert cli.main(list(argv)) == 0, argv


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return folders.write(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def run(source, tmp_path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text {i * i}\n" for i in range(400)))
    flags = (f"--workdir={tmp_path / 'run'}", f"--config.data.path={text}", *SMALL)
    moejax("convert", f"--from-hf={source}", *flags)
    return tmp_path / "run"


def row(capsys, *argv: str) -> dict:
    capsys.readouterr()
    moejax("eval", *argv, "--json")
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_is_evaluated_on_any_mesh(run, capsys):
    alone = row(capsys, f"--workdir={run}")
    assert alone["step"] == 0 and np.isfinite(alone["loss"])
    shared = row(capsys, f"--workdir={run}", "--config.mesh.data=2", "--config.mesh.expert=2")
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)  # sums in another order
    assert shared["moe/load"] == alone["moe/load"]


def test_its_report_says_what_is_missing_and_a_recorded_probe_fills_it(run, capsys):
    """Without training there are no rows; an evaluation can leave its own, and the routing."""
    moejax("report", str(run))
    page = (run / "report.html").read_text()
    assert "--record-probe" in page
    before = {path.name for path in run.iterdir()}
    evaluated = row(capsys, f"--workdir={run}", "--record-probe")
    assert {path.name for path in run.iterdir()} - before == {
        "probe", "metrics.jsonl", "timings.jsonl", ".lock",
    }  # fmt: skip
    probe = Probe.read(run)
    assert probe is not None and probe.steps == [0]
    assert probe.at(0)["expert"].shape == (folders.LAYERS, 4, 16, 2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [evaluated["loss"]]
    moejax("report", str(run))
    filled = (run / "report.html").read_text()
    assert len(filled) > len(page) and "--record-probe" not in filled
    row(capsys, f"--workdir={run}", "--record-probe")  # again: the same files
    assert (run / "metrics.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.report.probe_rows=0", "report.probe_rows=0"),
        ("--config.train.seq_len=8", "train.seq_len=8"),
    ],
)
def test_a_probe_of_other_sequences_is_refused(flag, words, run, capsys):
    capsys.readouterr()
    assert cli.main(["eval", f"--workdir={run}", "--record-probe", flag]) == 2
    assert words in capsys.readouterr().err
    assert not (run / "probe").exists() and not (run / "metrics.jsonl").exists()


def test_it_is_fine_tuned_in_a_new_workdir_and_goes_out_again(run, source, tmp_path):
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    moejax(
        "train",
        f"--config={run}",
        f"--config.train.init_from={run}",
        "--config.optim.name=adamw",
        "--config.train.steps=3",
        f"--workdir={tuned}",
    )
    moejax("report", str(tuned))
    moejax("convert", f"--to-hf={tuned}", f"--out={out}")
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(old[name].shape == new[name].shape for name in old)
    changed = [name for name in old if (old[name] != new[name]).any()]
    assert "model.layers.1.block_sparse_moe.gate.weight" in changed
    assert max(np.abs(old[name] - new[name]).max() for name in old) < 0.1


@pytest.mark.parametrize("recorded", [False, True])
def test_training_goes_on_in_its_own_workdir(recorded, run, capsys):
    if recorded:
        row(capsys, f"--workdir={run}", "--record-probe")
    moejax("train", f"--config={run}", f"--workdir={run}", "--config.train.steps=2")
    capsys.readouterr()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["split"], r["step"]) for r in rows]
    assert steps == [*([("eval", 0)] if recorded else []), ("train", 2), ("eval", 2)]
    assert row(capsys, f"--workdir={run}")["step"] == 2
    moejax("report", str(run))
