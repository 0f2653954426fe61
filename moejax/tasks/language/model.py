"""Decoder language model: RMSNorm, RoPE, grouped-query attention, dense or MoE feed-forward."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.mesh import constrain
from moejax.models.stack import Stack, StackMemory
from moejax.options import StackOptions, TextOptions
from moejax.types import Context, LayerAux, Tap


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(StackOptions):
    """The decoder's sizes and choices."""

    text: TextOptions = TextOptions()


class LM(Stack):
    """``model(token_BL, context, gate_state, train)`` -> logits [B, L, V], and ``LayerAux``."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        embed_init = nnx.initializers.normal(config.d_model**-0.5)
        self.embed_VD = nnx.Param(embed_init(rngs.params(), shape, jnp.float32))
        self.build_layers(config, rngs)
        self.text = config.text
        if not self.text.tie_embeddings:
            self.head_DV = nnx.Param(embed_init(rngs.params(), shape[::-1], jnp.float32))
        if self.text.head_bias:
            self.head_bias_V = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32))

    def __call__(
        self,
        token_BL: Int[Array, "B L"],
        context: Context,
        gate_state: PyTree,
        train: bool | None = None,
        tap: Tap | None = None,
        memory: StackMemory | None = None,
        at: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "B L V"], LayerAux]:
        """With ``memory``, from ``empty_memory``, the tokens follow those that it knows, and
        ``LayerAux.memory`` knows them too. ``at``: the one index of a token whose logits are
        wanted, [B, 1, V]; None: those of all tokens."""
        chex.assert_rank(token_BL, 2)
        chex.assert_equal_shape([token_BL, context.position_BL, context.valid_BL])
        # Scaled so that a tied embedding can serve as head with logits of unit scale.
        # Whole on every device first: otherwise each looks up its columns for the whole batch.
        embed_VD = constrain(self.embed_VD[...])
        x_BLD = jnp.take(embed_VD, token_BL, axis=0) * (
            self.text.embed_scale or self.config.d_model**0.5
        )
        x_BLD, aux = self.run_layers(x_BLD, context, gate_state, train, tap, memory)
        if at is not None:
            x_BLD = jax.lax.dynamic_slice_in_dim(x_BLD, at, 1, axis=1)
        with jax.named_scope("loss"):
            logits_BLV = self._logits(x_BLD)
        return logits_BLV, aux

    def _logits(self, x_BLD: Array) -> Array:
        text = self.text
        head_DV = self.embed_VD[...].T if text.tie_embeddings else self.head_DV[...]
        logits = x_BLD.reshape(-1, x_BLD.shape[-1]) @ head_DV.astype(x_BLD.dtype)
        logits = logits.reshape(*x_BLD.shape[:-1], -1).astype(jnp.float32)
        if text.head_bias:
            logits += self.head_bias_V[...]
        if text.logit_scale != 1.0:
            logits *= text.logit_scale
        cap = text.logit_cap
        return cap * jnp.tanh(logits / cap) if cap else logits
