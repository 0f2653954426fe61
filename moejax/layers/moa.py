"""Mixture of Attention heads: each token uses the k attention heads that its router picks."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax import losses
from moejax.dispatch.heads import from_heads, to_heads
from moejax.gating.ops import imbalance
from moejax.gating.top_k import TopK
from moejax.layers.attention import Memory, attend
from moejax.layers.basic import TrainOrEval, fan_in, is_training, project
from moejax.layers.moe import expert_init
from moejax.layers.rope import rotate
from moejax.options import AttentionOptions, HeadsOptions
from moejax.types import Context, GateOutput, GateSpec, LayerAux, Routing


class MixtureOfHeads(TrainOrEval):
    r"""E attention experts with a query and an output matrix each, one key/value head for all.

    .. math::
       p = \operatorname{softmax}(x_t W_g), \quad S = \operatorname{top}_k(p), \quad
       w_i = \frac{p_i}{\operatorname{stopgrad}(\sum_{j \in S} p_j)}, \quad
       y_t = \sum_{i \in S} w_i \operatorname{Att}(x_t W^q_i, K, V) W^o_i

    Only k queries of a token are computed, and nothing is dropped. A token sees the tokens that
    attention lets it see. Every device has all heads for its own tokens; devices along ``tensor``
    compute the same. Balance loss (per sequence) and z-loss are those of `moejax.losses`.

    References: Zhang, Shen, Huang, Zhou, Rong, Xiong, "Mixture of Attention Heads", arXiv
    2210.05144. The stopped gradient of the denominator is recalled from the paper; in the released
    code the division is commented out. Deviations: no noise on the router's logits; the router
    starts like that of `moejax.gating.TopK`, theirs at zero.
    """

    def __init__(
        self, d_model: int, options: HeadsOptions, attention: AttentionOptions, *, rngs: nnx.Rngs
    ):
        self.options, self.attention = options, attention
        experts, width = options.experts, attention.width(d_model)
        self.gate = TopK(k=options.k, renormalize=False)
        params = self.gate.init(rngs.params(), GateSpec(d_model, experts))
        self.router = nnx.data(jax.tree.map(nnx.Param, params))
        wide, narrow = (experts, d_model, width), (experts, width, d_model)
        self.query_EDI = nnx.Param(expert_init(rngs.params(), wide, jnp.float32))
        self.key_DI = nnx.Param(fan_in(rngs.params(), wide[1:], jnp.float32))
        self.value_DI = nnx.Param(fan_in(rngs.params(), wide[1:], jnp.float32))
        self.out_EID = nnx.Param(expert_init(rngs.params(), narrow, jnp.float32))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context: Context,
        train: bool | None = None,
        memory: Memory | None = None,
        start: Array | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerAux]:
        """``memory`` and ``start``: see `moejax.layers.attention.Attention`."""
        # Padding may hold anything, and must reach neither a gradient nor a sum of values.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        with jax.named_scope("router"):
            output = self._route(x_BLD, context, is_training(self, train))
        routing = output.routing
        query = to_heads(x_BLD, routing, self.query_EDI[...])
        key = project(x_BLD, self.key_DI[...])[:, :, None]
        value = project(x_BLD, self.value_DI[...])[:, :, None]
        if self.attention.rope.theta is not None:
            rope = self.attention.rope
            query, key = (rotate(x, context.position_BL, rope) for x in (query, key))
        known = None
        if memory is not None:
            assert start is not None
            memory = memory.extended((key, value), context.valid_BL, start)
            key, value = (x.astype(x_BLD.dtype) for x in memory.kept)
            known = memory.valid_BS, start
        scale = self.attention.scale or None
        mixed_BLKI = attend(query, key, value, self.attention, context, scale=scale, memory=known)
        y_BLD = from_heads(mixed_BLKI, routing, self.out_EID[...])
        with jax.named_scope("router"):
            return y_BLD, dataclasses.replace(self._report(output, context), memory=memory)

    def empty_memory(self, batch: int, size: int, dtype: jnp.dtype) -> Memory:
        """Memory for ``size`` tokens of each sequence."""
        shape = (1, self.key_DI[...].shape[-1])
        return Memory.empty(batch, size, (shape, shape), dtype)

    def _route(self, x_BLD: Array, context: Context, train: bool) -> GateOutput:
        params = jax.tree.map(
            lambda p: p[...], self.router, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )
        output = self.gate(params, (), x_BLD, context.grouped(1, train))
        weight_BLK = output.routing.weight_GTK
        total_BL1 = jax.lax.stop_gradient(jnp.sum(weight_BLK, axis=-1, keepdims=True))
        weight_BLK = weight_BLK / jnp.where(total_BL1 > 0, total_BL1, 1.0)
        routing = Routing(output.routing.expert_GTK, weight_BLK)
        return dataclasses.replace(output, routing=routing)

    def _report(self, output: GateOutput, context: Context) -> LayerAux:
        routing, stats, valid_BL = output.routing, output.stats, context.valid_BL
        load_BE = losses.expert_load(routing.expert_GTK, routing.weight_GTK, self.options.experts)
        worst = imbalance(jnp.sum(load_BE, axis=0)[None, None])[0]
        return LayerAux(
            losses={
                "moa_load_balance": losses.load_balance(load_BE, stats.probs_GTE, valid_BL),
                "moa_z": losses.z_loss(stats.logits_GTE, valid_BL),
            },
            means={"moa/max_vio": worst},
        )
