"""The measured leak: what an evaluation gains from later tokens, against truncated sequences."""

import functools
import json

import jax
import numpy as np
import pytest

from moejax.config import load
from moejax.train import setup
from moejax.train.checkpoint.checkpointer import Checkpointer
from tests.train import runs

L, MEASURED = 4, 4
CAUSAL = {
    "hash": {"moe__gate__table": "balanced", "moe__gate__k": 2},
    "expert_choice_causal": {},
    "lory": {"moe__gate__segment": 2},
}
LEAKING = {
    "expert_choice": {"moe__allow_future_leak": True, "optim__learning_rate": 0.1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Trains a gate for three steps, once; (workdir, what `moejax eval --measure-leak` printed)."""
    done = {}

    def finish(gate):
        if gate not in done:
            folder = tmp_path_factory.mktemp(gate)
            text = runs.write_text(folder / "text")
            changes = {
                "moe__gate__name": gate,
                "moe__losses__load": 0.0,
                "train__steps": 3,
                "train__seq_len": L,
                "mesh__expert": 1,
                **{**CAUSAL, **LEAKING}[gate],
            }
            ended = runs.call(runs.command(folder / "run", text, **changes))
            assert ended.status == 0, ended.err
            before = runs.files(folder / "run")
            measured = runs.call(
                ["eval", f"--workdir={folder / 'run'}", f"--measure-leak={MEASURED}"]
            )
            assert measured.status == 0, measured.err
            assert runs.files(folder / "run") == before, "evaluation writes nothing"
            done[gate] = folder / "run", json.loads(measured.out)
        return done[gate]

    return finish


def cut_short(workdir):
    """Nats per token of the measured sequences, whole, and each token predicted from a sequence
    that ends with the one before it: programs of L shapes, without any padding."""
    run = setup.prepare(load(str(workdir / "config.json")).config)
    (batch,) = run.data.eval_batches(MEASURED, MEASURED)
    with (
        jax.set_mesh(run.mesh),
        Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints,
    ):
        restored = checkpoints.restore(run.abstract_state)
        assert restored is not None
        state = restored.state
        key = jax.random.wrap_key_data(state.key)
        apply = jax.jit(functools.partial(run.task.apply, train=False))

        def nats(length):
            part = {"tokens": batch["tokens"][:, : length + 1], "row": batch["row"],
                    "valid": batch["valid"][:, :length]}  # fmt: skip
            logits_BLV, _ = apply(state.params, state.gate_state, part, state.step, key)
            log_p_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
            target_BL1 = part["tokens"][:, 1:, None]
            return -np.take_along_axis(log_p_BLV, target_BL1, axis=-1)[..., 0]

        each = [nats(length) for length in range(1, L + 1)]
    return each[-1].mean(), np.mean([part[:, -1] for part in each])


@pytest.mark.slow
@pytest.mark.parametrize("gate", LEAKING)
def test_leakage_is_the_loss_of_truncated_sequences_minus_that_of_whole_ones(finished, gate):
    workdir, row = finished(gate)
    whole, causal = cut_short(workdir)
    # The same float32 sums in programs of other shapes.
    assert row["leak/with_future"] == pytest.approx(whole, rel=1e-5)
    assert row["leak/without_future"] == pytest.approx(causal, rel=1e-5)
    difference = row["leak/without_future"] - row["leak/with_future"]
    assert row["leak/nats_per_token"] == pytest.approx(difference, abs=1e-9)
    assert abs(difference) > 1e-3, "whoever sees the future predicts otherwise"
    assert row["leak/tokens"] == MEASURED * L and row["leak/sequences"] == MEASURED
    assert row["leak"] == "train:future eval:future"


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["hash", "expert_choice_causal", "lory"])
def test_a_causal_evaluation_has_no_leakage(finished, gate):
    workdir, row = finished(gate)
    # Masked or not, the same numbers are added: float32 rounding of a loss of about 5.
    assert abs(row["leak/nats_per_token"]) < 1e-5
    assert row["leak/with_future"] > 1
    assert "eval" not in row["leak"]
    held_out = {name: value for name, value in row.items() if not name.startswith("leak/")}
    assert held_out == runs.rows(workdir, "eval")[-1]


@pytest.mark.slow
def test_sequences_are_rounded_up_to_whole_groups(finished):
    workdir, _ = finished("hash")
    ended = runs.call(["eval", f"--workdir={workdir}", "--measure-leak=3", "--config.moe.group=4",
                       "--config.moe.eval_transport=cells"])  # fmt: skip
    assert ended.status == 0, ended.err
    row = json.loads(ended.out)
    assert row["leak/sequences"] == 4 and row["leak/tokens"] == 4 * L
    assert row["leak"] == "train:others eval:others"
