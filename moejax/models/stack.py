"""Layers that repeat: attention and a feed-forward layer, dense or a mixture of experts.

Layers come in periods (for ``every=2``: dense, MoE). The parameters of all periods are stacked
and run with ``lax.scan``, so compile time and program size do not grow with depth beyond
``MOST_UNROLLED`` periods.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from moejax.layers.basic import RMSNorm, TrainOrEval, is_training
from moejax.layers.moe import MoE
from moejax.mesh import BATCH_AXES, constrain
from moejax.models.block import Block, Watch
from moejax.types import (
    Context,
    DepthsConfig,
    Gate,
    GateState,
    MoEConfig,
    MoEStats,
    Policy,
)


def _matmuls_and(*names: str) -> Any:
    """Keeps matmuls without batch dimensions (projections, dense FFNs) and what has these names."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*names)
    )


REMAT = {
    "none": None,
    "experts": _matmuls_and("routing", "attention", "exchange", "experts"),
    "exchange": _matmuls_and("routing", "attention", "exchange"),
    "dots": _matmuls_and(),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What is kept for the backward pass, less and less. The names, given with ``checkpoint_name``:

``routing``: who goes where; ``attention``: the mixed values; ``exchange``: what other devices sent;
``experts``: outputs, and hidden layers before the activation.
"""

MOST_UNROLLED = 8
"""Up to so many periods are laid out one after the other. A loop fills a stack of zeros with what
the backward pass needs and takes it out again: with 4 layers on CPU 12% of a dense step, 19% of one
with experts, and a longer compilation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and choices of the layers; ``moe`` and ``gate`` are unused when ``every`` is 0.

    ``causal``: a token attends to itself and what is before it, else to all valid tokens.
    ``rope_theta``: base of the rotary angles; 0 turns nothing. ``vocab_size`` and ``num_tasks`` are
    what gates may ask of tokens and sequences. ``mod_*``: Mixture-of-Depths (``DepthsConfig``).
    ``moa_experts``, ``moa_k``: ``MixtureOfHeads`` in place of attention; 0 is off. The first
    ``first_dense`` layers have neither.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    dtype: str
    remat: str
    attention: str
    every: int
    first_dense: int
    moe: MoEConfig
    gate: Gate
    expert_d_ff: int
    expert_activation: str
    shared_experts: int
    shared_gate: bool
    balance_scope: str
    residual: bool = False
    mod_capacity: float = 0.0
    mod_every: int = 2
    mod_predictor: str = "mlp"
    moa_experts: int = 0
    moa_k: int = 2
    causal: bool = True
    rope_theta: float = 0.0
    vocab_size: int = 0
    num_tasks: int = 1
    entropy_floors: tuple[float, ...] = ()
    """See ``layers.moe.MoE``."""

    @property
    def depths(self) -> DepthsConfig:
        return DepthsConfig(self.mod_capacity, self.mod_every, self.mod_predictor)

    @property
    def period(self) -> int:
        """Layers in one repeating period; the last of them has the experts.

        Where some blocks are routed, that many apart; the last one is, and the one with experts.
        """
        return max(self.every, self.mod_every if self.mod_capacity else 1)

    @property
    def num_periods(self) -> int:
        return (self.num_layers - self.first_dense) // self.period

    @property
    def num_moe_layers(self) -> int:
        return self.num_periods if self.every else 0


class Found(NamedTuple):
    """What the layers say besides their output. ``losses`` and ``means`` are means over layers;
    ``stats``, ``policy`` and ``watched`` lead with the MoE layers."""

    mean_square: Float[Array, "layers"]
    """Mean square of each layer's output: the first one that is not finite is where a NaN began."""
    losses: dict[str, Float[Array, ""]]
    means: dict[str, Float[Array, ""]]
    """Named numbers of layers that are neither losses nor routing: logged under their names."""
    stats: MoEStats | None
    """None if dense."""
    policy: Policy | None
    """Of gates trained by policy."""
    watched: PyTree
    """What ``watch`` gave; None without one, and if dense."""


class Period(nnx.Module):
    """The layers that repeat: dense ones, then (unless the model is dense) one MoE layer."""

    def __init__(self, config: StackConfig, layer: int | Array, *, rngs: nnx.Rngs):
        last = config.period - 1
        self.blocks = nnx.List(
            [
                Block(config, bool(config.every) and i == last, layer, i, rngs=rngs)
                for i in range(config.period)
            ]
        )

    def __call__(
        self,
        x_BLD: Array,
        context: Context,
        state: GateState,
        train: bool | None,
        watch: Watch | None,
    ) -> tuple[Array, Found]:
        """Output, and what all layers or the sparse one found."""
        squares, losses, means, stats, policy, watched = [], [], [], None, None, None
        for block in self.blocks:
            x_BLD, info, watched, said = block(x_BLD, context, state, train, watch)
            squares.append(mean_square(x_BLD, context.valid_BL))
            losses.append(said.losses)
            means.append(said.means)
            if info is not None:
                losses[-1] = {**said.losses, **info.losses}
                stats, policy = info.stats, info.policy
        named = _over_layers(losses), _over_layers(means)
        return x_BLD, Found(jnp.stack(squares), *named, stats, policy, watched)


def _over_layers(layers: list[dict[str, Array]]) -> dict[str, Float[Array, ""]]:
    """The mean of each name over the layers that have it."""
    found: dict[str, list[Array]] = {}
    for named in layers:
        for name, value in named.items():
            found.setdefault(name, []).append(value)
    return {name: jnp.mean(jnp.stack(values)) for name, values in found.items()}


def mean_square(x_BLD: Float[Array, "*B D"], valid_BL: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Of the valid tokens; 0 without any."""
    wide_BLD = jnp.where(valid_BL[..., None], x_BLD.astype(jnp.float32), 0.0)
    count = jnp.sum(valid_BL, dtype=jnp.float32) * x_BLD.shape[-1]
    return jnp.sum(jnp.square(wide_BLD)) / jnp.maximum(count, 1.0)


class Stack(TrainOrEval):
    """The layers of a model, which is a class derived from this one: it embeds before, reads after.

    ``gate_state`` (from ``init_gate_state``) leads with the MoE layers. ``watch(x_BLD, info)`` may
    look at every MoE layer's input and ``MoEInfo``; what it returns is in ``Found.watched``.
    ``train``: None is what ``model.train()`` or ``model.eval()`` said last.
    """

    def build_layers(self, config: StackConfig, rngs: nnx.Rngs) -> None:
        """Makes the parameters: called by the model where the order of its keys wants them."""
        config.depths.check(config.every)
        self.config = config
        self.first = nnx.List(
            [Block(config, False, 0, rngs=rngs) for _ in range(config.first_dense)]
        )
        keys = jax.random.split(rngs.params(), config.num_periods)
        graph = nnx.graphdef(nnx.eval_shape(lambda: Period(config, 0, rngs=nnx.Rngs(0))))
        stacked = jax.vmap(
            lambda key, layer: nnx.state(Period(config, layer, rngs=nnx.Rngs(params=key)))
        )(keys, jnp.arange(config.num_periods))
        self.periods = nnx.merge(graph, stacked)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    def run_layers(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        watch: Watch | None,
    ) -> tuple[Array, Found]:
        """The normalised output of the last layer, and what all of them found."""
        # Padding may hold anything, and must reach neither a valid token nor a gradient.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        x_BLD = constrain(x_BLD.astype(jnp.dtype(self.config.dtype)), BATCH_AXES)
        first = []
        for block in self.first:
            x_BLD, *_ = block(x_BLD, context, (), train, None)
            first.append(mean_square(x_BLD, context.valid_BL))
        x_BLD, found = self._scan(x_BLD, context, gate_state, train, watch)
        squares = [jnp.asarray(first, jnp.float32), found.mean_square.reshape(-1)]
        return self.final_norm(x_BLD), found._replace(
            mean_square=jnp.concatenate(squares),
            losses=jax.tree.map(jnp.mean, found.losses),
            means=jax.tree.map(jnp.mean, found.means),
        )

    def init_gate_state(self, token_counts: Callable[[], np.ndarray] | None = None) -> PyTree:
        """Initial gate states, stacked over MoE layers."""
        if not self.config.every:
            return ()
        moe = self._moe_layer()
        init = functools.partial(moe.init_gate_state, token_counts=token_counts)
        return jax.vmap(init)(jnp.arange(self.config.num_moe_layers))

    def update_gate_state(self, state: PyTree, stats: MoEStats | None) -> PyTree:
        """Every layer's state after an optimizer step."""
        if stats is None or not jax.tree.leaves(state):
            return state
        return jax.vmap(self._moe_layer().update_gate_state)(state, stats)

    def _moe_layer(self) -> MoE:
        ffn = self.periods.blocks[-1].ffn
        assert isinstance(ffn, MoE)
        return ffn

    def _scan(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        watch: Watch | None,
    ) -> Any:
        graph, params = nnx.split(self.periods)
        key = context.key

        def body(x_BLD: Array, layer: tuple[PyTree, GateState, Array]) -> Any:
            own_params, own_state, index = layer
            own_key = None if key is None else jax.random.fold_in(key, index)
            own_context = dataclasses.replace(context, key=own_key)
            return nnx.merge(graph, own_params)(x_BLD, own_context, own_state, train, watch)

        periods = self.config.num_periods
        unroll = is_training(self, train) and periods <= MOST_UNROLLED
        if self.config.remat != "none":
            # Outside a loop XLA would merge what is recomputed with what it recomputes.
            unroll = False
            body = jax.checkpoint(body, policy=REMAT[self.config.remat], prevent_cse=False)
        layers = (params, gate_state, jnp.arange(periods))
        return jax.lax.scan(body, x_BLD, layers, unroll=unroll)
