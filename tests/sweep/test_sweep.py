"""A whole sweep of real runs: its table, CSV and picture agree with the rows of the runs."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from moejax.sweep.definition import expand
from tests.environment import caching
from tests.train import runs
from tests.train.runs import ROOT, SETTINGS, config_of

pytestmark = pytest.mark.multiprocess

LAYERS, D, F, V, L, E = 2, 16, 8, 256, 16, 4
D_FF = 64  # of configs/lm.py:size=debug
PASSES = 3  # forward, gradient of the input, gradient of the weights
VARIANTS = """
    yield {"name": "dense_ffn", "moe.every": 0}
    yield {"name": "top_2", "moe.gate.name": "top_k", "moe.capacity_factor": 1.0}
"""
BROKEN = '    yield {"name": "broken", "train.seq_len": 5000}\n'
PAGE = """
from moejax.config import load

def get_config():
    return load({page!r}, {overrides!r}).config

def sweep():
{body}
"""
TELL = """
import sys
from moejax import cli
from moejax.job.launch import backend_is_running
status = cli.main(sys.argv[1:])
print("JAX devices started:", backend_is_running())
sys.exit(status)
"""


def write_page(folder: Path, text: Path, body: str, **changes: Any) -> Path:
    changes = {"moe__gate__name": "top_k", "mesh__expert": 1, **changes}
    page = folder / "page.py"
    overrides = runs.flags(text, **changes)
    page.write_text(PAGE.format(page=runs.PAGE, overrides=overrides, body=body))
    return page


def start(page: Path, folder: Path) -> subprocess.Popen[str]:
    words = ["sweep", f"--experiment={page}", f"--workdir={folder}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", TELL, *words], cwd=ROOT, env=caching(), **pipes)


@dataclasses.dataclass(frozen=True)
class Swept:
    folder: Path
    page: Path
    status: int
    out: str
    err: str

    @property
    def csv(self) -> dict[str, dict[str, str]]:
        with open(self.folder / "results.csv") as file:
            return {row["variant"]: row for row in csv.DictReader(file)}

    def workdir(self, variant: str) -> Path:
        return self.folder / f"trials/{variant}-seed0"

    def config(self, variant: str) -> dict[str, Any]:
        return json.loads((self.workdir(variant) / "config.json").read_text())


def run(page: Path, folder: Path) -> Swept:
    process = start(page, folder)
    out, err = process.communicate(timeout=600)
    return Swept(folder, page, process.returncode, out, err)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two variants that run, and one whose sequences are longer than its text."""
    folder = tmp_path_factory.mktemp("sweep")
    text = runs.write_text(folder / "text")
    return run(write_page(folder, text, VARIANTS + BROKEN), folder / "out")


@pytest.mark.slow
def test_working_trials_finish_and_failed_ones_show_their_error(swept: Swept):
    assert (swept.status, swept.err) == (1, "")
    assert "[3/3] broken-seed0 failed with status 2" in swept.out
    assert "    | moejax: error: train.seq_len: the training text has" in swept.out
    assert swept.out.endswith("JAX devices started: False\n"), "they belong to the trials"
    for name in ("results.csv", "sweep.png", "sweep.json"):
        assert (swept.folder / name).stat().st_size
    assert [name for name, row in swept.csv.items() if row["finished"] == "0"] == ["broken"]
    assert swept.csv["broken"]["loss"] == ""
    assert "compiled, first step done" in (swept.workdir("top_2") / "log.txt").read_text()


@pytest.mark.slow
def test_a_trials_run_has_the_config_of_its_id(swept: Swept):
    by_name = {trial.variant: trial for trial in expand(str(swept.page)).trials}
    index = json.loads((swept.folder / "sweep.json").read_text())
    assert [trial["id"] for trial in index["trials"]] == [t.id for t in by_name.values()]
    for variant in ("dense_ffn", "top_2"):
        config = swept.config(variant)["config"]
        assert config["moe"]["every"] == by_name[variant].config["moe"]["every"]
        assert swept.csv[variant]["id"] == by_name[variant].id


@pytest.mark.slow
def test_the_csv_holds_the_last_evaluation_and_the_means_of_the_run(swept: Swept):
    for variant, sparse in (("dense_ffn", False), ("top_2", True)):
        row, workdir = swept.csv[variant], swept.workdir(variant)
        train, held_out = runs.rows(workdir, "train"), runs.rows(workdir, "eval")[-1]
        assert [r["step"] for r in train] == [3, 6, 8]
        assert float(row["loss"]) == held_out["loss"]  # bytes are tokens
        assert int(row["step"]) == held_out["step"] == SETTINGS["train.steps"]
        assert (row["seed"], row["leak"]) == ("0", "")
        for name in ("max_vio", "drop_rate") if sparse else ():
            assert float(row[f"eval_{name}"]) == held_out[f"moe/{name}"]
            mean = sum(n * r[f"moe/{name}"] for n, r in zip((3, 3, 2), train, strict=True)) / 8
            assert float(row[f"train_{name}"]) == pytest.approx(mean, rel=1e-12)
        assert sparse or row["train_drop_rate"] == row["eval_max_vio"] == ""
        times = [
            json.loads(line)["seconds_per_step"]
            for line in (workdir / "timings.jsonl").read_text().splitlines()
        ]
        assert float(row["seconds_per_step"]) == median(times[1:])
        assert float(row["train_seconds"]) == pytest.approx(
            3 * times[0] + 3 * times[1] + 2 * times[2], rel=1e-12
        )


@pytest.mark.slow
def test_active_flops_count_the_counted_pairs(swept: Swept):
    """By hand: products outside the experts, plus one expert on each kept pair of the rows."""
    attention, head = LAYERS * (4 * 2 * D * D + 2 * 2 * L * D), 2 * D * V
    dense = attention + head + LAYERS * 3 * 2 * D * D_FF
    row = swept.csv["dense_ffn"]
    assert float(row["eval_flops_per_token"]) == dense
    assert float(row["train_flops_per_token"]) == PASSES * dense

    row, workdir = swept.csv["top_2"], swept.workdir("top_2")
    expert, router = 3 * 2 * D * F, LAYERS * 2 * D * E
    tokens = SETTINGS["train.batch_size"] * L
    kept = [
        (sum(map(sum, r["moe/load"])) - sum(map(sum, r["moe/dropped"]))) / tokens
        for r in runs.rows(workdir, "train")
    ]
    mean = (3 * kept[0] + 3 * kept[1] + 2 * kept[2]) / 8
    assert 0 < mean < LAYERS * 2, "some pairs were dropped"
    # Products of routing alone, of size E (balance loss) and K D (gradient of its weights).
    small = LAYERS * (PASSES * 2 * E + 2 * 2 * D)
    by_hand = PASSES * (attention + router + head + mean * expert)
    assert -1e-6 <= float(row["train_flops_per_token"]) - by_hand <= small
    by_hand = attention + router + head + LAYERS * 2 * expert  # evaluation drops nothing
    assert 0 <= float(row["eval_flops_per_token"]) - by_hand <= small
    assert float(row["train_pairs_per_token"]) == pytest.approx(mean / LAYERS, rel=1e-12)
    assert float(row["eval_pairs_per_token"]) == 2


@pytest.mark.slow
def test_the_table_agrees_with_the_csv(swept: Swept):
    # The last lines that begin with a variant's name.
    lines = {line.split()[0]: line.split() for line in swept.out.splitlines() if line}
    for variant in ("dense_ffn", "top_2"):
        row = swept.csv[variant]
        cells = lines[variant][1:]
        assert cells[:2] == ["1", f"{float(row['loss']):.4f}"]
        flops = [float(row[f"{split}_flops_per_token"]) for split in ("train", "eval")]
        assert cells[2:4] == [f"{value / 1e3:.3f}" for value in flops]
        assert cells[4] == f"{1000 * float(row['seconds_per_step']):.0f}"
        balance = [row["train_max_vio"], row["eval_max_vio"]]
        assert cells[5:7] == [f"{float(value):.2f}" if value else "-" for value in balance]
        drops = row["train_drop_rate"]
        assert cells[7:] == [f"{100 * float(drops):.1f}" if drops else "-"]
    assert lines["broken"][1:] == ["0/1", *"-------", "unfinished"]
    assert "kFLOP" in swept.out and "held-out" in swept.out


@pytest.mark.slow
def test_the_budget_is_printed_before_the_first_trial(swept: Swept):
    before, _, _ = swept.out.partition("[1/3]")
    assert f"to run: 3 trials, {3 * SETTINGS['train.steps']} steps, " in before
    assert "FLOP (counted, nothing dropped)" in before
    assert "time: unknown until a trial has finished" in before
    assert "--filter='dense_ffn-seed*' first" in before, "there is no pilot"


@pytest.mark.slow
def test_the_summary_holds_the_csvs_numbers(swept: Swept):
    summary = json.loads((swept.folder / "summary.json").read_text())
    assert (summary["format"], summary["match"], summary["baseline"]) == (1, None, None)
    by_name = {variant["variant"]: variant for variant in summary["variants"]}
    assert list(by_name) == ["dense_ffn", "top_2", "broken"]
    for variant in ("dense_ffn", "top_2"):
        (trial,) = by_name[variant]["trials"]
        row = swept.csv[variant]
        assert trial["loss"] == by_name[variant]["mean"] == float(row["loss"])
        assert trial["cost"] == float(row["train_flops_per_token"])
        assert (swept.folder / trial["workdir"] / "config.json").exists()
    assert by_name["broken"]["unfinished"] == [0] and by_name["broken"]["trials"] == []


@pytest.mark.slow
def test_a_trial_run_by_hand_equals_the_trial_of_the_sweep(swept: Swept, tmp_path: Path):
    """Same rows from ``moejax train`` in this process: a sweep adds nothing to a run."""
    words = (swept.workdir("top_2") / "log.txt").read_text().splitlines()[0].split()
    assert words[2:5] == [sys.executable, "-m", "moejax"] and words[-1].startswith("--workdir=")
    ended = runs.call([*words[5:-1], f"--workdir={tmp_path}/run"])
    assert ended.status == 0
    by_hand = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert by_hand == (swept.workdir("top_2") / "metrics.jsonl").read_bytes()


# The same with kills.


@pytest.mark.slow
def test_a_sweep_killed_repeatedly_ends_like_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory,
):
    """Runner and trial are killed -9 in the middle; their rows are those of a quiet run."""
    folder = tmp_path_factory.mktemp("kills")
    text = runs.write_text(folder / "text")
    page = write_page(folder, text, VARIANTS, train__steps=40, train__checkpoint_every=5)
    alone = run(page, folder / "alone")
    assert (alone.status, alone.err) == (0, "")

    out = folder / "out"
    for variant, row in (("dense_ffn", 9), ("top_2", 9), ("top_2", 24)):
        process = start(page, out)
        metrics = out / f"trials/{variant}-seed0/metrics.jsonl"
        while not metrics.exists() or f'"step": {row},' not in metrics.read_text():
            time.sleep(0.02)
            assert process.poll() is None
        process.kill()
        lock = json.loads((metrics.parent / ".lock").read_text())
        os.kill(lock["pid"], signal.SIGKILL)
        process.communicate()
    last = run(page, out)
    assert (last.status, last.err) == (0, "")
    assert "1 of 2 trials are already finished" in last.out
    log = (out / "trials/top_2-seed0/log.txt").read_text()
    assert log.count("resuming") >= 2
    for variant in ("dense_ffn", "top_2"):
        there, here = alone.workdir(variant), last.workdir(variant)
        assert (here / "metrics.jsonl").read_text() == (there / "metrics.jsonl").read_text()
        known = json.dumps(config_of(there)).replace("/alone/", "/out/")
        assert config_of(here) == json.loads(known)
        for key, value in alone.csv[variant].items():
            assert "seconds" in key or last.csv[variant][key] == value
