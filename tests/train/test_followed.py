"""A run whose tokens follow experts of a file, `moe.replay`."""

import json

import numpy as np
import pytest

from moejax.config import load
from moejax.errors import UserError
from moejax.record import experts
from moejax.train import setup
from moejax.train.probe import leakage
from tests.train import runs

STEPS, LAYERS, EXPERTS, K = 3, 2, 4, 2
PLAIN = {"moe__gate__name": "top_k", "moe__losses__load": 0.0, "mesh__expert": 1,
         "train__steps": STEPS}  # fmt: skip


def prepared(text, **changes):
    return setup.prepare(load(runs.PAGE, runs.flags(text, **{**PLAIN, **changes})).config)


def rows(batches):
    real = [(batch["tokens"][:, :-1], batch["valid"].any(axis=1)) for batch in batches]
    return np.unique(np.concatenate([token[own] for token, own in real]), axis=0)


@pytest.fixture(scope="module")
def tokens(text):
    run = prepared(text)
    train = rows(run.data.train_batch(step) for step in range(STEPS))
    return train, rows(run.eval_batches())


def written(path, token_NL, layers=LAYERS):
    drawn = np.random.default_rng(2).random((*token_NL.shape, layers, EXPERTS))
    experts.save(path, token_NL, np.argsort(drawn, axis=-1)[..., :K])
    return path


def test_batches_have_the_experts_of_their_rows(text, tokens, tmp_path):
    file = written(tmp_path / "a.npz", np.unique(np.concatenate(tokens), axis=0))
    run = prepared(text, moe__replay=file)
    run.check_gate_data(STEPS)
    known = experts.load(str(file))
    batch = run.data.train_batch(1)
    np.testing.assert_array_equal(batch["experts"], known.of(batch["tokens"][:, :-1]))
    assert batch["experts"].shape == (8, 16, LAYERS, K) and (batch["experts"] >= 0).all()
    shapes = run.data.shapes(8)
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {
        n: (x.shape, x.dtype) for n, x in batch.items()
    }
    assert "experts" not in prepared(text).data.train_batch(1)


def test_a_run_may_train_on_given_experts_and_evaluate_by_its_router(text, tokens, tmp_path):
    train, held_out = tokens
    run = prepared(text, moe__replay=written(tmp_path / "a.npz", train))
    run.check_gate_data(STEPS)
    with pytest.raises(UserError, match=r"moe.replay: held-out row 0 is not in the file"):
        run.check_gate_data(0)
    only = prepared(text, moe__replay=written(tmp_path / "b.npz", held_out))
    only.check_gate_data(0)
    with pytest.raises(UserError, match=r"row \d of the batch of step 0 is not in the file"):
        only.check_gate_data(STEPS)
    part = np.concatenate([train, held_out[:2]])
    with pytest.raises(UserError, match=r"held-out row \d+ is not in the file, which has 2 of"):
        prepared(text, moe__replay=written(tmp_path / "c.npz", part)).check_gate_data(STEPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe__replay": "/no/where.npz"}, "moe.replay='/no/where.npz' is not a file"),
        ({"moe__replay": __file__}, "is not a NumPy archive"),
        ({"moe__gate__name": "dense"}, "moe.gate.name=dense has no weights for experts that"),
        ({"moe__gate__name": "expert_choice"}, "has no weights for experts that"),
        ({"moe__gate__k": 3}, "has 2 experts per token, but moe.gate.k=3"),
        ({"moe__num_experts": 2}, "but num_experts=2"),
        ({"model__num_layers": 3}, "has 2 layers, but the model has 3 with experts, of 3"),
        ({"moe__every": 0}, "a dense model (moe.every=0) routes nothing"),
        ({"train__seq_len": 8}, "has rows of 16 tokens, but train.seq_len=8"),
        ({"train__seed": 7}, "is not in the file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(text, tokens, tmp_path, changes, message):
    file = written(tmp_path / "a.npz", np.unique(np.concatenate(tokens), axis=0))
    command = runs.command(tmp_path / "run", text, **{**PLAIN, "moe__replay": file, **changes})
    runs.refused(command, "moe.replay", message)
    assert not (tmp_path / "run").exists()


def test_the_leakage_of_given_experts_is_not_measured(text, tokens, tmp_path):
    file = written(tmp_path / "a.npz", tokens[1])
    config = load(runs.PAGE, runs.flags(text, **{**PLAIN, "moe__replay": file})).config
    with pytest.raises(UserError, match=r"--measure-leak: moe.replay=.* fixes the routing"):
        leakage.check(config)


@pytest.mark.slow
def test_a_runs_own_recording_gives_its_loss_and_moves_its_router(text, tmp_path):
    """The checkpoint's own router weighs the experts, and in training it gets a gradient."""
    # Without balance losses, which reach the router by themselves.
    plain = {**PLAIN, "moe__losses__load_balance": 0.0, "moe__losses__z": 0.0,
             "train__checkpoint_every": 1, "train__log_every": 1}  # fmt: skip
    assert runs.call(runs.command(tmp_path / "run", text, **plain)).status == 0
    file, workdir = tmp_path / "routing.npz", f"--workdir={tmp_path / 'run'}"
    own = runs.call(["eval", workdir, f"--record-routing={file}", f"--record-steps={STEPS}"])
    assert own.status == 0, own.err
    again = runs.call(["eval", workdir, f"--config.moe.replay={file}"])
    assert again.status == 0, again.err
    own, again = json.loads(own.out), json.loads(again.out)
    assert again["moe/load"] == own["moe/load"]
    assert again["loss"] == pytest.approx(own["loss"], rel=1e-6)  # float32, another program
    command = runs.command(tmp_path / "followed", text, **plain, moe__replay=file)
    ended = runs.call(command)
    assert ended.status == 0, ended.err
    found = experts.load(str(file))
    run = prepared(text)
    for step, logged in enumerate(runs.rows(tmp_path / "followed", "train")):
        chosen = found.of(run.data.train_batch(step)["tokens"][:, :-1])
        load = [np.bincount(chosen[:, :, m].ravel(), minlength=EXPERTS) for m in range(LAYERS)]
        np.testing.assert_array_equal(logged["moe/load"], load)
    states = [runs.saved(tmp_path / "followed", run, step) for step in (2, STEPS)]
    (name,) = (name for name in states[0] if "params" in name and "router_DE" in name)
    assert np.abs(states[1][name] - states[0][name]).max() > 1e-5
