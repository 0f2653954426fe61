"""Requirements of gate `replay` on a recording and a run, before anything is compiled."""

import json
import zipfile

import numpy as np
import pytest

from moejax import gating
from moejax.config import load
from moejax.errors import UserError
from moejax.options import DispatchOptions
from moejax.record import routing as recording
from moejax.record.routing import FIELDS, Recording, from_arrays, row_digests
from moejax.train import evaluate, record_routing, setup
from moejax.train.probe import leakage
from moejax.types import Visibility
from tests.train import runs

LAYERS, EXPERTS, LENGTH, COLUMNS, STEPS = 2, 4, 16, 2, 3
PLAIN = {"moe__gate__name": "top_k", "moe__losses__load": 0.0, "mesh__expert": 1,
         "train__steps": STEPS}  # fmt: skip


def prepared(text, **changes):
    return setup.prepare(load(runs.PAGE, runs.flags(text, **{**PLAIN, **changes})).config)


def routed(token, digest):
    """Some routing of rows: every token goes to experts 0 and 1."""
    shape = (LAYERS, *token.shape, COLUMNS)
    expert = np.broadcast_to(np.arange(COLUMNS, dtype=np.int32), shape)
    arrays = {
        "expert": expert,
        "weight": np.full(shape, 0.5, np.float32),
        "kept": np.ones(shape, bool),
        "identity": np.zeros(shape[:3], np.float32),
        "token": token,
        "digest": digest,
    }
    return from_arrays(arrays, 4)


def of(data, batches):
    """Some routing of the rows of these batches."""
    real = [setup.real_rows(batch) for batch in batches]
    token = [data.tokens(batch)[own] for batch, own in zip(batches, real, strict=True)]
    digest = [row_digests(batch)[own] for batch, own in zip(batches, real, strict=True)]
    return routed(np.concatenate(token), np.concatenate(digest))


@pytest.fixture(scope="module")
def recorded(text):
    """A routing of the rows of the tiny run."""
    run = prepared(text)
    train = [run.data.train_batch(step) for step in range(STEPS)]
    return Recording(
        of(run.data, run.eval_batches()), of(run.data, train), record_routing.about(run, 0)
    )


@pytest.fixture
def file(recorded, tmp_path):
    recording.save(tmp_path / "routing.npz", recorded)
    return tmp_path / "routing.npz"


def replaying(file, **changes):
    return {**PLAIN, "moe__gate__name": "replay", "moe__gate__path": file, **changes}


def refused(text, file, *parts, **changes):
    """Asserts that no run follows the file, in one line that has these words."""
    command = runs.command(file.parent / "run", text, **replaying(file, **changes))
    runs.refused(command, "moe.gate.path=", str(file), *parts)
    assert not (file.parent / "run").exists()


# ---------------------------------------------------------------- what the routing saw


@pytest.mark.parametrize(
    ("gate", "mark"), [("expert_choice", "train:future eval:future"), ("top_k", "")]
)
def test_a_replayed_routing_has_the_visibility_of_the_recorded_run(
    text, recorded, tmp_path, gate, mark
):
    leaking = {"moe__allow_future_leak": True}
    about = record_routing.about(prepared(text, moe__gate__name=gate, **leaking), 0)
    recording.save(tmp_path / "routing.npz", recorded._replace(about=about))
    changes = replaying(tmp_path / "routing.npz")
    assert prepared(text, **changes, **leaking).leak == mark
    if mark:
        with pytest.raises(UserError, match=r"gate.name=replay lets a token see later tokens"):
            prepared(text, **changes)


def test_a_routing_that_depended_on_other_sequences_is_marked_in_both_phases(recorded, file):
    about = {**recorded.about, "sees": ["others"]}
    recording.save(file, recorded._replace(about=about))
    moe = DispatchOptions(num_experts=EXPERTS).config
    seen = gating.make("replay", path=str(file)).visibility(moe)
    assert seen == Visibility(train_others=True, eval_others=True)


def test_the_leakage_of_a_replayed_routing_is_not_measured(text, file):
    config = load(runs.PAGE, runs.flags(text, **replaying(file))).config
    with pytest.raises(UserError, match=r"--measure-leak: the routing of gate 'replay' does not"):
        leakage.check(config)
    leakage.check(load(runs.PAGE, runs.flags(text, **PLAIN)).config)


# ---------------------------------------------------------------- files


def test_a_file_without_a_format_must_be_recorded_again(text, file):
    arrays = dict(np.load(file))
    del arrays["format"]
    np.savez(file, **arrays)
    refused(text, file, "format 1", "record it again")


def changed(file, **arrays):
    np.savez(file, **{**dict(np.load(file)), **arrays})


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("eval_expert", lambda x: x - 1, "ids -1 to 0, but num_experts=4"),
        ("train_expert", lambda x: x + 3, "ids 3 to 4, but num_experts=4"),
        ("eval_expert", lambda x: x * 0, "names an expert twice"),
        ("eval_expert", lambda x: x[0], "expert has shape"),
        ("eval_expert", lambda x: x / 2, "expert is float64"),
        ("train_expert", lambda x: x[..., :1], "train_weight is float32"),
        ("eval_weight", lambda x: x[:, :, :4], "eval_weight is float32"),
        ("eval_weight", lambda x: x - 1, "not finite or below 0"),
        ("eval_weight", lambda x: x * np.nan, "not finite or below 0"),
        ("eval_kept", lambda x: x[1:], "eval_kept is bool"),
        ("eval_digest", lambda x: x[1:], "eval_digest is uint64"),
        ("eval_identity", lambda x: x[:, 1:], "eval_identity is float32"),
        ("eval_identity", lambda x: x + np.inf, "identity has numbers that are not finite"),
        ("about", lambda x: json.dumps([4]), "names no num_experts"),
        ("about", lambda x: json.dumps(4), "names no num_experts"),
        ("about", lambda x: json.dumps({"num_experts": 4}), "sees=None"),
        ("about", lambda x: json.dumps({"num_experts": 4, "sees": ["x"]}), "sees=['x']"),
        ("about", lambda x: "{", "is not a routing that"),
        ("format", lambda x: np.asarray("two"), "is not a routing that"),
    ],
)  # fmt: skip
def test_invalid_arrays_are_reported_in_one_line(recorded, tmp_path, field, change, message):
    file = tmp_path / "routing.npz"
    recording.save(file, recorded)
    changed(file, **{field: change(np.load(file)[field])})
    with pytest.raises(ValueError, match=r"^is not a routing that") as error:
        recording.load(str(file))
    assert message in str(error.value)


def test_a_truncated_or_garbled_file_is_a_value_error(recorded, tmp_path):
    """Or reads the same: not every byte of a zip file is used."""
    file = tmp_path / "routing.npz"
    recording.save(file, recorded)
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    cut = [content[:at] for at in rng.integers(0, len(content), 40)]
    garbled = []
    for at in rng.integers(0, len(content) - 4, 160):
        garbled.append(content[:at] + rng.bytes(4) + content[at + 4 :])
    refusals = 0
    for number, other in enumerate([*cut, *garbled, b"", b"PK\x03\x04 and more"]):
        broken = tmp_path / f"{number}.npz"
        broken.write_bytes(other)
        try:
            found = recording.load(str(broken))
        except ValueError:
            refusals += 1
        else:
            np.testing.assert_array_equal(found.eval.expert_MNLK, recorded.eval.expert_MNLK)
    assert refusals > 100


def test_a_truncated_file_and_a_single_array_are_reported_in_one_line_by_the_command(text, file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(text, file, "is not a routing that")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("about.npy", b"nothing")
    refused(text, file, "is not a routing that")
    with open(file, "wb") as out:
        np.save(out, np.zeros(3))
    refused(text, file, "is not a routing that")


def test_a_path_may_begin_with_the_home_folder(text, file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    prepared(text, **replaying("~/routing.npz")).check_gate_data(STEPS)


def test_a_recording_needs_a_name(tmp_path):
    runs.refused(["eval", f"--workdir={tmp_path}", "--record-routing="], "must name a file")


# ---------------------------------------------------------------- rows


def test_recorded_rows_are_accepted(text, file):
    prepared(text, **replaying(file)).check_gate_data(STEPS)
    # Batches of another size hold the same rows, and fewer steps need fewer of them.
    other = replaying(file, train__batch_size=4, train__steps=1)
    prepared(text, **other).check_gate_data(1)


def test_other_text_is_refused(text, file, tmp_path):
    other = runs.write_text(tmp_path / "text")
    for path in sorted(other.glob("*.txt")):
        path.write_text(path.read_text()[::-1])
    refused(other, file, "was recorded of other data: eval row 0")


def test_another_order_of_the_training_rows_is_refused(text, file):
    refused(text, file, "other data: train row", "train.seed", train__seed=7)


def test_fewer_held_out_rows_are_refused(text, file):
    refused(text, file, "other data: eval row", "train.eval_rows", train__eval_rows=3)


def test_equal_rows_have_equal_digests_and_different_rows_different_ones():
    batch = {"tokens": np.arange(12).reshape(4, 3) % 6, "valid": np.ones((4, 3), bool),
             "row": np.arange(4)}  # fmt: skip
    first = row_digests(batch)
    assert first.dtype == np.uint64 and first.shape == (4,)
    assert first[0] == first[2] and first[1] == first[3] and first[0] != first[1]
    padded = row_digests({**batch, "valid": np.arange(12).reshape(4, 3) > 0})
    assert (padded != first).tolist() == [True, False, False, False]


# ---------------------------------------------------------------- what is recorded


@pytest.mark.parametrize(
    ("gate", "words"), [("soft", "mixes slots"), ("smear", "mixes weights"), ("lory", "mixes")]
)
def test_a_gate_that_mixes_has_no_routing_to_record(text, tmp_path, gate, words):
    config = load(runs.PAGE, runs.flags(text, **{**PLAIN, "moe__gate__name": gate})).config
    with pytest.raises(UserError, match=rf"--record-routing=.*gate '{gate}' {words}"):
        evaluate.evaluate(config, str(tmp_path), record_routing_to=str(tmp_path / "a.npz"))


# ---------------------------------------------------------------- size


def test_the_announced_size_is_that_of_the_arrays(text, recorded):
    splits = (recorded.eval, recorded.train)
    arrays = [getattr(routed, field) for routed in splits for field in FIELDS.values()]
    assert record_routing.recording_bytes(prepared(text), STEPS) == sum(x.nbytes for x in arrays)


def test_a_recording_this_machine_cannot_hold_is_refused(capsys):
    record_routing.check_size(3_000, "a.npz")  # too little to speak of
    record_routing.check_size(3_000_000, "a.npz")
    assert capsys.readouterr().err == "moejax: recording 3 MB, less when compressed\n"
    with pytest.raises(UserError, match=r"--record-routing=a.npz would take .* GiB of memory"):
        record_routing.check_size(10**17, "a.npz")


def test_more_steps_than_the_run_has_are_refused_before_anything_is_opened(text, tmp_path):
    config = load(runs.PAGE, runs.flags(text, **PLAIN)).config
    file = str(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"--record-steps=1000000 is more than .* train.steps=3"):
        evaluate.evaluate(config, str(tmp_path), record_routing_to=file, record_steps=10**6)
    with pytest.raises(UserError, match=r"is a folder; name a file"):
        evaluate.evaluate(config, str(tmp_path), record_routing_to=str(tmp_path))
