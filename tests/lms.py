"""Tiny language models shared by the tests that run them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import gating
from moejax.options import AttentionOptions, DispatchOptions, FFNOptions, MoEOptions, RopeOptions
from moejax.tasks.language.model import LM, LMConfig
from moejax.types import Context

B, L, V, D, E = 4, 8, 32, 16, 4
KEY = 9
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
"""float32 sums of at most 48 products, in another order or program."""


OF_ATTENTION = (
    "num_heads", "num_kv_heads", "head_dim", "rope", "causal", "window", "window_kind", "sinks",
    "qk_norm", "score_cap", "temperature",
)  # fmt: skip
OF_EXPERTS = (
    "gate", "vocab_size", "shared_experts", "shared_gate", "shared_d_ff", "residual", "expert_bias",
    "weigh_input",
)  # fmt: skip
OF_TEXT = ("tie_embeddings", "embed_scale", "head_bias", "logit_scale", "logit_cap")
NESTED = {
    **{name: ("attention", name) for name in OF_ATTENTION},
    **{name: ("experts", name) for name in OF_EXPERTS},
    **{name: ("text", name) for name in OF_TEXT},
    "d_ff": ("ffn", "d_ff"),
    "attention_bias": ("attention", "bias"),
    "activation": ("ffn", "activation"),
    "attention": ("attention", "implementation"),
    "moe": ("experts", "config"),
    "expert_d_ff": ("experts", "d_ff"),
    "expert_activation": ("experts", "activation"),
    "mod_capacity": ("depths", "capacity"),
    "mod_every": ("depths", "every"),
    "mod_predictor": ("depths", "predictor"),
    "moa_experts": ("heads", "experts"),
    "moa_k": ("heads", "k"),
}
"""Options of layers by short names; the others are the model's own."""


def changed(settings: LMConfig, **changes) -> LMConfig:
    """The same settings with other options, by the names above."""
    parts: dict = {}
    for name, value in changes.items():
        part, option = NESTED.get(name, ("", name))
        parts.setdefault(part, {})[option] = value
    own = parts.pop("", {})
    own |= {
        part: dataclasses.replace(getattr(settings, part), **options)
        for part, options in parts.items()
    }
    return dataclasses.replace(settings, **own)


def config(gate="mixtral", moe=None, **changes) -> LMConfig:
    choices = DispatchOptions(**{"num_experts": E, "capacity_factor": 1.0, **(moe or {})}).config
    base = LMConfig(
        d_model=D,
        num_layers=2,
        attention=AttentionOptions(
            num_heads=4,
            num_kv_heads=4,
            head_dim=4,
            rope=RopeOptions(theta=100.0),
            implementation="xla",
        ),
        ffn=FFNOptions(d_ff=24),
        experts=MoEOptions(gate=gating.make(gate), config=choices, d_ff=12, vocab_size=V),
    )
    return changed(base, **changes)


MIXED = config("shazeer", num_layers=5, every=2, first_dense=1, shared_experts=2, num_kv_heads=2)
"""Dense, then (dense, MoE) twice: everything that can differ between layers does."""


@functools.cache
def built(settings: LMConfig):
    """Graph and parameters; routers are drawn where a gate would start at zero, with all tied."""
    graph, params = nnx.split(LM(settings, rngs=nnx.Rngs(3)))
    for path, variable in nnx.to_flat_state(params):
        if path[-1] in ("router_DE", "noise_DE"):
            variable[...] = jax.random.normal(jax.random.key(len(path[-1])), variable.shape)
    return graph, params


def model_of(settings: LMConfig, params=None) -> LM:
    graph, own = built(settings)
    return nnx.merge(graph, own if params is None else params)


def tokens(seed=1):
    return jax.random.randint(jax.random.key(seed), (B, L), 0, V)


def context(token_BL):
    return Context.of(*token_BL.shape, token_BL=token_BL, key=jax.random.key(KEY))


def apply(model: LM, token_BL, train):
    return model(token_BL, context(token_BL), model.init_gate_state(), train)


@functools.cache
def forward(settings: LMConfig, train: bool):
    return jax.jit(lambda params, token_BL: apply(model_of(settings, params), token_BL, train))


def run(settings: LMConfig, token_BL, train=True, params=None):
    return forward(settings, train)(built(settings)[1] if params is None else params, token_BL)


def objective(out, token_BL):
    """Cross-entropy of the next token plus router losses: every parameter has a gradient."""
    logits_BLV, aux = out
    log_p_BLV = jax.nn.log_softmax(logits_BLV)
    nats = -jnp.take_along_axis(log_p_BLV[:, :-1], token_BL[:, 1:, None], axis=-1).mean()
    return nats + 0.1 * sum(aux.losses.values())


def slow_unless(quick, value):
    """A pytest parameter, marked slow unless ``quick``."""
    return pytest.param(value, marks=() if quick else pytest.mark.slow)


def label(settings: LMConfig):
    """A test id."""
    if not settings.every:
        return "dense_ffn"
    moe, name = settings.moe, type(settings.gate).__name__.lower()
    k = getattr(settings.gate, "k", "")
    rules = moe.transport.slot_rules
    transport = f"cells-{rules.priority}" if rules else type(moe.transport).__name__.lower()
    return f"{name}{k}-{transport}-every{settings.every}"
