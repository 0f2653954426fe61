"""The files and the messages of a run, besides its checkpoints."""

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax import cli
from moejax.config import from_dict, load, to_dict
from moejax.data.baselines import ngram_baselines
from moejax.errors import UserError
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.cost.budget import count_budget
from moejax.train.metrics.rows import routing
from moejax.types import MoEStats
from tests.train import runs
from tests.train.runs import SETTINGS, STEPS, call, command, copy
from tests.train.sharing import Shared, Whole

LAYERS, EXPERTS, K = 2, 4, 2
TOKENS = SETTINGS["train.batch_size"] * SETTINGS["train.seq_len"]
MOE_KEYS = {
    "moe/max_vio",
    "moe/drop_rate",
    "moe/unserved_rate",
    "moe/experts_per_token",
    "moe/router_entropy",
    "moe/load",
    "moe/dropped",
    "moe/dropped_by_position",
    "moe/dropped_by_choice",
    "leak",
}
AUX_KEYS = {"aux/load_balance", "aux/z", "aux/importance", "aux/load"}


def test_rows_have_the_documented_keys_and_finite_values(whole: Whole):
    common = {"step", "split", "loss", "accuracy", *AUX_KEYS, *MOE_KEYS}
    keys = {
        "train": common | {"total_loss", "grad_norm", "learning_rate"},
        "eval": common | {"bits_per_byte", "baseline/bigram", "baseline/trigram"},
    }
    for row in runs.rows(whole.workdir):
        assert set(row) == keys[row["split"]]
        assert row["leak"] == ""
        values = [v for k, v in row.items() if k not in ("split", "leak")]
        assert all(np.isfinite(np.asarray(value, float)).all() for value in values), row


def test_rows_are_consistent(whole: Whole):
    for row in runs.rows(whole.workdir, "train"):
        load, dropped = np.array(row["moe/load"]), np.array(row["moe/dropped"])
        assert load.shape == dropped.shape == (LAYERS, EXPERTS)
        assert load.sum(axis=1).tolist() == [TOKENS * K] * LAYERS
        assert row["moe/experts_per_token"] == K
        assert row["moe/drop_rate"] == dropped.sum() / load.sum() > 0
        assert row["moe/max_vio"] == pytest.approx(
            (load.max(axis=1) / load.mean(axis=1) - 1).mean()
        )
        assert (
            np.sum(row["moe/dropped_by_position"], axis=1).tolist() == dropped.sum(axis=1).tolist()
        )
        auxiliary = 0.01 * row["aux/load_balance"] + 0.001 * row["aux/z"] + 0.1 * row["aux/load"]
        assert row["total_loss"] == pytest.approx(row["loss"] + auxiliary, rel=1e-6)
    for row in runs.rows(whole.workdir, "eval"):
        assert row["moe/drop_rate"] == 0  # evaluation is dropless
        assert row["bits_per_byte"] == row["loss"] / math.log(2)  # bytes are tokens


def test_balance_and_drops_of_two_layers_are_those_worked_by_hand():
    """Four tokens; loads of 4, 4, 0, 0 and 2, 2, 2, 2 pairs, of which the first layer drops 3."""
    load = np.array([[4, 4, 0, 0], [2, 2, 2, 2]])
    stats: dict[str, Any] = {
        "tokens": np.array([4, 4]),
        "load_E": load,
        "dropped_E": np.array([[2, 1, 0, 0], [0, 0, 0, 0]]),
        "dropped_L": np.array([[0, 1, 2], [0, 0, 0]]),
        "dropped_K": np.array([[1, 2], [0, 0]]),
        "unserved_tokens": np.array([1, 0]),
        "prob_E": load / 2,
        "entropy": np.array([3.0, 5.0]),
        "gate": {"temperature": np.array([8.0, 4.0]), "price": np.ones((2, 4))},
    }
    row = routing(MoEStats(**stats))
    assert row == {
        "moe/max_vio": (4 / 2 - 1 + 0) / 2,
        "moe/drop_rate": 3 / 16,
        "moe/unserved_rate": 1 / 8,
        "moe/experts_per_token": 2.0,
        "moe/router_entropy": 1.0,
        "moe/gate/temperature": 1.5,
        "moe/load": load.tolist(),
        "moe/dropped": [[2, 1, 0, 0], [0, 0, 0, 0]],
        "moe/dropped_by_position": [[0, 1, 2], [0, 0, 0]],
        "moe/dropped_by_choice": [[1, 2], [0, 0]],
    }


def test_floats_read_back_exactly(whole: Whole):
    for line in (whole.workdir / "metrics.jsonl").read_text().splitlines():
        assert json.dumps(json.loads(line)) == line
    last = runs.rows(whole.workdir, "train")[-1]
    for name in ("total_loss", "grad_norm", "learning_rate"):
        assert last[name] == float(np.float32(last[name]))  # float32 values, not rounded ones


@pytest.mark.slow
def test_config_json_holds_what_is_needed_to_repeat_and_judge_the_run(whole: Whole, text: Path):
    saved = json.loads((whole.workdir / "config.json").read_text())
    loaded = load(runs.PAGE, runs.flags(text))
    corpus = runs.text_of(whole.run).corpus
    assert from_dict(saved["config"]) == loaded.config
    assert saved["source"] == runs.PAGE and saved["overrides"] == runs.flags(text)
    assert saved["fingerprint"] == corpus.fingerprint and len(corpus.fingerprint) == 64
    seen = np.concatenate([b["tokens"][b["valid"].any(axis=1)] for b in whole.run.eval_batches()])
    assert saved["baselines"] == ngram_baselines(corpus.train_N, [seen], 256)
    for row in runs.rows(whole.workdir, "eval"):
        assert saved["baselines"] == {n: row[f"baseline/{n}"] for n in ("bigram", "trigram")}
    tokens = seen[:, 1:].size
    assert saved["evaluated"] == {"rows": len(seen), "tokens": tokens, "bytes": tokens}
    assert saved["text"]["heldout_documents"] == 1 and saved["text"]["train_documents"] == 4
    assert 0 <= saved["text"]["overlap"]["share"] < 1
    assert saved["parameters"] == {"total": 9552, "active": 8016}
    budget = count_budget(whole.run)
    for phase, counted in (("train", budget.train_flops), ("eval", budget.eval_flops)):
        expected = {"fixed": counted.fixed, "per_pair": counted.per_pair}
        assert saved["flops"][phase] == expected and counted.per_pair > 0
    memory = {"state": budget.state_bytes, "activations": budget.activation_bytes}
    assert saved["memory"] == memory and saved["devices"] == {"kind": "cpu", "count": 2}
    assert sorted(path.name for path in whole.workdir.iterdir()) == [
        ".lock", "checkpoints", "config.json", "metrics.jsonl", "saved.json",
        "summary.png", "timings.jsonl",
    ]  # fmt: skip


# ---------------------------------------------------------------- what is said


def test_parameters_memory_and_mesh_are_printed_before_compiling(whole: Whole):
    before, compiling, _ = whole.ended.out.partition("compiling the training step ...\n")
    assert compiling
    d, f, v = 16, 8, 256
    attention, norms, routers, expert = 4 * d * d, 2 * d, 2 * d * EXPERTS, 3 * d * f
    outside = v * d + d + LAYERS * (attention + norms + routers)
    total, active = (outside + LAYERS * n * expert for n in (EXPERTS, K))
    assert (total, active) == (9552, 8016)
    assert "parameters  9.55k total, 8.02k active per token\n" in before
    # Float32 weights, gradients and two moments; of the experts, each of two devices has half.
    kib = (outside + LAYERS * EXPERTS // 2 * expert) * 4 * 4 / 1024
    said = re.search(r"memory +\S+ KiB expected per device \((\S+) KiB state and gradients", before)
    assert said and float(said[1]) == pytest.approx(kib, rel=2e-3)
    assert "held out    20% of the bytes, by a hash of the names: 1 document beside 4" in before
    assert re.search(
        r"evaluation  \d+ rows, (\d+) tokens, \1 bytes of the 110 tokens held out", before
    )
    assert "of held-out bytes are in a 50-byte window that the training text has too" in before
    assert "warning     only 110 tokens are held out" in before
    assert "mesh        data=1 x fsdp=1 x expert=2 x tensor=1 on 2 cpu device(s)\n" in before
    assert f"training    {STEPS} steps of 8 x 16 tokens" in before


def test_the_summary_gives_loss_baselines_drops_and_files(whole: Whole):
    *_, end = whole.ended.out.partition("\nfinished in ")
    lines = {line[:16].strip(): line[16:] for line in end.splitlines()[1:]}
    config = json.loads((whole.workdir / "config.json").read_text())
    train, held_out = (runs.rows(whole.workdir, split)[-1] for split in ("train", "eval"))
    losses = {"held-out loss": held_out["loss"], **config["baselines"]}
    for name, loss in losses.items():
        said = f"{loss:.4f} nats/byte  {loss / math.log(2):.4f} bits/byte"
        assert lines[name] == said
    assert (
        lines["drops"] == f"{train['moe/drop_rate']:.2%} of pairs in the last step, 0.00% held out"
    )
    assert lines["balance"] == f"busiest expert at {1 + train['moe/max_vio']:.2f}x the mean load"
    assert lines["files"].startswith(f"{whole.workdir}: summary.png")
    assert re.fullmatch(r"[\d.]+k? tokens/s at the end", lines["speed"])
    assert lines["next"]
    assert (whole.workdir / "summary.png").read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_on_a_terminal_a_bar_replaces_the_lines_and_restores_the_cursor(
    whole: Whole, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    argv = command(copy(whole.moments / "4", tmp_path / "run"), text)
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any) -> None:
            raise UserError("the disk is full")

        patch.setattr(Checkpointer, "save", full)
        assert cli.main(argv) == 2
    assert cli.main(argv) == 0
    shown = terminal.getvalue()
    assert "\nstep " not in shown and "8/8" in shown and "drops" in shown
    hidden, given_back = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hidden) == shown.count(given_back) == 2
    assert shown.rindex(given_back) < shown.index("finished in")


@pytest.mark.slow
def test_a_model_without_experts_trains_and_has_no_rows_about_them(
    shared: Shared, text: Path, tmp_path: Path
):
    ended = call(command(tmp_path / "run", text, moe__every=0))
    assert ended.status == 0 and "balance" not in ended.out and "dense FFN" in ended.out
    assert not any(key.startswith("moe/") for row in runs.rows(tmp_path / "run") for key in row)
    assert to_dict(load(str(tmp_path / "run")).config)["moe"]["every"] == 0
