"""Runs on mixtures: what they record of each source, on any mesh, and when they are resumed."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moejax.config import load
from moejax.record.probe import Probe
from moejax.train import setup
from tests.train import runs, test_two_processes

NAMES = ("web", "code")
EVAL_ROWS = 12


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """The smaller text has 12 rows of 16 tokens to train on, so that a run begins it again."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = {"web": ["the", "gate", "of", "a", "town"], "code": ["def", "x", "=", "(", ")"]}
    for name, letters in (("web", 700), ("code", 200)):
        for side, size in (("train", letters), ("val", letters // 2)):
            (root / name / side).mkdir(parents=True)
            text = " ".join(rng.choice(words[name], size))[:size]
            (root / name / side / "a.txt").write_text(text)
    return root


def mixture(texts: Path, *weights: float) -> dict[str, tuple[str, float]]:
    return {n: (str(texts / n), w) for n, w in zip(NAMES, weights or (0.6, 0.4), strict=True)}


def command(texts: Path, workdir: Path, **changes: Any) -> list[str]:
    given = {"data__path": "", "data__mixture": mixture(texts), "report__probe_rows": EVAL_ROWS}
    return runs.command(workdir, texts, **{**given, **changes})


def run_of(texts: Path) -> setup.Run:
    flags = runs.flags(texts, data__path="", data__mixture=mixture(texts))
    return setup.prepare(load(runs.PAGE, flags).config)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended = runs.call(command(texts, workdir))
    assert ended.status == 0, ended.err
    assert "source web  0.6 of the rows; " in ended.out
    assert "'code' is read" not in ended.out
    return workdir


def test_loss_and_accuracy_of_each_source_follow_from_the_probe(whole):
    """The probe has every held-out row, with the nats of each token and the source of each."""
    row, probe = runs.rows(whole, "eval")[-1], Probe.read(whole)
    assert probe is not None
    label_NL, arrays = probe.tokens["label"], probe.at(row["step"])
    nats_NL = arrays["nats"].astype(np.float64)
    assert probe.tokens["label_names"].tolist() == list(NAMES)
    assert label_NL.shape == (EVAL_ROWS, 16) and Counter(label_NL[:, 0].tolist()) == {0: 7, 1: 5}
    for number, name in enumerate(NAMES):
        own = nats_NL[label_NL == number]
        # float32 sums of 100 losses of size 5.
        np.testing.assert_allclose(row[f"loss/{name}"], own.mean(), rtol=1e-5)
        bits = own.mean() / math.log(2)
        np.testing.assert_allclose(row[f"bits_per_byte/{name}"], bits, rtol=1e-5)
    both = (7 * row["loss/web"] + 5 * row["loss/code"]) / 12
    np.testing.assert_allclose(row["loss"], both, rtol=1e-6)
    accuracy = (7 * row["accuracy/web"] + 5 * row["accuracy/code"]) / 12
    np.testing.assert_allclose(row["accuracy"], accuracy, rtol=1e-12)


def test_routing_of_each_source_is_that_of_its_tokens(whole):
    row, probe = runs.rows(whole, "eval")[-1], Probe.read(whole)
    assert probe is not None
    label_NL, arrays = probe.tokens["label"], probe.at(row["step"])
    for layer, load_SE in enumerate(row["moe/load_by_task"]):
        for number, load_E in enumerate(load_SE):
            own = label_NL == number
            active = arrays["weight"][layer][own] > 0
            experts = arrays["expert"][layer][own][active]
            assert np.bincount(experts, minlength=4).tolist() == load_E
    assert np.sum(row["moe/load_by_task"], axis=1).tolist() == row["moe/load"]


def test_losses_of_training_are_means_over_the_rows_of_each_source(whole, texts):
    """Recomputed in numpy from the logits of the initial weights, for the first batch."""
    run = run_of(texts)
    with jax.set_mesh(run.mesh):
        state, batch = run.init_state(), run.data.train_batch(0)
        key = jax.random.wrap_key_data(state.key)
        logits_BLV, _ = jax.jit(run.task.apply, static_argnames="train")(
            state.params, state.gate_state, run.put(batch), state.step, key, train=True
        )
        _, metrics = run.train_step(state, run.put(batch))
    logits = np.asarray(logits_BLV, np.float64)
    totals = jax.device_get(metrics["totals"])
    sums: dict[str, list[float]] = {name: [] for name in NAMES}
    hits: dict[str, list[bool]] = {name: [] for name in NAMES}
    for row, number in enumerate(batch["source"]):
        for place in range(16):
            target, own = batch["tokens"][row, place + 1], logits[row, place]
            sums[NAMES[number]].append(np.log(np.exp(own).sum()) - own[target])
            hits[NAMES[number]].append(own.argmax() == target)
    for name in NAMES:
        loss, accuracy = totals.metrics[f"loss/{name}"], totals.metrics[f"accuracy/{name}"]
        assert loss.count == accuracy.count == len(sums[name]) > 0
        np.testing.assert_allclose(loss.value(), np.mean(sums[name]), rtol=1e-5)
        assert accuracy.value() == pytest.approx(np.mean(hits[name]))


def test_a_run_that_was_interrupted_ends_bit_for_bit_like_one_that_was_not(whole, texts, tmp_path):
    """Step 3 is within the first epoch of the smaller text, step 8 within the second."""
    workdir = tmp_path / "run"
    assert runs.call(command(texts, workdir, train__steps=3)).status == 0
    assert runs.steps(workdir) == [3]
    resumed = runs.call(command(texts, workdir))
    assert resumed.status == 0 and f"resuming {workdir} at step 3" in resumed.out
    own, wanted = runs.rows(workdir), runs.rows(whole)
    # The shorter run evaluated its last step too.
    assert [row for row in own if row["step"] != 3] == [row for row in wanted if row["step"] != 3]
    run = run_of(texts)
    assert runs.same_bits(runs.saved(workdir, run, 8), runs.saved(whole, run, 8))


def test_changed_weights_or_texts_are_refused_with_the_field(whole, texts):
    before = runs.files(whole)
    for other in (mixture(texts, 0.5, 0.5), dict(reversed(mixture(texts).items()))):
        argv = command(texts, whole, data__mixture=other)
        runs.refused(argv, f"data.mixture={other}", "but the run in", str(mixture(texts)))
    assert runs.files(whole) == before
    text = texts / "code" / "train" / "a.txt"
    content = text.read_bytes()
    try:
        text.write_bytes(content[::-1])
        runs.refused(command(texts, whole), "the tokens of data.mixture=")
    finally:
        text.write_bytes(content)


def test_config_json_has_the_share_and_the_epochs_of_each_source(whole):
    about = json.loads((whole / "config.json").read_text())
    assert list(about["mixture"]) == list(NAMES)
    rows = runs.STEPS * 8
    assert about["mixture"]["web"]["epochs"] == pytest.approx(math.ceil(0.6 * rows) / 43)
    assert about["mixture"]["code"]["share"] == 0.4
    assert about["evaluated"]["rows"] == EVAL_ROWS


def test_a_batch_in_parts_has_the_same_losses_of_each_source(whole, texts, tmp_path):
    ended = runs.call(command(texts, tmp_path / "run", train__grad_accum=4, report__probe_rows=0))
    assert ended.status == 0, ended.err
    same_sources(runs.rows(tmp_path / "run"), runs.rows(whole))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "expert": 1}, {"data": 2, "expert": 4}])
def test_any_mesh_reads_the_same_rows_and_has_the_same_losses(whole, texts, tmp_path, mesh):
    sizes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    ended = runs.call(command(texts, tmp_path / "run", **sizes))
    assert ended.status == 0, ended.err
    same_sources(runs.rows(tmp_path / "run"), runs.rows(whole))
    own, wanted = Probe.read(tmp_path / "run"), Probe.read(whole)
    assert own is not None and wanted is not None
    for name in ("token", "label", "row"):
        assert np.array_equal(own.tokens[name], wanted.tokens[name])


def same_sources(own: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Losses to 1e-5 after eight steps in another order of sums, counts exactly."""
    assert [(r["step"], r["split"]) for r in own] == [(r["step"], r["split"]) for r in wanted]
    for got, want in zip(own, wanted, strict=True):
        assert got.keys() == want.keys()
        for name in ("loss", *(f"loss/{name}" for name in NAMES)):
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
        by_source = [np.sum(row["moe/load_by_task"], axis=(0, 2)).tolist() for row in (got, want)]
        assert by_source[0] == by_source[1], "as many tokens of each source"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_on_the_same_rows_as_one(texts, tmp_path):
    two = test_two_processes
    fields = {"data.mixture": mixture(texts), "train.seq_len": 16, "train.eval_rows": EVAL_ROWS}
    two.train_in_two(two.CONFIG, tmp_path / "two", **fields)
    one = two.start("train", two.CONFIG, f"--workdir={tmp_path / 'one'}", *two.flags(**fields))
    two.finish(one)
    same_sources(two.rows(tmp_path / "two"), two.rows(tmp_path / "one"))
    own, wanted = Probe.read(tmp_path / "two"), Probe.read(tmp_path / "one")
    assert own is not None and wanted is not None
    for name, values in wanted.tokens.items():
        np.testing.assert_array_equal(own.tokens[name], values, err_msg=name)
    resumed = {**fields, "data.mixture": mixture(texts, 0.5, 0.5)}
    outputs = two.train_in_two(two.CONFIG, tmp_path / "two", status=2, **resumed)
    for said in two.errors(outputs):
        assert len(said) == 1 and "data.mixture=" in said[0]
