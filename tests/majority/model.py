"""A transformer over bits, read by the mean of its outputs."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PyTree

from moejax.layers.basic import masked_mean
from moejax.models.stack import Stack
from moejax.options import StackOptions
from moejax.types import Context, LayerAux, Tap


class MajorityModel(Stack):
    """``model(bit_BL, context, gate_state, train)`` -> logits [B, 2], and reports of the layers."""

    def __init__(self, config: StackOptions, bits: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.embed_VD = nnx.Param(normal(rngs.params(), (2, config.d_model), jnp.float32))
        self.position_embed_LD = nnx.Param(
            normal(rngs.params(), (bits, config.d_model), jnp.float32)
        )
        self.build_layers(config, rngs)
        self.head_DV = nnx.Param(jnp.zeros((config.d_model, 2), jnp.float32))

    def __call__(
        self,
        bit_BL: Int[Array, "B L"],
        context: Context,
        gate_state: PyTree,
        train: bool | None = None,
        tap: Tap | None = None,
    ) -> tuple[Array, LayerAux]:
        x_BLD = self.embed_VD[...][bit_BL] + self.position_embed_LD[...]
        x_BLD, aux = self.run_layers(x_BLD, context, gate_state, train, tap)
        return masked_mean(x_BLD, context.valid_BL) @ self.head_DV[...], aux
