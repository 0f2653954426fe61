"""Models of our own go out as a published family, with the same logits, or are refused."""

import importlib.util
import secrets
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import cli
from moejax.config import Config, load, settings
from moejax.config.saved import CHECKPOINTS, write_config
from moejax.config.tree import flatten
from moejax.errors import UserError
from moejax.hf.exported import absorbed
from moejax.hf.fields import family_for, fields_of
from moejax.train import evaluate, setup
from moejax.train.checkpoint.manifest import as_array, named_leaves
from moejax.train.checkpoint.pieces import PieceWriter
from moejax.train.workdir.contents import note_saved
from moejax.train.workdir.origin import origin
from moejax.train.workdir.run_record import about_run
from moejax.types import Context
from tests.hf.pair import close

ROOT = Path(__file__).parents[2]
SMALL = (
    "mesh.expert=1", "mesh.data=1", "model.d_model=24", "model.num_layers=4", "model.num_heads=4",
    "model.d_ff=20", "moe.d_ff=14", "moe.num_experts=5", "train.seq_len=16", "train.batch_size=4",
    "train.eval_rows=4", "moe.every=1", "model.vocab_size=260", "moe.eval_transport=dropless",
)  # fmt: skip
"""Dropless in evaluation, as published models are."""


def config_of(*fields: str, gate: str = "top_k") -> Config:
    flags = [f"--config.{field}" for field in (*SMALL, *fields)]
    return load(f"{ROOT}/configs/lm.py:size=debug,gate={gate}", flags).config


def family_of(config: Config) -> str:
    """The family that the model goes out as; a factor of its embeddings is moved into them."""
    fields = fields_of(config)
    absorbed(fields)
    return family_for(fields)[0].model_type


def saved(config: Config, workdir: Path, seed: int = 0) -> None:
    """The workdir of a run with a checkpoint whose every weight is drawn at random."""
    run = setup.prepare(config)
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in named_leaves(run.abstract_state).items()
    }
    rng = np.random.default_rng(seed)
    content = {
        **about_run(run), "source": "", "overrides": [], **origin(), "history": [],
        "environment": settings.environment(), "id": secrets.token_hex(8),
        "baselines": run.data.baselines(),
        "devices": {"kind": run.mesh.devices.flat[0].device_kind, "count": 1},
    }  # fmt: skip
    workdir.mkdir()
    write_config(workdir, content)
    meta = {"fingerprint": run.data.fingerprint, "run": content, "logs": {}, "probe": []}
    with PieceWriter(workdir / CHECKPOINTS, 0, arrays, {}, meta) as writer:
        for name, leaf in named_leaves(jax.jit(run.fresh_state)()).items():
            x = np.asarray(as_array(leaf))
            if name.startswith("params/"):
                x = x + 0.2 * rng.standard_normal(x.shape).astype(x.dtype)
            if name.endswith("bias_E") and name.startswith("gate_state/"):
                x = 0.3 * rng.random(x.shape).astype(x.dtype)
            writer.put(name, (), x)
    note_saved(workdir)


def logits_of(workdir: Path, token_BL: np.ndarray) -> np.ndarray:
    config = load(str(workdir / "config.json")).config
    with evaluate.open_run(config, str(workdir), None) as (run, state, _):
        state = jax.device_get(state)
        model: Any = run.task.built(state.params)
    tokens = jnp.asarray(token_BL, jnp.int32)
    context = Context.of(*token_BL.shape, token_BL=tokens)
    forward = jax.jit(lambda gate_state: model(tokens, context, gate_state, False)[0])
    return np.asarray(forward(state.gate_state))


PARITY = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"),
        reason="needs the extra 'parity' (torch, transformers)",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def parity(test):
    for mark in PARITY:
        test = mark(test)
    return test


def check_goes_out(config: Config, at: Path) -> str:
    """Exports the model and compares its logits in transformers with ours."""
    import torch

    from tests.hf import tiny

    saved(config, at / "run")
    assert cli.main(["convert", f"--to-hf={at / 'run'}", f"--out={at / 'out'}"]) == 0
    theirs = tiny.load(at / "out")
    token_BL = np.random.default_rng(1).integers(0, 256, (2, 12))
    with torch.no_grad():
        wanted = theirs(torch.tensor(token_BL)).logits.numpy()
    close(logits_of(at / "run", token_BL), wanted, 1e-5)
    return theirs.config.model_type


GOES_OUT = {
    "the default, with its embeddings tied and scaled": ((), "top_k"),
    "mixtral": ((), "mixtral"),
    "grouped queries": (("model.num_kv_heads=2",), "mixtral"),
    "shared experts, weights as they are": (
        ("moe.shared_experts=2", "moe.gate.renormalize=False"), "top_k",
    ),
    "a bias that balances": (("moe.gate.num_groups=1",), "loss_free"),
    "olmoe": (("model.qk_norm=projection", "moe.gate.k=3"), "olmoe"),
    "every second layer dense": (("moe.every=2", "moe.shared_experts=1"), "top_k"),
    "dense": (("moe.every=0",), "top_k"),
    "untied, unscaled": (("model.tie_embeddings=False", "model.embed_scale=1"), "top_k"),
    "DeepSeek's attention": (
        (
            "model.mla_kv_rank=8", "model.mla_plain_width=6", "model.mla_rope_width=4",
            "model.mla_value_width=6", "model.rope_interleaved=True", "model.qk_norm_eps=1e-6",
        ),
        "loss_free",
    ),
}  # fmt: skip


@parity
@pytest.mark.parametrize("name", GOES_OUT)
def test_a_model_of_ours_has_the_same_logits_in_transformers(name, tmp_path):
    fields, gate = GOES_OUT[name]
    check_goes_out(config_of(*fields, gate=gate), tmp_path)


REFUSED = {
    "a family of remote code alone": (
        ("moe.gate.renormalize=False",), "top_k", "moe.gate.renormalize=False",
    ),
    "expert_choice": ((), "expert_choice", "moe.gate.name=expert_choice"),
    "experts with one matrix": (("moe.activation=gelu",), "mixtral", "moe.activation=gelu"),
    "switch": (("moe.activation=relu", "model.activation=relu"), "switch", "activation=relu"),
    "dense layers with one matrix": (
        ("moe.every=0", "model.activation=gelu"), "top_k", "model.activation=gelu",
    ),
    "depths": (("model.mod_capacity=0.5", "moe.every=2"), "top_k", "model.mod_capacity=0.5"),
    "mixture of attention": (("model.moa_experts=4",), "top_k", "model.moa_experts=4"),
    "a cap on logits": (("model.logit_cap=30",), "mixtral", "model.logit_cap=30"),
    "norms after": (("model.norm_place=after",), "mixtral", "model.norm_place=after"),
    "the layer's input added": (("moe.residual=True",), "mixtral", "moe.residual=True"),
    "hash": ((), "hash", "moe.gate.name=hash"),
    "shazeer": ((), "shazeer", "moe.gate."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_option_that_no_family_has_is_named(name):
    fields, gate, words = REFUSED[name]
    with pytest.raises(UserError, match="cannot be expressed by a published family") as error:
        family_of(config_of(*fields, gate=gate))
    assert words in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, capsys):
    saved(config_of("moe.activation=gelu", gate="mixtral"), tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["convert", f"--to-hf={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "moe.activation=gelu" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


DRAWN: dict[str, tuple[Any, ...]] = {
    "model.num_kv_heads": (4, 1, 2),
    "model.head_dim": (0, 8, 10),
    "model.tie_embeddings": (True, False),
    "model.embed_scale": (0.0, 1.0, 3.0),
    "model.logit_scale": (1.0, 0.5),
    "model.residual_scale": (1.0, 0.7),
    "model.attention_bias": ("none", "qkv", "all"),
    "model.qk_norm": ("none", "head", "projection", "unit"),
    "model.attention_scale": (0.0, 0.3),
    "model.attention_sinks": (False, True),
    "model.window": (0, 4),
    "model.global_every": (0, 2),
    "model.norm": ("rms", "layer"),
    "model.rope_share": (1.0, 0.5),
    "model.rope_scaling": ("none", "linear", "llama3", "yarn"),
    "model.rope_interleaved": (False, True),
    "model.activation": ("swiglu", "gelu"),
    "moe.every": (1, 2, 0),
    "moe.first_dense": (0, 2),
    "moe.shared_experts": (0, 1, 2),
    "moe.shared_gate": (False, True),
    "moe.expert_bias": (False, True),
    "moe.weigh_input": (False, True),
    "moe.activation": ("swiglu", "clamped_swiglu"),
    "moe.gate.renormalize": (True, False),
}
RARE = 0.12
"""The share of options that are not at their first value."""


def drawn(seed: int) -> Config:
    rng = np.random.default_rng(seed)
    gate = str(rng.choice(["top_k", "mixtral", "loss_free", "olmoe"]))
    fields = []
    for name, (usual, *others) in DRAWN.items():
        if rng.random() < RARE:
            fields.append(f"{name}={others[rng.integers(len(others))]}")
        elif name != "moe.gate.renormalize":
            fields.append(f"{name}={usual}")
    return config_of("model.rope_factor=2", "model.rope_trained_length=8", *fields, gate=gate)


def try_drawn(seed: int) -> Config | None:
    """A drawn config that can go out; None if it cannot, or if it is no config at all."""
    try:
        config = drawn(seed)
        setup.validate(config)
    except UserError:
        return None
    try:
        family_of(config)
    except UserError as error:
        text = str(error)
        named = text.partition("=")[0]
        assert named in flatten(config) or named.startswith("moe.gate."), text
        assert "cannot be expressed by a published family" in text and "\n" not in text
        return None
    return config


def test_any_config_goes_out_or_is_refused_by_a_field():
    outcomes = [try_drawn(seed) is not None for seed in range(100)]
    assert sum(outcomes) > 5 and not all(outcomes)


@parity
def test_configs_drawn_at_random_that_go_out_have_the_same_logits(tmp_path):
    families, tried = set(), 0
    for seed in range(200):
        config = try_drawn(seed)
        if config is None:
            continue
        (tmp_path / str(seed)).mkdir()
        families.add(check_goes_out(config, tmp_path / str(seed)))
        tried += 1
        if tried == 10:
            break
    assert tried == 10 and len(families) >= 3, families
