"""Every family beside transformers: what a converted model computes, and its way back.

The models are tiny; their shapes, options and weights are drawn at random (``tiny.py``). Both
sides compute in float32, in different orders of summation.
"""

import importlib.util

import numpy as np
import pytest

from moejax.hf.exported import export_model
from moejax.hf.tensors import TensorFolder
from tests.claims import Claims
from tests.hf import pair as pairs
from tests.hf import tiny
from tests.hf.pair import VALID, B, L, Outputs, Pair, close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"),
        reason="needs the extra 'parity' (torch, transformers)",
    ),
    # Their warnings, not ours: of config keys that they rename, and of torch's own modules.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::UserWarning:transformers"),
]

LOGITS, GRADIENTS = 1e-5, 1e-4
UNPACKED = {
    "gpt_oss": "transformers gives its masks no positions",
    "llama4_text": "transformers counts its chunks and temperatures from the row's beginning",
}
"""Families that transformers cannot run on packed texts."""


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    """The first draw of each family."""
    at = tmp_path_factory.mktemp(request.param)
    return pairs.converted(tiny.build(request.param, 0, at / "hf"), at / "hf", at / "run")


def tokens(pair: Pair, columns: int = L) -> np.ndarray:
    vocabulary = pair.theirs.config.vocab_size
    return np.random.default_rng(3).integers(3, vocabulary, (B, columns))


def counts_padding(model) -> bool:
    """True for Llama 4: in transformers the temperature of its queries counts padding in front."""
    return model.config.model_type == "llama4_text"


def results_of(model, token_BL: np.ndarray, valid_BL: np.ndarray) -> Outputs:
    """The results of transformers; padding that it counts as tokens is moved behind the texts."""
    if not counts_padding(model) or valid_BL[:, 0].all():
        return pairs.theirs_of(model, token_BL, valid_BL)
    padding_B = L - valid_BL.sum(axis=1)
    there_BL = (np.arange(L) + padding_B[:, None]) % L
    back_BL = (np.arange(L) - padding_B[:, None]) % L

    def moved(x_BL: np.ndarray, index_BL: np.ndarray) -> np.ndarray:
        return np.stack([row[index] for row, index in zip(x_BL, index_BL, strict=True)])

    found = pairs.theirs_of(model, moved(token_BL, there_BL), moved(valid_BL, there_BL))
    assert found.expert_NLK is not None and found.weight_NLK is not None, "Llama 4 has experts"
    expert_NLK, weight_NLK = (
        np.stack([moved(x.reshape(B, L, -1), back_BL).reshape(B * L, -1) for x in layers])
        for layers in (found.expert_NLK, found.weight_NLK)
    )
    return Outputs(moved(found.logits_BLV, back_BL), expert_NLK, weight_NLK, found.losses)


def same_results(pair: Pair, padding: str) -> None:
    token_BL, valid_BL = tokens(pair), VALID[padding]
    ours, theirs = pair.ours(token_BL, valid_BL), results_of(pair.theirs, token_BL, valid_BL)
    close(ours.logits_BLV[valid_BL], theirs.logits_BLV[valid_BL], LOGITS, f"logits, {padding}")
    if theirs.expert_NLK is None:
        assert ours.expert_NLK is None
        return
    assert ours.expert_NLK is not None
    assert ours.weight_NLK is not None and theirs.weight_NLK is not None
    valid = valid_BL.reshape(-1)
    np.testing.assert_array_equal(ours.expert_NLK[:, valid], theirs.expert_NLK[:, valid])
    close(ours.weight_NLK[:, valid], theirs.weight_NLK[:, valid], LOGITS, f"weights, {padding}")


@pytest.mark.parametrize("padding", VALID)
def test_logits_experts_and_weights_are_those_of_transformers(pair, padding):
    same_results(pair, padding)


def test_decoding_token_by_token_gives_the_logits_of_transformers_with_its_cache(pair):
    token_BL, valid_BL = tokens(pair), VALID["none" if counts_padding(pair.theirs) else "left"]
    wanted = pairs.decoded_by(pair.theirs, token_BL, valid_BL, 4)
    found = pair.decoded(token_BL, valid_BL, 4)
    close(found[valid_BL], wanted[valid_BL], LOGITS)


def test_packed_texts_do_not_see_each_other(pair):
    """Transformers takes positions that begin anew, without a mask, for the ends of texts."""
    if reason := UNPACKED.get(pair.theirs.config.model_type):
        pytest.skip(reason)
    token_BL = tokens(pair)
    starts = np.zeros((B, L), bool)
    starts[0, 5], starts[1, [3, 4]], starts[2, 9] = True, True, True
    segment_BL = starts.cumsum(axis=1)
    index_BL = np.broadcast_to(np.arange(L), (B, L))
    position_BL = index_BL - np.maximum.accumulate(np.where(starts, index_BL, 0), axis=1)
    ours = pair.ours(token_BL, VALID["none"], segment_BL)
    apart = pairs.theirs_of(pair.theirs, token_BL, None, position_BL)
    whole = pairs.theirs_of(pair.theirs, token_BL, None, index_BL.copy())
    assert np.abs(apart.logits_BLV - whole.logits_BLV)[0, 6:].max() > 1e-2
    close(ours.logits_BLV, apart.logits_BLV, LOGITS)


def test_gradients_of_a_fine_tuning_step_are_those_of_transformers(pair, tmp_path):
    token_BL = tokens(pair, L + 1)
    ours = pair.gradients(token_BL)
    theirs = pairs.gradients_of(pair.theirs, token_BL, tmp_path)
    theirs = {n: x for n, x in theirs.items() if not n.endswith("correction_bias")}
    assert set(ours) == set(theirs)
    largest = max(np.abs(x).max() for x in theirs.values())
    claims = Claims(f"gradients of {pair.theirs.config.model_type}")
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape
        if np.abs(wanted).max() < 1e-6 * largest:  # exact zeros but for rounding: keys' biases
            claims.check(_all_small, ours[name], 1e-5 * largest, name=name)
        else:
            claims.check(close, ours[name], wanted, GRADIENTS, name=name)
    claims.settle()


def _all_small(x, bound):
    assert np.abs(x).max() < bound


def check_way_back(pair: Pair, at) -> None:
    """Out, in and out again: the bytes of every tensor stay, and transformers reads them."""
    export_model(pair.workdir, at / "out")
    pairs.bring_in(at / "out", at / "again-run")
    export_model(at / "again-run", at / "again")
    with (
        TensorFolder(pair.folder) as first,
        TensorFolder(at / "out") as out,
        TensorFolder(at / "again") as again,
    ):
        assert first.names == out.names == again.names
        for name in first.names:
            bytes_ = {folder.read(name).tobytes() for folder in (first, out, again)}
            assert len(bytes_) == 1, name
            assert first.dtype(name) == out.dtype(name)
    token_BL = tokens(pair)
    wanted = pairs.theirs_of(pair.theirs, token_BL, VALID["none"]).logits_BLV
    back = tiny.load(at / "out")
    assert type(back) is type(pair.theirs)
    np.testing.assert_array_equal(pairs.theirs_of(back, token_BL, VALID["none"]).logits_BLV, wanted)


def test_the_way_back_keeps_every_byte_and_loads_in_transformers(pair, tmp_path):
    check_way_back(pair, tmp_path)


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_draws_of_a_family_agree_too(family, seed, tmp_path):
    theirs = tiny.build(family, seed, tmp_path / "hf")
    pair = pairs.converted(theirs, tmp_path / "hf", tmp_path / "run")
    same_results(pair, "left")
    check_way_back(pair, tmp_path)


@pytest.mark.parametrize(
    "family", [name for name, drawn in tiny.FAMILIES.items() if drawn.balanced]
)
def test_the_auxiliary_loss_is_that_of_transformers(family, tmp_path):
    """Of one layer: transformers takes all layers' tokens together. Its loss is k at balance."""
    one = {"num_hidden_layers": 1, "output_router_logits": True}
    if family.startswith("qwen"):
        one |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
    if family == "gpt_oss":
        one |= {"layer_types": ["full_attention"]}
    theirs = tiny.build(family, 0, tmp_path / "hf", **one)
    pair = pairs.converted(theirs, tmp_path / "hf", tmp_path / "run")
    token_BL, k = tokens(pair), theirs.config.num_experts_per_tok
    for valid_BL in (VALID["none"], VALID["right"]):
        wanted = pairs.theirs_of(theirs, token_BL, valid_BL, output_router_logits=True).losses
        found = pair.ours(token_BL, valid_BL).losses
        assert found["load_balance"] * k == pytest.approx(wanted["load_balance"], rel=1e-5)
    weight = theirs.config.router_aux_loss_coef
    assert pair.config.moe.losses.load_balance == pytest.approx(weight * k, rel=1e-12)
