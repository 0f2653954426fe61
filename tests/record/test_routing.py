"""The routing file that one evaluation writes and another follows."""

import json

import numpy as np
import pytest

from moejax.record import routing as recording
from tests.train import runs

STEPS = 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run, the routing of its last checkpoint, and the row of the evaluation that wrote it."""
    folder = tmp_path_factory.mktemp("recording")
    text = runs.write_text(folder / "text")
    command = runs.command(
        folder / "run", text, train__steps=STEPS, train__checkpoint_every=2,
        moe__gate__name="top_k",
    )  # fmt: skip
    assert runs.call(command).status == 0
    file = folder / "routing.npz"
    ended = runs.call(
        ["eval", f"--workdir={folder / 'run'}", f"--record-routing={file}", "--record-steps=3"]
    )
    assert ended.status == 0, ended.err
    return folder, file, json.loads(ended.out)


@pytest.mark.slow
def test_the_file_holds_every_row_by_layer(recorded):
    _, file, row = recorded
    found = recording.load(str(file))
    layers, rows, length, columns = found.eval.expert_MNLK.shape
    assert (layers, length, columns) == (2, 16, 2) and found.num_experts == 4
    assert found.train.expert_MNLK.shape == (2, 3 * 8, 16, 2)
    # Counted by expert they are the loads of the evaluation's row.
    load = [
        np.bincount(found.eval.expert_MNLK[layer].ravel(), minlength=4) for layer in range(layers)
    ]
    np.testing.assert_array_equal(load, row["moe/load"])
    assert found.eval.kept_MNLK.all()  # dropless
    np.testing.assert_allclose(
        found.eval.weight_MNLK.sum(-1), 1, rtol=1e-6
    )  # Mixtral's float32 softmax
    assert found.eval.token_NL.shape == (rows, length)


@pytest.mark.slow
def test_the_same_weights_under_their_own_routing_give_the_same_loss(recorded):
    folder, file, row = recorded
    ended = runs.call(
        ["eval", f"--workdir={folder / 'run'}", "--config.moe.gate.name=replay",
         f"--config.moe.gate.path={file}"]
    )  # fmt: skip
    assert ended.status == 0, ended.err
    again = json.loads(ended.out)
    assert again["step"] == STEPS and again["moe/load"] == row["moe/load"]
    assert again["loss"] == pytest.approx(row["loss"], rel=1e-6)  # float32, another program


@pytest.mark.slow
def test_older_weights_under_the_last_routing_equal_neither_checkpoint(recorded):
    """The cost of a router's drift: the other checkpoint's own loss differs from it."""
    folder, file, row = recorded
    workdir, older = f"--workdir={folder / 'run'}", "--step=2"
    replay = ["--config.moe.gate.name=replay", f"--config.moe.gate.path={file}"]
    own, other = (
        json.loads(runs.call(["eval", workdir, older, *more]).out) for more in ([], replay)
    )
    assert other["moe/load"] == row["moe/load"] != own["moe/load"]
    assert other["loss"] != own["loss"] and other["step"] == own["step"] == 2


@pytest.mark.slow
def test_a_run_trains_on_a_routing_that_never_moves(recorded):
    folder, file, row = recorded
    command = runs.command(
        folder / "frozen", folder / "text", train__steps=3, train__log_every=1,
        moe__gate__name="replay", moe__gate__path=file,
    )  # fmt: skip
    ended = runs.call(command)
    assert ended.status == 0, ended.err
    train = recording.load(str(file)).train.expert_MNLK
    for step, logged in enumerate(runs.rows(folder / "frozen", "train")):
        rows = train[:, 8 * step : 8 * step + 8].reshape(2, -1)
        assert logged["moe/load"] == [np.bincount(r, minlength=4).tolist() for r in rows]
    assert runs.rows(folder / "frozen", "eval")[-1]["moe/load"] == row["moe/load"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe__gate__path": ""}, "moe.gate.path='' must name a recorded routing"),
        ({"moe__gate__path": "/nowhere.npz"}, "moe.gate.path='/nowhere.npz' cannot be read"),
        ({"moe__gate__path": __file__}, "is not a routing that"),
        ({"moe__num_experts": 8}, "was recorded with 4 experts, but num_experts=8"),
        ({"train__steps": 4}, "2 layers x 24 train rows x 16 positions, but 2 x 32 x 16"),
        ({"train__seq_len": 32}, "record with the same model and train.seq_len"),
        ({"model__num_layers": 3}, "but 3 x 24 x 16 are needed"),
    ],
)
def test_a_file_that_does_not_fit_is_reported_in_one_line(recorded, changes, message, tmp_path):
    folder, file, _ = recorded
    fields = {"moe__gate__name": "replay", "moe__gate__path": file, "train__steps": 3, **changes}
    ended = runs.call(runs.command(tmp_path / "run", folder / "text", **fields))
    assert ended.status == 2 and message in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recording_that_cannot_be_written_is_refused_before_anything_is_evaluated(recorded):
    folder, _, _ = recorded
    workdir = f"--workdir={folder / 'run'}"
    ended = runs.call(["eval", workdir, f"--record-routing={folder}/no/where.npz"])
    assert ended.status == 2 and "does not exist" in ended.err and not ended.out
    ended = runs.call(["eval", workdir, "--record-steps=2"])
    assert ended.status == 2 and "needs --record-routing" in ended.err
