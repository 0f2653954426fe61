"""Layers that repeat: attention and a feed-forward layer, dense or a mixture of experts.

Layers come in periods (for ``every=2``: dense, MoE). The parameters of all periods are stacked
and run with ``lax.scan``, so compile time and program size do not grow with depth beyond
``MOST_UNROLLED`` periods.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from moejax.layers.attention import Attention
from moejax.layers.basic import FFN, RMSNorm, TrainOrEval, is_training
from moejax.layers.depths import Depths
from moejax.layers.moa import MixtureOfHeads
from moejax.layers.moe import MoELayer
from moejax.mesh import BATCH_AXES, constrain
from moejax.options import StackOptions
from moejax.types import Context, GateState, LayerAux, MoEStats, Tap


def _matmuls_and(*names: str) -> Any:
    """Keeps matmuls without batch dimensions (projections, dense FFNs) and these named values."""
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
"""Checkpoint policies, from the one that keeps everything to the one that keeps nothing.

Names given with ``checkpoint_name``: ``routing``, the routing; ``attention``, the mixed values;
``exchange``, rows received from other devices; ``experts``, outputs, and hidden layers before the
activation.
"""

MOST_UNROLLED = 8
"""The most periods that are unrolled. A loop fills a stack of zeros with what the backward pass
needs and takes it out again: with 4 layers on CPU this costs 12% of a dense step, 19% of one with
experts, and a longer compilation."""


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, the latter dense or a mixture of experts.

    ``place``: its index in its period; None for the layers before the periods, which are plain.
    """

    def __init__(
        self,
        options: StackOptions,
        sparse: bool,
        layer: int | Array,
        place: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        width, attention = options.d_model, options.attention
        self.attention_norm = RMSNorm(width, options.norm_eps)
        if options.heads.experts and place is not None:
            self.attention = MixtureOfHeads(width, options.heads, attention, rngs=rngs)
        else:
            self.attention = Attention(width, attention, rngs=rngs)
        self.ffn_norm = RMSNorm(width, options.norm_eps)
        if sparse:
            self.ffn = MoELayer(width, options.experts, layer, rngs=rngs)
        else:
            self.ffn = FFN(width, options.ffn, rngs=rngs)
        routed = place is not None and options.depths.routes(place)
        self.depths = Depths(width, options.depths, rngs=rngs) if routed else None

    def __call__(
        self, x_BLD: Array, context: Context, state: GateState, train: bool | None, tap: Tap | None
    ) -> tuple[Array, LayerAux]:
        def run(x_BLD: Array, context: Context) -> tuple[Array, Array, LayerAux]:
            mixed_BLD, heads = self._attend(x_BLD, context, train)
            normed_BLD = self.ffn_norm(x_BLD + mixed_BLD)
            y_BLD, experts = self._feed_forward(normed_BLD, context, state, train, tap)
            return mixed_BLD, y_BLD, experts.joined(heads)

        def change(x_BLD: Array, context: Context) -> tuple[Array, LayerAux]:
            mixed_BLD, y_BLD, aux = run(x_BLD, context)
            return mixed_BLD + y_BLD, aux

        if self.depths is not None:
            x_BLD, aux = self.depths(x_BLD, context, train, change)
        else:
            mixed_BLD, y_BLD, aux = run(x_BLD, context)
            x_BLD = x_BLD + mixed_BLD + y_BLD
        x_BLD = constrain(x_BLD, BATCH_AXES)
        return x_BLD, dataclasses.replace(aux, mean_square=mean_square(x_BLD, context.valid_BL))

    def _attend(self, x_BLD: Array, context: Context, train: bool | None) -> tuple[Array, LayerAux]:
        with jax.named_scope("attention"):
            x_BLD = self.attention_norm(x_BLD)
            if isinstance(self.attention, MixtureOfHeads):
                return self.attention(x_BLD, context, train)
            known = (context.position_BL, context.valid_BL, context.segment_BL)
            return self.attention(x_BLD, *known, context.padded_behind), LayerAux()

    def _feed_forward(
        self, x_BLD: Array, context: Context, state: GateState, train: bool | None, tap: Tap | None
    ) -> tuple[Array, LayerAux]:
        if not isinstance(self.ffn, MoELayer):
            with jax.named_scope("ffn"):
                return self.ffn(x_BLD), LayerAux()
        y_BLD, info = self.ffn(x_BLD, context, state, train)
        taps = tap(x_BLD, info) if tap else None
        return y_BLD, LayerAux(info.losses, stats=info.stats, policy=info.policy, taps=taps)


def mean_square(x_BLD: Float[Array, "*B D"], valid_BL: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean square of the valid tokens; 0 without any."""
    wide_BLD = jnp.where(valid_BL[..., None], x_BLD.astype(jnp.float32), 0.0)
    count = jnp.sum(valid_BL, dtype=jnp.float32) * x_BLD.shape[-1]
    return jnp.sum(jnp.square(wide_BLD)) / jnp.maximum(count, 1.0)


class Period(nnx.Module):
    """The layers that repeat: dense ones, then (unless the model is dense) one MoE layer."""

    def __init__(self, options: StackOptions, layer: int | Array, *, rngs: nnx.Rngs):
        last = options.period - 1
        self.blocks = nnx.List(
            [
                Block(options, bool(options.every) and i == last, layer, i, rngs=rngs)
                for i in range(options.period)
            ]
        )

    def __call__(
        self, x_BLD: Array, context: Context, state: GateState, train: bool | None, tap: Tap | None
    ) -> tuple[Array, LayerAux]:
        reports = []
        for block in self.blocks:
            x_BLD, aux = block(x_BLD, context, state, train, tap)
            reports.append(aux)
        return x_BLD, LayerAux.over_layers(reports)


class Stack(TrainOrEval):
    """The layers of a model, which derives from this class: it embeds before and reads out after.

    ``gate_state`` (from ``init_gate_state``) leads with the MoE layers. ``tap(x_BLD, info)`` sees
    every MoE layer's input and ``MoEInfo``; the arrays that it returns are in ``LayerAux.taps``.
    ``train``: None is the mode that ``model.train()`` or ``model.eval()`` set last.
    """

    def build_layers(self, options: StackOptions, rngs: nnx.Rngs) -> None:
        """Makes the parameters. The model calls it where its keys are to be drawn."""
        self.config = options
        self.first = nnx.List(
            [Block(options, False, 0, rngs=rngs) for _ in range(options.first_dense)]
        )
        keys = jax.random.split(rngs.params(), options.num_periods)
        graph = nnx.graphdef(nnx.eval_shape(lambda: Period(options, 0, rngs=nnx.Rngs(0))))
        stacked = jax.vmap(
            lambda key, layer: nnx.state(Period(options, layer, rngs=nnx.Rngs(params=key)))
        )(keys, jnp.arange(options.num_periods))
        self.periods = nnx.merge(graph, stacked)
        self.final_norm = RMSNorm(options.d_model, options.norm_eps)

    def run_layers(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        tap: Tap | None,
    ) -> tuple[Array, LayerAux]:
        """The normalised output of the last layer."""
        # Padding may hold anything, and must reach neither a valid token nor a gradient.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        x_BLD = constrain(x_BLD.astype(jnp.dtype(self.config.dtype)), BATCH_AXES)
        first = []
        for block in self.first:
            x_BLD, aux = block(x_BLD, context, (), train, None)
            first.append(aux.mean_square)
        x_BLD, aux = self._scan(x_BLD, context, gate_state, train, tap)
        squares = [jnp.asarray(first, jnp.float32), aux.mean_square.reshape(-1)]
        return self.final_norm(x_BLD), dataclasses.replace(
            aux,
            mean_square=jnp.concatenate(squares),
            losses=jax.tree.map(jnp.mean, aux.losses),
            means=jax.tree.map(jnp.mean, aux.means),
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

    def _moe_layer(self) -> MoELayer:
        ffn = self.periods.blocks[-1].ffn
        assert isinstance(ffn, MoELayer)
        return ffn

    def _scan(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        tap: Tap | None,
    ) -> Any:
        graph, params = nnx.split(self.periods)
        key = context.key

        def body(x_BLD: Array, layer: tuple[PyTree, GateState, Array]) -> Any:
            own_params, own_state, index = layer
            own_key = None if key is None else jax.random.fold_in(key, index)
            own_context = dataclasses.replace(context, key=own_key)
            return nnx.merge(graph, own_params)(x_BLD, own_context, own_state, train, tap)

        periods = self.config.num_periods
        unroll = is_training(self, train) and periods <= MOST_UNROLLED
        if self.config.remat != "none":
            # Outside a loop XLA would merge recomputed values with the original ones.
            unroll = False
            body = jax.checkpoint(body, policy=REMAT[self.config.remat], prevent_cse=False)
        layers = (params, gate_state, jnp.arange(periods))
        return jax.lax.scan(body, x_BLD, layers, unroll=unroll)
