"""Phi-3.5-MoE against transformers: logits, and the same folder back."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load
from moejax.errors import UserError
from moejax.hf.exported import export_model
from moejax.hf.families.phi import PHIMOE
from moejax.hf.fields import config_of, explicit, written
from moejax.hf.imported import import_model
from moejax.hf.keys import Theirs
from moejax.train import evaluate
from moejax.types import Context

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.5, 4.0],
    "short_mscale": 1.25,
    "long_mscale": 1.5,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "published": {"attention_bias": True, "lm_head_bias": True, "rope_parameters": LONGROPE},
    "defaults": {},
    "wide sampling": {"lm_head_bias": True, "router_jitter_noise": 0.3, "sliding_window": 5},
}


def keys_of(name):
    plain = {"rms_norm_eps": 1e-5, "model_type": "phimoe"}
    return {**SIZES, **plain, **MODELS[name]}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_that_is_read_and_written_reads_as_the_same_model(name):
    fields = PHIMOE.read(Theirs(keys_of(name), "config.json"))
    config_of(fields)  # every field exists
    keys, changes = written(PHIMOE, explicit(fields))
    assert not changes
    assert keys["router_jitter_noise"] == keys_of(name).get("router_jitter_noise", 0.01)
    assert keys["lm_head_bias"] == keys_of(name).get("lm_head_bias", False)
    for key, value in MODELS[name].get("rope_parameters", {}).items():
        assert keys["rope_parameters"][key] == value


def test_longrope_has_the_factors_and_magnitudes_of_the_config():
    fields = PHIMOE.read(Theirs(keys_of("published"), "config.json"))
    rope = config_of(fields).model
    assert rope.rope_short_factors == "1.0,1.25,1.5,2.0"
    assert rope.rope_long_factors == "1.0,2.0,3.5,4.0"
    assert (rope.rope_magnitude, rope.rope_long_magnitude) == (1.25, 1.5)
    assert (rope.rope_trained_length, rope.rope_factor, rope.rope_long) == (32, 2.0, False)


def test_another_activation_is_refused():
    theirs = Theirs({**keys_of("defaults"), "hidden_act": "gelu"}, "config.json")
    with pytest.raises(UserError, match="hidden_act='gelu' is not supported; moejax knows 'silu'"):
        PHIMOE.read(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_and_the_folder_comes_back(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(**SIZES, **MODELS[name])
    model = transformers.PhimoeForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for x in model.parameters():
            spread, centre = (0.5, 1.0) if x.ndim == 1 else (0.2, 0.0)
            x.copy_(torch.randn_like(x) * spread + centre)
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")

    token = np.random.default_rng(0).integers(3, 300, (2, 24))
    with torch.no_grad():
        wanted = model(torch.tensor(token)).logits.numpy()
    ours = load(str(tmp_path / "run" / "config.json")).config
    token_BL = jnp.asarray(token, jnp.int32)
    with evaluate.open_run(ours, str(tmp_path / "run"), None) as (run, state, _):
        lm = run.task.built(state.params)
        context = Context.of(*token.shape, token_BL=token_BL)
        got, _ = lm(token_BL, context, state.gate_state, False)
    # float32 sums in another order, over three layers.
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())

    export_model(tmp_path / "run", tmp_path / "back")
    before, after = (
        safetensors.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "back")
    )
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value, err_msg=tensor)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(token)).logits.numpy(), wanted)
