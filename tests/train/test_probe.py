"""The probe files of a run, resumed or not."""

import jax
import numpy as np
import pytest

from moejax.config import load
from moejax.data.domains import token_labels
from moejax.record import probe
from moejax.record.probe import Probe
from moejax.train import setup
from moejax.train.probe import arrays
from moejax.train.probe.recorder import Recorder, check
from tests.train import runs
from tests.train.runs import EVAL, STEPS, call, command, copy
from tests.train.sharing import Compilations, prepared

ROWS = 5
ON = {"report.probe_rows": ROWS, "moe.group": "2"}
"""Five of the evaluation's rows, in three batches of two: the last one is filled up."""


def files(workdir):
    return {p.name: p.read_bytes() for p in sorted(probe.folder(workdir).iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared, text):
    """A run with a probe, left alone; copies of it before steps 5 and 8; what it compiled."""
    folder = tmp_path_factory.mktemp("probe")

    def before(step):
        compilations.at(step)
        if step in (5, 8):
            runs.snapshot(folder / "run", folder / str(step))

    with Compilations() as compilations, shared.steps(before=before):
        ended = call(command(folder / "run", text, **ON))
    assert (ended.status, ended.err) == (0, "")
    return folder, compilations.found


def read(workdir) -> Probe:
    found = Probe.read(workdir)
    assert found is not None and not found.problems
    return found


@pytest.mark.slow
def test_a_run_records_before_its_first_step_and_at_every_evaluation_with_one_program(finished):
    folder, compilations = finished
    assert read(folder / "run").steps == [0, EVAL, STEPS]
    assert [step for step, name in compilations if name == "probe_forward"] == [0]
    # By step 3 the run has trained, logged and saved; the evaluation compiles nothing else.
    assert [found for found in compilations if found[0] > 3] == [(EVAL, "eval_step")]


@pytest.mark.slow
def test_the_recorded_routing_equals_that_of_the_evaluation(finished):
    """Row by row what `moejax eval --record-routing` writes of the last checkpoint."""
    folder, _ = finished
    file = folder / "routing.npz"
    ended = call(["eval", f"--workdir={folder / 'run'}", f"--record-routing={file}"])
    assert ended.status == 0, ended.err
    found = read(folder / "run")
    last, row_N = found.at(STEPS), found.tokens["row"]
    assert len(row_N) == ROWS < 12
    with np.load(file) as recorded:
        for name in ("expert", "kept"):
            np.testing.assert_array_equal(last[name], recorded[f"eval_{name}"][:, row_N])
        weight = recorded["eval_weight"][:, row_N]
        np.testing.assert_allclose(last["weight"], weight, rtol=1e-5)  # another program
        np.testing.assert_array_equal(found.tokens["token"], recorded["eval_token"][row_N])
    assert last["kept"].all() and (found.at(0)["expert"] != last["expert"]).any()
    experts = last["num_experts"]
    assert experts == 4 and last["expert_similarity"].shape == (2, experts, experts)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["5", "8"])
def test_a_resumed_run_leaves_the_same_files_and_does_not_record_step_0_again(
    moment, finished, shared, text, tmp_path
):
    folder, _ = finished
    workdir = copy(folder / moment, tmp_path / "run")
    first = probe.step_path(workdir, 0)
    written = first.stat().st_mtime_ns
    # Something that a run which went on elsewhere left behind.
    probe.step_path(workdir, 7).write_bytes(b"of another mesh")
    probe.step_path(workdir, 99).write_bytes(b"of a longer run")
    assert call(command(workdir, text, **ON)).status == 0
    assert files(workdir) == files(folder / "run")
    assert first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_records_everything_again(
    finished, shared, text, tmp_path
):
    folder, _ = finished
    workdir = copy(folder / "5", tmp_path / "run")
    for checkpoint in (workdir / "checkpoints").iterdir():
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        checkpoint.rmdir()
    assert call(command(workdir, text, **ON)).status == 0
    assert files(workdir) == files(folder / "run")


@pytest.mark.slow
def test_the_probe_changes_nothing_else_of_a_run(finished, shared, text, tmp_path):
    folder, _ = finished
    off = {**ON, "report.probe_rows": 0}
    assert call(command(tmp_path / "off", text, **off)).status == 0
    assert not probe.folder(tmp_path / "off").exists()
    with_probe = (folder / "run" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "off" / "metrics.jsonl").read_bytes() == with_probe


@pytest.mark.slow
def test_another_number_of_rows_is_refused_and_zero_rows_are_accepted(
    finished, shared, text, tmp_path
):
    folder, _ = finished
    workdir = copy(folder / "8", tmp_path / "run")
    before = runs.files(workdir)
    other = {**ON, "report.probe_rows": 3}
    runs.refused(command(workdir, text, **other), "report.probe_rows=3", "5 sequences")
    assert runs.files(workdir) == before
    assert call(command(workdir, text, **{**ON, "report.probe_rows": 0})).status == 0
    found = Probe.read(workdir)
    assert found is not None and found.steps == [0]
    assert found.problems == [f"{probe.step_path(workdir, n)} is missing" for n in (EVAL, STEPS)]


def recorder(text, folder, **changes):
    run = prepared(text, **{"mesh.expert": 1, **changes})
    return run, Recorder(run, folder, resume_step=None)


def test_tokens_are_rows_of_the_evaluation_with_their_targets_and_texts(text, tmp_path):
    run, _ = recorder(text, tmp_path, **ON)
    tokens = read_tokens(tmp_path)
    batches = run.eval_batches()
    held_out = np.concatenate([batch["tokens"] for batch in batches])
    count = sum(int(batch["valid"].any(1).sum()) for batch in batches)
    # Five evenly spread ones.
    assert tokens["row"].tolist() == [j * count // 5 for j in range(5)]
    np.testing.assert_array_equal(tokens["token"], held_out[tokens["row"], :-1])
    np.testing.assert_array_equal(tokens["target"], held_out[tokens["row"], 1:])
    assert tokens["valid"].all() and "label" not in tokens
    spelled = "".join(tokens["token_text"][tokens["token"][0]])
    assert spelled.encode() == bytes(tokens["token"][0].astype(np.uint8))


def read_tokens(workdir):
    return probe.Arrays(probe.folder(workdir) / "tokens.npz")


@pytest.mark.slow
def test_tokens_of_python_source_carry_the_label_of_their_place_in_the_text(tmp_path):
    run = setup.prepare(load("configs/lm.py:size=debug", ["mesh.expert=1"]).config)
    Recorder(run, tmp_path, None)
    tokens = read_tokens(tmp_path)
    assert tokens["label_names"].tolist() == ["code", "comment", "docstring", "english"]
    corpus, length = runs.text_of(run).corpus, run.config.train.seq_len
    labels_N = token_labels(corpus)[1]
    stream = bytes(corpus.heldout_N.astype(np.uint8))
    available = (len(stream) - 1) // length
    for i, row in enumerate(tokens["row"]):
        at = row * available // 16 * length  # of the 16 rows of an evaluation
        assert stream[at : at + length] == bytes(tokens["token"][i].astype(np.uint8))
        np.testing.assert_array_equal(tokens["label"][i], labels_N[at : at + length])
    assert len(np.unique(tokens["label"])) == 3


def test_dense_models_and_no_rows_leave_nothing(text, tmp_path):
    for changes in ({"moe.every": 0}, {}):
        run, nothing = recorder(text, tmp_path, **changes)
        nothing.record(0, run.abstract_state)
    assert list(tmp_path.iterdir()) == []


def test_no_more_rows_than_an_evaluation_has(text, tmp_path):
    run, _ = recorder(text, tmp_path, **{**ON, "report.probe_rows": 500})
    rows = sum(int(batch["valid"].any(1).sum()) for batch in run.eval_batches())
    assert len(read_tokens(tmp_path)["row"]) == rows < 500
    check(run, tmp_path)  # as many as there are


def test_one_entry_adds_an_array_to_the_files(text, tmp_path, monkeypatch):
    """One array of every kind, added from outside: nothing but ``ARRAYS`` changes."""
    entries: dict[str, arrays.RecordedArray] = {
        "first_input": arrays.TokenArray("float32", "MNL", lambda x_BLD, info: x_BLD[..., 0]),
        "double_nats": arrays.OutputArray(
            "float32", "NL", lambda task, output, batch: 2 * task.token_losses(output, batch)
        ),
        "largest_weight": arrays.WeightArray(
            "float32", "M", lambda task, params: task.expert_layers(params)["up_EDF"].max((1, 2, 3))
        ),
        "tokens": arrays.InputStatistic("int32", "M", lambda x_TD, expert_T: len(x_TD)),
        "seed": arrays.Constant("int32", "", lambda run: run.config.train.seed),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(arrays.ARRAYS, name, entry)
    run, recording = recorder(text, tmp_path, **ON)
    with jax.set_mesh(run.mesh):
        state = run.init_state()
        recording.record(0, state)
    found = read(tmp_path).at(0)
    assert set(entries) <= set(found)
    layers, length = run.task.model.num_moe_layers, run.config.train.seq_len
    assert found["first_input"].shape == (layers, ROWS, length)
    assert np.abs(found["first_input"]).max() > 0
    np.testing.assert_array_equal(found["double_nats"], 2 * found["nats"])
    up_MEDF = np.asarray(run.task.expert_layers(state.params)["up_EDF"])
    np.testing.assert_array_equal(found["largest_weight"], up_MEDF.max((1, 2, 3)))
    assert found["tokens"].tolist() == [ROWS * length] * layers
    assert found["seed"] == run.config.train.seed


GATES = {
    "dense": {},
    "dselect_k": {},
    "expert_choice": {"moe.allow_future_leak": True},
    "hash": {"moe.gate.table": "balanced", "moe.gate.k": 2},
    "remoe": {},
    "rl": {},
    "thor": {},
    "xmoe": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_a_bfloat16_model_records_possible_values_with_every_kind_of_gate(gate, text, tmp_path):
    changes = {"moe.gate.name": gate, "moe.losses.load": 0.0, "model.dtype": "bfloat16"}
    run, recording = recorder(text, tmp_path, **{**ON, **changes, **GATES[gate]})
    with jax.set_mesh(run.mesh):
        recording.record(0, run.init_state())
    seen, experts = read(tmp_path).at(0), 4
    active = seen["weight"] > 0
    assert (seen["kept"] == active).all(), "dropless"
    assert active.any() and np.isfinite(seen["weight"]).all()
    assert seen["expert"].min() >= 0 and seen["expert"].max() < experts
    visits = (np.eye(experts, dtype=int)[seen["expert"]] * active[..., None]).sum(-2)
    assert visits.max() == 1, "a token visits an expert once"
    assert (seen["entropy"] >= -1e-6).all() and (seen["entropy"] <= np.log(experts) + 1e-6).all()
    assert (seen["margin"] >= 0).all() and (seen["margin"] <= 1).all()
    assert (np.abs(seen["log_z"]) <= seen["max_logit"] + np.log(experts) + 1e-5).all()
    assert seen["nats"].mean() == pytest.approx(np.log(256), abs=1), "nothing is learned yet"
    assert ("router_similarity" in seen) == (gate not in ("dselect_k", "hash", "thor"))
    similarity = seen["expert_similarity"]
    np.testing.assert_allclose(similarity, np.broadcast_to(np.eye(experts), (2, 4, 4)), atol=0.2)
    assert (seen["participation"] > 1).all() and (seen["participation"] < 16).all()
    assert (seen["collapse"] > 0).all() or np.isnan(seen["collapse"]).any()
