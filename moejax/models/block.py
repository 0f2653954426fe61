"""One layer of a model: attention and feed-forward, and what tokens go through them."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from moejax.layers.attention import Attention
from moejax.layers.basic import FFN, RMSNorm
from moejax.layers.depths import Depths
from moejax.layers.moa import MixtureOfHeads
from moejax.layers.moe import MoE
from moejax.mesh import BATCH_AXES, constrain
from moejax.types import Context, GateState, MoEInfo

if TYPE_CHECKING:
    from moejax.models.stack import StackConfig

Watch = Callable[[Float[Array, "B L D"], MoEInfo], PyTree]
"""What someone wants to know of an MoE layer, from its input and what it said."""


class Said(NamedTuple):
    """What a block says besides its MoE layer, by name."""

    losses: dict[str, Float[Array, ""]]
    means: dict[str, Float[Array, ""]]


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, the latter dense or a mixture of experts.

    ``place``: in its period, from 0; None for the layers before the periods, which are plain.
    """

    def __init__(
        self,
        config: "StackConfig",
        sparse: bool,
        layer: int | Array,
        place: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        width = config.d_model
        self.attention_norm = RMSNorm(width, config.norm_eps)
        choices: Any = dict(
            theta=config.rope_theta, causal=config.causal, implementation=config.attention
        )
        if config.moa_experts and place is not None:
            sizes = (config.moa_experts, config.moa_k, config.head_dim)
            self.attention = MixtureOfHeads(width, *sizes, **choices, rngs=rngs)
        else:
            sizes = (config.num_heads, config.num_kv_heads, config.head_dim)
            self.attention = Attention(width, *sizes, **choices, rngs=rngs)
        self.ffn_norm = RMSNorm(width, config.norm_eps)
        self.sparse = sparse
        if sparse:
            self.ffn = MoE(
                width,
                config.expert_d_ff,
                gate=config.gate,
                activation=config.expert_activation,
                num_shared=config.shared_experts,
                shared_gate=config.shared_gate,
                residual=config.residual,
                balance_scope=config.balance_scope,
                vocab_size=config.vocab_size,
                num_tasks=config.num_tasks,
                entropy_floors=config.entropy_floors,
                layer=layer,
                rngs=rngs,
                **vars(config.moe),
            )
        else:
            self.ffn = FFN(width, config.d_ff, config.activation, rngs=rngs)
        routed = place is not None and config.depths.routes(place)
        self.depths = Depths(width, config.depths, rngs=rngs) if routed else None

    def __call__(
        self,
        x_BLD: Array,
        context: Context,
        state: GateState,
        train: bool | None,
        watch: Watch | None,
    ) -> tuple[Array, MoEInfo | None, PyTree, Said]:
        """Output, what the MoE layer said, what ``watch`` made of it, and what else was said."""
        run = functools.partial(self._run, state=state, train=train, watch=watch)
        if self.depths is None:
            mixed_BLD, y_BLD, rest = run(x_BLD, context)
            return constrain(x_BLD + mixed_BLD + y_BLD, BATCH_AXES), *rest

        def change(x: Array, context: Context) -> tuple[Array, Any]:
            mixed, y, rest = run(x, context)
            return mixed + y, rest

        x_BLD, (info, watched, said), losses, means = self.depths(x_BLD, context, train, change)
        if info is not None:
            means |= {"mod/to_experts": means["mod/selected"]}
        said = Said({**said.losses, **losses}, {**said.means, **means})
        return constrain(x_BLD, BATCH_AXES), info, watched, said

    def _run(
        self,
        x_BLD: Array,
        context: Context,
        state: GateState,
        train: bool | None,
        watch: Watch | None,
    ) -> tuple[Array, Array, tuple[MoEInfo | None, PyTree, Said]]:
        """What attention and feed-forward layer add to the input, and what they say."""
        said = Said({}, {})
        with jax.named_scope("attention"):
            normed_BLD = self.attention_norm(x_BLD)
            if isinstance(self.attention, MixtureOfHeads):
                mixed_BLD, *named = self.attention(normed_BLD, context, train)
                said = Said(*named)
            else:
                known = (context.position_BL, context.valid_BL, context.segment_BL)
                mixed_BLD = self.attention(normed_BLD, *known, context.padded_behind)
        normed_BLD, watched = self.ffn_norm(x_BLD + mixed_BLD), None
        if isinstance(self.ffn, MoE):
            y_BLD, info = self.ffn(normed_BLD, context, state, train)
            watched = watch(normed_BLD, info) if watch else None
        else:
            with jax.named_scope("ffn"):
                y_BLD, info = self.ffn(normed_BLD), None
        return mixed_BLD, y_BLD, (info, watched, said)
