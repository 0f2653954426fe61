"""Scalings of rotary positions against those of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers.rope import frequencies, magnitude, rotate
from moejax.options import RopeOptions

WIDTH = 16
PAIRS = WIDTH // 2


def settings(scaling: str, seed: int) -> tuple[RopeOptions, dict]:
    """Random settings, ours and as transformers names them."""
    rng = np.random.default_rng(seed)
    factor, trained = float(rng.uniform(1.5, 40.0)), int(rng.integers(64, 10_000))
    theta, share = float(10 ** rng.uniform(2, 6)), float(rng.choice([0.5, 1.0]))
    low, high = float(rng.uniform(0.5, 2.0)), float(rng.uniform(3.0, 40.0))
    ours = {"factor": factor, "trained_length": trained}
    theirs = {
        "rope_type": scaling, "rope_theta": theta, "factor": factor,
        "original_max_position_embeddings": trained, "partial_rotary_factor": share,
    }  # fmt: skip
    if scaling == "llama3":
        ours |= {"low_turns": low, "high_turns": high}
        theirs |= {"low_freq_factor": low, "high_freq_factor": high}
    elif scaling == "yarn":
        given, whole = [0.0, float(rng.uniform(0.5, 1.5))][seed % 2], bool(rng.integers(2))
        ours |= {"low_turns": low, "high_turns": high, "whole_pairs": whole, "magnitude": given}
        theirs |= {"beta_slow": low, "beta_fast": high, "truncate": whole}
        theirs |= {"attention_factor": given} if given else {}
    elif scaling == "longrope":
        for kind in ("short", "long"):
            factors = rng.uniform(1.0, 9.0, int(PAIRS * share)).tolist()
            ours[f"{kind}_factors"] = ",".join(map(str, factors))
            theirs[f"{kind}_factor"] = factors
    return RopeOptions(theta=theta, share=share, scaling=scaling, **ours), theirs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn", "longrope"])
def test_scaled_frequencies_and_magnitudes_are_those_of_transformers(scaling, seed):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours, theirs = settings(scaling, seed)
    config = transformers.LlamaConfig(
        hidden_size=2 * WIDTH, num_attention_heads=2, head_dim=WIDTH,
        max_position_embeddings=int(ours.trained_length * ours.factor), rope_parameters=theirs,
    )  # fmt: skip
    for long in [False, True] if scaling == "longrope" else [False]:
        ours = RopeOptions(**{**vars(ours), "long": long})
        ours.check(WIDTH)
        length = ours.trained_length + long
        wanted, factor = ROPE_INIT_FUNCTIONS[scaling](config, None, seq_len=length)
        got = frequencies(ours, WIDTH)
        np.testing.assert_allclose(got, wanted, rtol=2e-5)  # theirs are float32
        np.testing.assert_allclose(magnitude(ours), factor, rtol=1e-6)
        plain = frequencies(RopeOptions(theta=ours.theta, share=ours.share), WIDTH)
        assert not np.allclose(got, plain, rtol=1e-3), "scaled"


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
def test_longrope_turns_as_that_of_phi_3_5_moe(long):
    """Of transformers' layer with the factors that apply: it never takes the long ones itself."""
    import torch
    from transformers.models.phimoe.configuration_phimoe import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import (
        PhimoeRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    rng, trained = np.random.default_rng(3), 16
    factors = {kind: rng.uniform(1.0, 9.0, PAIRS).tolist() for kind in ("short", "long")}
    applied = factors["long" if long else "short"]
    config = PhimoeConfig(
        hidden_size=2 * WIDTH, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_mscale": 1.24,
            "long_mscale": 1.31, "original_max_position_embeddings": trained,
            "short_factor": applied, "long_factor": applied,
        },
    )  # fmt: skip
    length = 2 * trained if long else trained
    x = rng.standard_normal((2, length, 2, WIDTH)).astype(np.float32)
    position = np.broadcast_to(np.arange(length), (2, length))
    cos, sin = PhimoeRotaryEmbedding(config)(torch.tensor(x), torch.tensor(position))
    heads_first = torch.tensor(x).transpose(1, 2)
    wanted = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].transpose(1, 2).numpy()
    lists: dict = {f"{kind}_factors": ",".join(map(str, own)) for kind, own in factors.items()}
    ours = RopeOptions(
        scaling="longrope", trained_length=trained, magnitude=1.24, long_magnitude=1.31, long=long,
        **lists,
    )  # fmt: skip
    got = rotate(jnp.asarray(x), jnp.asarray(position), ours)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # float32 angles up to 32


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ("", "^short_factors='' must be 8 numbers above 0, one per rotated pair"),
        ("1,a", "^short_factors='1,a' must be 8 numbers above 0"),
        ("1,0,1,1,1,1,1,1", "must be 8 numbers above 0"),
        ("1,2", "^short_factors has 2 numbers, but a head has 8 rotated pairs"),
    ],
)
def test_factors_that_are_no_list_of_one_number_per_pair_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        RopeOptions(scaling="longrope", short_factors=factors).check(WIDTH)
