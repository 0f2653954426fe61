"""Runs on packed documents through the command line."""

import json

import numpy as np
import pytest

from moejax.config import load
from moejax.train import setup
from tests.train import runs

PACKED = {
    "data__packing": "best_fit",
    "moe__gate__name": "top_k",
    "moe__losses__load": 0.0,
    "train__seq_len": 32,
}
CHANGES = [
    ({"moe__gate__name": "soft", "moe__allow_future_leak": True}, "moe.gate.name=soft mixes slots"),
    (
        {"moe__gate__name": "smear", "moe__allow_future_leak": True},
        "moe.gate.name=smear mixes weights",
    ),
    ({"model__mod_capacity": 0.5, "model__mod_every": 1}, "model.mod_capacity=0.5 chooses among"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sixty documents, most of which are shorter than a row."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["gate", "router", "expert", "token", "load", "a", "the", "to"]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words, rng.integers(1, 9))))
    return folder


def prepared(text, **changes):
    return setup.prepare(load(runs.PAGE, runs.flags(text, **{**PACKED, **changes})).config)


@pytest.mark.parametrize("changes, reason", CHANGES)
def test_a_model_that_would_mix_documents_is_refused_before_anything_is_made(
    text, tmp_path, changes, reason
):
    argv = runs.command(tmp_path / "run", text, **{**PACKED, **changes})
    runs.refused(argv, f"data.packing=best_fit: {reason}", "or data.packing=none")
    assert not (tmp_path / "run").exists()


def test_batches_are_the_same_on_any_mesh(text):
    one, eight = (prepared(text, mesh__expert=1, mesh__data=n) for n in (1, 8))
    for step in (0, 3):
        for name, values in one.data.train_batch(step).items():
            np.testing.assert_array_equal(eight.data.train_batch(step)[name], values)
    assert one.mesh.size == 1 and eight.mesh.size == 8


@pytest.mark.slow
def test_a_run_on_one_device_loses_what_a_run_on_eight_does(text, tmp_path):
    lost = []
    for devices in (1, 8):
        mesh = {"mesh__expert": 1, "mesh__data": devices}
        ended = runs.call(runs.command(tmp_path / f"{devices}", text, **PACKED, **mesh))
        assert ended.status == 0, ended.err
        lost.append([row["loss"] for row in runs.rows(tmp_path / f"{devices}")])
    # Sums of the same float32 numbers in another order, over eight updates.
    np.testing.assert_allclose(lost[0], lost[1], rtol=1e-4)


@pytest.mark.slow
def test_a_packed_run_that_stops_and_goes_on_ends_as_one_that_did_not(text, tmp_path, capfd):
    whole = runs.call(runs.command(tmp_path / "whole", text, **PACKED))
    assert whole.status == 0, whole.err
    assert "packing     best_fit: " in whole.out
    short = runs.command(tmp_path / "parts", text, **PACKED, train__steps=4)
    assert runs.call(short).status == 0
    ended = runs.call(runs.command(tmp_path / "parts", text, **PACKED))
    assert ended.status == 0, ended.err
    run = prepared(text)
    a, b = (runs.saved(tmp_path / name, run) for name in ("whole", "parts"))
    assert runs.same_bits(a, b)
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["packing"]["train"]["rows"] == runs.text_of(run).train.num_rows
    # Another packing is another order, which a run may not change.
    other = {**PACKED, "data__packing": "greedy", "train__steps": 9}
    runs.refused(runs.command(tmp_path / "whole", text, **other), "data.packing")


@pytest.mark.slow
def test_experts_recorded_on_packed_rows_are_followed(text, tmp_path):
    assert runs.call(runs.command(tmp_path / "run", text, **PACKED)).status == 0
    file = tmp_path / "experts.npz"
    recorded = runs.call(
        ["eval", f"--workdir={tmp_path / 'run'}", f"--record-routing={file}", "--record-steps=8"]
    )
    assert recorded.status == 0, recorded.err
    follow = runs.command(tmp_path / "again", text, **PACKED, moe__replay=file)
    ended = runs.call(follow)
    assert ended.status == 0, ended.err
    assert runs.rows(tmp_path / "again", "train")[-1]["loss"] > 0
