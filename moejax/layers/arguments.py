"""Checks of a layer's arguments. Each mistake is one line that names the argument."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from moejax.options import DTYPES
from moejax.record.experts import problem_of_experts
from moejax.types import Context, Gate, GateState, GateTraits, are_whole


def checked_dtype(name: str, value: Any) -> jnp.dtype:
    """``value`` as a dtype that the kernels compute in.

    Raises:
      ValueError: another dtype, or not a dtype.
    """
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(DTYPES)}")
    return dtype


def check_sizes(least: int, **sizes: Any) -> None:
    """Raises ValueError unless all sizes are whole numbers, ``least`` or more."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < least:
            raise ValueError(f"{name}={size!r} must be a whole number, at least {least}")


def check_rngs(rngs: Any) -> None:
    """Raises ValueError unless keys can be drawn from ``rngs``."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs is a {type(rngs).__name__}; pass flax.nnx.Rngs(seed or key)")


def check_tokens(x: Any, d_model: int, axes: str = "B, L") -> None:
    """Raises ValueError unless ``x`` is an array of floats ``[*axes, d_model]``."""
    name = f"x_{axes.replace(', ', '')}D"
    if not isinstance(x, jax.Array) and not hasattr(x, "shape"):
        raise ValueError(
            f"{name} is a {type(x).__name__}, not an array [{axes}, d_model={d_model}]"
        )
    if x.ndim != axes.count(",") + 2 or x.shape[-1] != d_model:
        raise ValueError(
            f"{name} has shape {x.shape}, but this layer takes [{axes}, d_model={d_model}]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(
            f"{name} has dtype {x.dtype}, but this layer takes activations (float32 or bfloat16); "
            "embed token ids, or cast, first"
        )


def check_context(context: Any, batch: int, length: int) -> None:
    """Raises ValueError unless all arrays of the context fit ``batch`` sequences of ``length``
    tokens."""
    if not isinstance(context, Context):
        raise ValueError(
            f"context is a {type(context).__name__}, not a moejax.Context; make one with "
            f"moejax.Context.of({batch}, {length}, ...)"
        )
    shapes = {"_BL": (batch, length), "_B": (batch,)}
    for field in dataclasses.fields(Context):
        wanted = shapes.get(field.name[max(field.name.rfind("_"), 0) :])
        absent = field.name in ("segment_BL", "source_B") and getattr(context, field.name) is None
        if wanted is None or absent:
            continue
        shape = jnp.shape(getattr(context, field.name))
        if shape != wanted:
            raise ValueError(
                f"context.{field.name} has shape {shape}, but x has {batch} sequences of {length} "
                f"tokens; make the context with moejax.Context.of({batch}, {length}, ...)"
            )
        if not are_whole(value := getattr(context, field.name)):
            what = "booleans" if field.name == "valid_BL" else "whole numbers"
            raise ValueError(
                f"context.{field.name} has dtype {jnp.result_type(value)}; pass {what}"
            )
    if context.key is not None and not hasattr(context.key, "dtype"):
        raise ValueError(f"context.key={context.key!r} is no PRNG key; pass jax.random.key(seed)")


def check_known(context: Context, gate: Gate) -> None:
    """Raises ValueError if the gate routes by token ids and the context has none."""
    if not context.knows_tokens and "tokens" in GateTraits.of(gate).reads:
        raise ValueError(
            f"gate {type(gate).__name__} routes by token ids: pass a context with them, "
            "moejax.Context.of(B, L, token_BL=...)"
        )


def given_experts(context: Context, gate: Gate, num_experts: int) -> Array:
    """The experts that the context gives to a layer, [B, L, K].

    Raises:
      ValueError: a gate that chooses by itself only, or ids that do not fit the layer. Ids of a
        traced array are known too late: see ``gating.ops.followed``.
    """
    if not GateTraits.of(gate).follows:
        raise ValueError(
            f"gate {type(gate).__name__} has no weights for experts that it did not choose "
            "(context.expert_BLMK); use top_k, loss_free or a preset of them"
        )
    check_experts(context, 1, gate.columns(num_experts))
    expert = context.expert_BLMK
    if not any(isinstance(x, Tracer) for x in (expert, context.valid_BL)):
        problem = problem_of_experts(np.asarray(expert), np.asarray(context.valid_BL), num_experts)
        if problem:
            raise ValueError(f"context.expert_BLMK {problem}")
    return jnp.asarray(expert)[:, :, 0]


def check_experts(context: Context, layers: int, columns: int) -> None:
    """Raises ValueError unless the context's experts are ids [B, L, layers, columns]."""
    expert = context.expert_BLMK
    assert expert is not None
    wanted = (*jnp.shape(context.token_BL), layers, columns)
    if jnp.shape(expert) != wanted:
        raise ValueError(
            f"context.expert_BLMK has shape {jnp.shape(expert)}, but sequences, tokens, MoE layers "
            f"and experts per token are {wanted}"
        )
    if not jnp.issubdtype(jnp.result_type(expert), jnp.integer):
        raise ValueError(
            f"context.expert_BLMK has dtype {jnp.result_type(expert)}; pass whole numbers"
        )


def check_packed(context: Context, gate: Gate) -> None:
    """Raises ValueError if the gate would mix packed texts with each other."""
    mixes = GateTraits.of(gate).mixes
    if context.segment_BL is not None and mixes:
        raise ValueError(
            f"gate {type(gate).__name__} mixes {mixes} over whole rows, which hold several "
            "texts (context.segment_BL); give each text a row of its own, or use a gate that keeps "
            "them apart, such as top_k or sentence"
        )


def check_gate_state(state: GateState, wanted: GateState, gate: str) -> None:
    """Raises ValueError unless ``state`` has the arrays of the initial state ``wanted``."""
    if _described(state) == _described(wanted):
        return
    has, takes = _described(state) or "nothing", _described(wanted) or "none"
    raise ValueError(
        f"gate_state has {has}, but gate {gate} takes {takes}; start with "
        "layer.init_gate_state() and continue with layer.update_gate_state(state, info.stats)"
    )


def _described(tree: Any) -> str:
    """The leaves of a tree by path and shape, such as ``bias_E [8]``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = (
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves
    )
    return ", ".join(f"{name} {list(jnp.shape(leaf))}".strip() for name, leaf in named)


def drawn_from(rngs: nnx.Rngs | None, context: Context) -> Context:
    """The context, with a key from ``rngs`` where it has none."""
    if rngs is None or context.key is not None:
        return context
    check_rngs(rngs)
    return dataclasses.replace(context, key=rngs.gate())
