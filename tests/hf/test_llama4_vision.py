"""The text model out of a Llama 4 checkpoint with a vision tower."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import load
from moejax.errors import UserError
from moejax.hf.exported import export_model
from moejax.hf.families import READABLE
from moejax.hf.fields import family_for, fields_of
from moejax.hf.imported import import_model, open_model
from moejax.train import evaluate
from moejax.types import Context

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}


def write_config(folder, **changes):
    keys = {"model_type": "llama4", "text_config": {**TEXT, "rms_norm_eps": 1e-5}, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))


def test_the_config_is_that_of_the_text_model_and_is_written_as_such(tmp_path):
    write_config(tmp_path)
    model = open_model(tmp_path)
    assert model.family is READABLE["llama4"]
    assert (model.config.model.d_model, model.config.moe.num_experts) == (32, 4)
    family, keys = family_for(fields_of(model.config), "llama4")
    assert (family.model_type, keys["architectures"]) == ("llama4_text", ["Llama4ForCausalLM"])
    assert keys["hidden_size"] == 32 and "text_config" not in keys


@pytest.mark.parametrize("part", [None, 5])
def test_a_config_without_the_text_models_is_refused(tmp_path, part):
    write_config(tmp_path, text_config=part)
    with pytest.raises(UserError, match="config.json: text_config is not a JSON object"):
        open_model(tmp_path)


@pytest.mark.slow
def test_the_text_model_equals_that_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    config = transformers.Llama4Config(vision_config=VISION, text_config=TEXT)
    config._attn_implementation = "eager"
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            spread, centre = (0.5, 1.0) if x.ndim == 1 else (0.2, 0.0)
            x.copy_(torch.randn_like(x) * spread + centre)
    model.save_pretrained(tmp_path / "theirs")
    assert import_model(tmp_path / "theirs", tmp_path / "run")["family"] == "llama4"

    token = np.random.default_rng(0).integers(3, 300, (2, 24))
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(token)).logits.numpy()
    ours = load(str(tmp_path / "run" / "config.json")).config
    token_BL = jnp.asarray(token, jnp.int32)
    with evaluate.open_run(ours, str(tmp_path / "run"), None) as (run, state, _):
        lm = run.task.built(state.params)
        context = Context.of(*token.shape, token_BL=token_BL)
        got, _ = lm(token_BL, context, state.gate_state, False)
    # float32 sums in another order, over four layers.
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())

    export_model(tmp_path / "run", tmp_path / "back")
    before = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
    after = safetensors.load_file(tmp_path / "back" / "model.safetensors")
    prefix = "language_model."
    assert {prefix + name for name in after} == {n for n in before if n.startswith(prefix)}
    for name, value in after.items():
        np.testing.assert_array_equal(before[prefix + name], value, err_msg=name)
