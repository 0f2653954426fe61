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
from jaxtyping import Array, Bool, Float, Int, PyTree

from moejax.layers.arguments import check_experts
from moejax.layers.attention import Attention, Memory
from moejax.layers.basic import FFN, NORMS, TrainOrEval, is_training
from moejax.layers.depths import Depths
from moejax.layers.latent import LatentAttention
from moejax.layers.moa import MixtureOfHeads
from moejax.layers.moe import MoELayer
from moejax.mesh import BATCH_AXES, constrain
from moejax.options import StackOptions
from moejax.types import Context, GateState, LayerAux, MoEStats, Tap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackMemory:
    """The memories of all layers, of ``length`` tokens so far, padding included.

    ``first``: by layer. ``periods``: by place in a period, and stacked over periods; of a model
    taken apart, by period and then by place.
    """

    length: Int[Array, ""]
    first: tuple[Memory, ...]
    periods: tuple[Any, ...]


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
    """Attention and feed-forward, the latter dense or a mixture of experts.

    ``layer``: its number in the model; layers with experts take theirs, ``moe_layer``, among those.
    """

    def __init__(
        self,
        options: StackOptions,
        layer: int,
        moe_layer: int | Array = 0,
        *,
        rngs: nnx.Rngs,
    ):
        width, attention = options.d_model, options.attention_of(layer)
        place = layer - options.first_dense
        before, after = options.norm_place != "after", options.norm_place != "before"

        def norm() -> nnx.Module:
            return NORMS[options.norm](width, options.norm_eps)

        self.residual_scale = options.residual_scale
        self.attention_norm = norm() if before else None
        if options.heads.experts and place >= 0:
            self.attention = MixtureOfHeads(width, options.heads, attention, rngs=rngs)
        elif options.latent.kv_rank:
            self.attention = LatentAttention(width, options.latent, attention, rngs=rngs)
        else:
            self.attention = Attention(width, attention, rngs=rngs)
        self.attention_out_norm = norm() if after else None
        self.ffn_norm = norm() if before else None
        if options.is_sparse(layer):
            self.ffn = MoELayer(width, options.experts, moe_layer, rngs=rngs)
        else:
            self.ffn = FFN(width, options.ffn, rngs=rngs)
        self.ffn_out_norm = norm() if after else None
        routed = place >= 0 and options.depths.routes(place)
        self.depths = Depths(width, options.depths, rngs=rngs) if routed else None

    def __call__(
        self,
        x_BLD: Array,
        context: Context,
        state: GateState,
        train: bool | None,
        tap: Tap | None,
        memory: Memory | None = None,
        start: Array | None = None,
    ) -> tuple[Array, LayerAux]:
        def run(x_BLD: Array, context: Context) -> tuple[Array, Array, LayerAux]:
            mixed_BLD, heads = self._attend(x_BLD, context, train, memory, start)
            y_BLD, experts = self._feed_forward(x_BLD + mixed_BLD, context, state, train, tap)
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

    def _attend(
        self,
        x_BLD: Array,
        context: Context,
        train: bool | None,
        memory: Memory | None,
        start: Array | None,
    ) -> tuple[Array, LayerAux]:
        with jax.named_scope("attention"):
            x_BLD = _applied(self.attention_norm, x_BLD)
            if isinstance(self.attention, MixtureOfHeads):
                y_BLD, aux = self.attention(x_BLD, context, train, memory, start)
            else:
                y_BLD, kept = self.attention(x_BLD, context, memory, start)
                aux = LayerAux(memory=kept)
            return self._scaled(_applied(self.attention_out_norm, y_BLD)), aux

    def _feed_forward(
        self, x_BLD: Array, context: Context, state: GateState, train: bool | None, tap: Tap | None
    ) -> tuple[Array, LayerAux]:
        x_BLD = _applied(self.ffn_norm, x_BLD)
        if not isinstance(self.ffn, MoELayer):
            with jax.named_scope("ffn"):
                return self._scaled(_applied(self.ffn_out_norm, self.ffn(x_BLD))), LayerAux()
        y_BLD, info = self.ffn(x_BLD, context, state, train)
        taps = tap(x_BLD, info) if tap else None
        y_BLD = self._scaled(_applied(self.ffn_out_norm, y_BLD))
        return y_BLD, LayerAux(info.losses, stats=info.stats, policy=info.policy, taps=taps)

    def _scaled(self, y_BLD: Array) -> Array:
        return y_BLD if self.residual_scale == 1.0 else y_BLD * self.residual_scale


def _applied(norm: Any, x_BLD: Array) -> Array:
    return x_BLD if norm is None else norm(x_BLD)


def mean_square(x_BLD: Float[Array, "*B D"], valid_BL: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The mean square of the valid tokens; 0 without any."""
    wide_BLD = jnp.where(valid_BL[..., None], x_BLD.astype(jnp.float32), 0.0)
    count = jnp.sum(valid_BL, dtype=jnp.float32) * x_BLD.shape[-1]
    return jnp.sum(jnp.square(wide_BLD)) / jnp.maximum(count, 1.0)


class Period(nnx.Module):
    """The layers that repeat. ``index`` of the period: layers of several differ in it alone."""

    def __init__(self, options: StackOptions, index: int | Array, *, rngs: nnx.Rngs):
        sparse = options.sparse_places
        self.blocks = nnx.List(
            [
                Block(
                    options,
                    options.first_dense + place,
                    index * len(sparse) + sparse.index(place) if place in sparse else 0,
                    rngs=rngs,
                )
                for place in range(options.period)
            ]
        )

    def __call__(
        self,
        x_BLD: Array,
        context: Context,
        states: GateState,
        train: bool | None,
        tap: Tap | None,
        memories: tuple[Memory, ...] | None = None,
        start: Array | None = None,
    ) -> tuple[Array, LayerAux]:
        """``states`` leads with the layers that have experts."""
        reports, number = [], 0
        for place, block in enumerate(self.blocks):
            state, own = (), context
            if isinstance(block.ffn, MoELayer):
                state = jax.tree.map(lambda x, n=number: x[n], states)
                own = context.of_layers(number, 1)
                if number and context.key is not None:
                    own = dataclasses.replace(own, key=jax.random.fold_in(context.key, number))
                number += 1
            memory = None if memories is None else memories[place]
            x_BLD, aux = block(x_BLD, own, state, train, tap, memory, start)
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
            [Block(options, layer, rngs=rngs) for layer in range(options.first_dense)]
        )
        keys = jax.random.split(rngs.params(), options.num_periods)
        graph = nnx.graphdef(nnx.eval_shape(lambda: Period(options, 0, rngs=nnx.Rngs(0))))
        stacked = jax.vmap(
            lambda key, index: nnx.state(Period(options, index, rngs=nnx.Rngs(params=key)))
        )(keys, jnp.arange(options.num_periods))
        self.periods: Any = nnx.merge(graph, stacked)
        self.final_norm = NORMS[options.norm](options.d_model, options.norm_eps)

    def run_layers(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        tap: Tap | None,
        memory: StackMemory | None = None,
    ) -> tuple[Array, LayerAux]:
        """The normalised output of the last layer. ``LayerAux.memory``: ``memory`` with these
        tokens."""
        if context.expert_BLMK is not None:
            columns = self.config.gate.columns(self.config.moe.num_experts)
            check_experts(context, self.config.num_moe_layers, columns)
        # Padding may hold anything, and must reach neither a valid token nor a gradient.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        x_BLD = constrain(x_BLD.astype(jnp.dtype(self.config.dtype)), BATCH_AXES)
        start = None if memory is None else memory.length
        first, kept = [], []
        for layer, block in enumerate(self.first):
            own = None if memory is None else memory.first[layer]
            x_BLD, aux = block(x_BLD, context, (), train, None, own, start)
            first.append(aux.mean_square)
            kept.append(aux.memory)
        x_BLD, aux = self._scan(x_BLD, context, gate_state, train, tap, memory)
        squares = [jnp.asarray(first, jnp.float32), aux.mean_square.reshape(-1)]
        if memory is not None:
            length = memory.length + x_BLD.shape[1]
            memory = StackMemory(length, tuple(kept), aux.memory)
        return self.final_norm(x_BLD), dataclasses.replace(
            aux,
            mean_square=jnp.concatenate(squares),
            losses=jax.tree.map(jnp.mean, aux.losses),
            means=jax.tree.map(jnp.mean, aux.means),
            memory=memory,
        )

    def empty_memory(self, batch: int, size: int) -> StackMemory:
        """The memory of ``size`` tokens of each sequence before the first of them is known."""
        dtype = jnp.dtype(self.config.dtype)

        def of(block: Block) -> Memory:
            return block.attention.empty_memory(batch, size, dtype)

        if isinstance(self.periods, nnx.List):
            repeated = tuple(tuple(map(of, period.blocks)) for period in self.periods)
        else:
            periods = self.config.num_periods
            repeated = jax.tree.map(
                lambda x: jnp.zeros((periods, *x.shape), x.dtype),
                tuple(map(of, self.periods.blocks)),
            )
        return StackMemory(jnp.int32(0), tuple(of(block) for block in self.first), repeated)

    def take_apart(self) -> None:
        """Gives every period parameters of its own, instead of a slice of stacked ones.

        XLA copies such a slice, with all experts, before it computes anything: that is little
        beside a batch of training, and most of the time of a step that decodes one token.
        """
        graph, params = nnx.split(self.periods)
        self.periods = nnx.List(
            [
                nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params))
                for i in range(self.config.num_periods)
            ]
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
        period = self.periods[0] if isinstance(self.periods, nnx.List) else self.periods
        ffn = period.blocks[self.config.sparse_places[0]].ffn
        assert isinstance(ffn, MoELayer)
        return ffn

    def _scan(
        self,
        x_BLD: Array,
        context: Context,
        gate_state: PyTree,
        train: bool | None,
        tap: Tap | None,
        memory: StackMemory | None,
    ) -> Any:
        key = context.key
        periods, sparse = self.config.num_periods, len(self.config.sparse_places)
        start = None if memory is None else memory.length

        def run(period: Period, x_BLD: Array, layers: tuple[GateState, Any, Any]) -> Any:
            own_states, index, memories = layers
            own_key = None if key is None else jax.random.fold_in(key, index)
            own_context = context.of_layers(index * sparse, sparse)
            own_context = dataclasses.replace(own_context, key=own_key)
            return period(x_BLD, own_context, own_states, train, tap, memories, start)

        states = jax.tree.map(lambda x: x.reshape(periods, sparse, *x.shape[1:]), gate_state)
        memories = None if memory is None else memory.periods
        if isinstance(self.periods, nnx.List):
            reports, kept = [], []
            for index, period in enumerate(self.periods):
                own_states = jax.tree.map(lambda x, i=index: x[i], states)
                own_memories = None if memories is None else memories[index]
                x_BLD, aux = run(period, x_BLD, (own_states, index, own_memories))
                kept.append(aux.memory)
                reports.append(dataclasses.replace(aux, memory=None))
            aux = jax.tree.map(lambda *x: jnp.stack(x), *reports)
            return x_BLD, _by_layer(dataclasses.replace(aux, memory=tuple(kept)))
        graph, params = nnx.split(self.periods)

        def body(x_BLD: Array, layers: tuple[PyTree, GateState, Array, Any]) -> Any:
            return run(nnx.merge(graph, layers[0]), x_BLD, layers[1:])

        unroll = is_training(self, train) and periods <= MOST_UNROLLED
        if self.config.remat != "none":
            # Outside a loop XLA would merge recomputed values with the original ones.
            unroll = False
            body = jax.checkpoint(body, policy=REMAT[self.config.remat], prevent_cse=False)
        layers = (params, states, jnp.arange(periods), memories)
        x_BLD, aux = jax.lax.scan(body, x_BLD, layers, unroll=unroll)
        return x_BLD, _by_layer(aux)


def _by_layer(aux: LayerAux) -> LayerAux:
    """Reports by period and place in it as reports by layer."""
    by_layer = {
        name: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), getattr(aux, name))
        for name in ("stats", "policy", "taps")
    }
    return dataclasses.replace(aux, **by_layer)
