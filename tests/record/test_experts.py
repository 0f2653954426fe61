"""The file of expert ids that were chosen elsewhere."""

import numpy as np
import pytest

from moejax.record import experts, routing
from moejax.record.experts import Choices, fitted, load, of_recording, rows_of, save
from moejax.record.routing import Recording, from_arrays

ROWS, LENGTH, LAYERS, K, E = 3, 5, 2, 2, 4


def some(layers=LAYERS, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (ROWS, LENGTH))
    ids = np.argsort(rng.random((ROWS, LENGTH, layers, E)), axis=-1)[..., :K]
    return tokens, ids


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64"])
def test_a_row_is_found_by_its_tokens_wherever_it_is(tmp_path, kind):
    tokens, ids = some()
    save(tmp_path / "a.npz", tokens, ids.astype(kind))
    found = load(str(tmp_path / "a.npz"))
    batch = np.stack([tokens[2], tokens[0], tokens[0] + 1]).astype(np.int32)
    np.testing.assert_array_equal(found.find(batch), [2, 0, -1])
    experts_BLMK = found.of(batch)
    np.testing.assert_array_equal(experts_BLMK[:2], ids[[2, 0]])
    assert (experts_BLMK[2] == experts.ABSENT).all() and experts_BLMK.dtype == np.int32


def test_samples_of_an_engine_become_rows():
    """n tokens have n - 1 entries: the last token was never an input."""
    _, ids = some()
    tokens, rows = rows_of([([7, 8, 9], ids[0, :2]), ([1, 2, 3, 4, 5], ids[1])], LENGTH)
    assert tokens.tolist() == [[7, 8, 0, 0, 0], [1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(rows[0, :2], ids[0, :2])
    np.testing.assert_array_equal(rows[1], ids[1])
    assert (rows[0, 2:] == -1).all()
    unsigned = rows_of([([7, 8], ids[0, :1].astype(np.uint8))], 3)[1]
    assert (unsigned[0, 1:] == -1).all()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no samples"),
        ([([1, 2, 3, 4], np.zeros((2, LAYERS, K), int))], r"sample 0 has 4 tokens and experts"),
        ([([1, 2], np.zeros((2, K), int))], r"not \[n - 1 or n, layers, k\]"),
        ([(range(9), np.zeros((8, LAYERS, K), int))], "8 tokens, more than length=5"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        rows_of(samples, LENGTH)


def test_ids_of_dense_layers_are_ignored():
    tokens, ids = some(layers=5)
    ids[:, :, [0, 2, 4]] = 0  # what engines return for them
    kept = fitted(Choices(tokens.astype(np.int32), ids), [1, 3], 5, K, E, LENGTH)
    np.testing.assert_array_equal(kept.expert_NLMK, ids[:, :, [1, 3]])
    own = fitted(Choices(tokens.astype(np.int32), ids[:, :, [1, 3]]), [1, 3], 5, K, E, LENGTH)
    np.testing.assert_array_equal(own.expert_NLMK, kept.expert_NLMK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :, :1], "has 1 layers, but the model has 2 with experts, of 3"),
        (lambda x: x[..., :1], "has 1 experts per token, but moe.gate.k=2"),
        (lambda x: x + 1, "has ids 1 to 4, but num_experts=4"),
        (lambda x: x * 0, "names an expert twice"),
        (lambda x: np.where(np.arange(K) == 0, x, -1), "has ids -1 to"),
    ],
)
def test_choices_that_do_not_fit_the_model_are_refused(change, message):
    tokens, ids = some()
    choices = Choices(tokens.astype(np.int32), change(ids))
    with pytest.raises(ValueError, match=message) as error:
        fitted(choices, [0, 2], 3, K, E, LENGTH)
    assert "\n" not in str(error.value)


def test_rows_of_another_length_are_refused():
    tokens, ids = some()
    with pytest.raises(ValueError, match="rows of 5 tokens, but train.seq_len=6"):
        fitted(Choices(tokens.astype(np.int32), ids), [0, 1], 2, K, E, 6)


@pytest.mark.parametrize(
    ("tokens", "ids", "message"),
    [
        (lambda t: t[0], lambda x: x, "has tokens"),
        (lambda t: t / 1, lambda x: x, "has tokens float64"),
        (lambda t: t, lambda x: x[1:], "has experts"),
        (lambda t: t, lambda x: x / 1, "has experts float64"),
        (lambda t: t, lambda x: x[:, :, 0], "has experts"),
        (lambda t: t * 0, lambda x: x, "rows 0 and 1 with the same tokens and different experts"),
    ],
)
def test_arrays_that_do_not_belong_together_are_neither_written_nor_read(
    tmp_path, tokens, ids, message
):
    given, chosen = some()
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a.npz", tokens(given), ids(chosen))
    assert not list(tmp_path.iterdir())
    np.savez(tmp_path / "a.npz", tokens=tokens(given), experts=ids(chosen))
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "a.npz"))


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="cannot be read"):
        load(str(path))
    np.savez(path, ids=np.zeros(3))
    with pytest.raises(ValueError, match="has the arrays ids, not `tokens` and `experts`"):
        load(str(path))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="is not a NumPy archive"):
        load(str(path))
    np.savez(path, tokens=np.array([{}], object), experts=np.zeros(3))  # a pickle
    with pytest.raises(ValueError, match="is not a NumPy archive"):
        load(str(path))


def recording(weight=None, sees=()):
    tokens, ids = some()
    expert_MNLK = np.moveaxis(ids, 2, 0).astype(np.int32)
    weight = np.full(expert_MNLK.shape, 0.5, np.float32) if weight is None else weight
    arrays = {
        "expert": expert_MNLK,
        "weight": weight,
        "kept": weight > 0,
        "identity": np.zeros(expert_MNLK.shape[:3], np.float32),
        "token": tokens.astype(np.int32),
        "digest": np.arange(ROWS, dtype=np.uint64),
    }
    part = from_arrays(arrays, E)
    about = {"num_experts": E, "sees": list(sees), "gate": "top_k"}
    return Recording(part, part.select(np.arange(0)), about), tokens, ids


def test_a_recording_of_our_own_is_read(tmp_path):
    recorded, tokens, ids = recording()
    routing.save(tmp_path / "routing.npz", recorded)
    found = load(str(tmp_path / "routing.npz"))
    np.testing.assert_array_equal(found.token_NL, tokens)
    np.testing.assert_array_equal(found.expert_NLMK, ids)


def test_padding_of_a_recording_has_no_ids():
    weight = np.full((LAYERS, ROWS, LENGTH, K), 0.5, np.float32)
    weight[:, :, 3:] = 0
    recorded, _, ids = recording(weight)
    found = of_recording(recorded).expert_NLMK
    np.testing.assert_array_equal(found[:, :3], ids[:, :3])
    assert (found[:, 3:] == -1).all()


def test_a_recording_that_no_router_can_follow_is_refused():
    weight = np.full((LAYERS, ROWS, LENGTH, K), 0.5, np.float32)
    weight[0, 0, 0, 0] = 0
    with pytest.raises(ValueError, match="fewer experts than others.*moe.gate.name=replay"):
        of_recording(recording(weight)[0])
    with pytest.raises(ValueError, match="depends on future tokens"):
        of_recording(recording(sees=["future"])[0])
