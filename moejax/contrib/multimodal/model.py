"""One tower for images and text: the same layers for patches and bytes, experts included."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from moejax.layers.basic import fan_in, masked_mean, project
from moejax.mesh import BATCH_AXES, constrain
from moejax.models.stack import Stack
from moejax.options import StackOptions
from moejax.types import Context, LayerAux, Tap

BYTES = 256
IMAGE, TEXT = 0, 1
"""The tasks of the routing (``Context.task_B``)."""
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
"""Scales of similarities in CLIP (Radford et al., arXiv 2103.00020)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LIMoEConfig(StackOptions):
    """Sizes of the model around the layers, for grey images; ``num_tasks`` is 2.

    ``vocab_size`` is 256 bytes and a number for each patch: what gates may look tokens up by.
    """

    image_size: int
    patch_size: int
    caption_length: int
    embed_dim: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """Positions of a sequence of either modality."""
        return max(self.patches, self.caption_length)


class Tokens(NamedTuple):
    """Sequences before the layers. Padding is 0 in all arrays."""

    x_BLD: Float[Array, "B L D"]
    id_BL: Int[Array, "B L"]
    valid_BL: Bool[Array, "B L"]


class Embeddings(NamedTuple):
    """Unit vectors of B pairs; logits are ``scale`` times their products."""

    image_BZ: Float[Array, "B Z"]
    text_BZ: Float[Array, "B Z"]
    scale: Float[Array, ""]


class LIMoE(Stack):
    r"""Image and caption in a joint space: mean of the tower's outputs, projected and normalised.

    .. math::
       u = \frac{W_m \operatorname{mean}_t f(x)_t}{\| W_m \operatorname{mean}_t f(x)_t \|}

    over the valid tokens t of a sequence, with a projection W_m for each modality m. Patches and
    bytes have separate embeddings and positions, and a vector for their modality; all layers are
    shared, and attention is over the valid tokens. Sequences alternate, with the image and the
    caption of a pair side by side: [2 B, L], each padded to the longer one.

    Mustafa, Riquelme, Puigcerver, Jenatton, Houlsby, "Multimodal Contrastive Learning with LIMoE",
    arXiv 2206.02770. Deviations: a vector for the modality; RMSNorm, no biases; bytes for text.
    """

    def __init__(self, config: LIMoEConfig, *, rngs: nnx.Rngs):
        width, space = config.d_model, config.embed_dim
        pixels = config.patch_size**2

        def drawn(rows: int, std: float) -> Array:
            return nnx.initializers.normal(std)(rngs.params(), (rows, width), jnp.float32)

        self.limoe = config
        self.patch_embed_CD = nnx.Param(fan_in(rngs.params(), (pixels, width), jnp.float32))
        self.byte_embed_VD = nnx.Param(drawn(BYTES, 1.0))
        self.patch_position_embed_LD = nnx.Param(drawn(config.patches, 0.2))
        self.byte_position_embed_LD = nnx.Param(drawn(config.caption_length, 0.2))
        self.modality_embed_MD = nnx.Param(drawn(2, 0.2))
        self.build_layers(config, rngs)
        self.image_head_DZ = nnx.Param(fan_in(rngs.params(), (width, space), jnp.float32))
        self.text_head_DZ = nnx.Param(fan_in(rngs.params(), (width, space), jnp.float32))
        self.logit_scale = nnx.Param(jnp.float32(math.log(FIRST_SCALE)))

    def __call__(
        self,
        image: Tokens,
        text: Tokens,
        row_B: Int[Array, "B"],
        step: Int[Array, ""],
        key: PRNGKeyArray | None,
        gate_state: PyTree,
        train: bool | None = None,
        tap: Tap | None = None,
    ) -> tuple[Embeddings, LayerAux]:
        """The embeddings of B pairs. The arrays of ``tap`` are laid out by pair, [B, 2 L, ...], the
        image first."""
        both = jax.tree.map(interleaved, image, text)
        context = Context.of(
            *both.id_BL.shape,
            token_BL=both.id_BL,
            valid_BL=both.valid_BL,
            row_B=interleaved(2 * row_B, 2 * row_B + 1),
            task_B=interleaved(jnp.full_like(row_B, IMAGE), jnp.full_like(row_B, TEXT)),
            step=step,
            key=key,
        )
        x_BLD, aux = self.run_layers(both.x_BLD, context, gate_state, train, tap)
        pooled = masked_mean(x_BLD, both.valid_BL).reshape(len(row_B), 2, -1)
        aux = dataclasses.replace(aux, taps=jax.tree.map(jax.vmap(by_pair), aux.taps))
        embeddings = Embeddings(
            unit(project(pooled[:, IMAGE], self.image_head_DZ[...])),
            unit(project(pooled[:, TEXT], self.text_head_DZ[...])),
            self.scale(),
        )
        return embeddings, aux

    def embed_texts(
        self,
        text: Tokens,
        step: Int[Array, ""],
        key: PRNGKeyArray | None,
        gate_state: PyTree,
    ) -> Float[Array, "B Z"]:
        """Captions without images, in evaluation."""
        rows, length = text.id_BL.shape
        context = Context.of(
            rows,
            length,
            token_BL=text.id_BL,
            valid_BL=text.valid_BL,
            task_B=jnp.full(rows, TEXT, jnp.int32),
            step=step,
            key=key,
        )
        x_BLD, _ = self.run_layers(text.x_BLD, context, gate_state, False, None)
        return unit(project(masked_mean(x_BLD, text.valid_BL), self.text_head_DZ[...]))

    def patches(self, image_BHWC: Float[Array, "B H W 1"], valid_B: Bool[Array, "B"]) -> Tokens:
        """Images as sequences; an invalid image may hold anything."""
        config, size = self.limoe, self.limoe.patch_size
        side = config.image_size // size
        image_BHWC = jnp.where(valid_B[:, None, None, None], image_BHWC, 0.0)
        # [B, side, size, side, size] -> patches in reading order
        cut = image_BHWC.reshape(-1, side, size, side, size).swapaxes(2, 3)
        pixels_BLC = cut.reshape(-1, config.patches, size * size)
        x_BLD = project(pixels_BLC, self.patch_embed_CD[...])
        x_BLD += self.patch_position_embed_LD[...] + self.modality_embed_MD[...][IMAGE]
        id_BL = jnp.broadcast_to(BYTES + jnp.arange(config.patches), x_BLD.shape[:2])
        return self._padded(x_BLD, id_BL, jnp.broadcast_to(valid_B[:, None], x_BLD.shape[:2]))

    def texts(self, text_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"]) -> Tokens:
        """Captions as sequences; padding may hold anything."""
        text_BT = jnp.where(valid_BT, text_BT, 0)
        # Whole on every device first: see models.lm.
        x_BLD = jnp.take(constrain(self.byte_embed_VD[...]), text_BT, axis=0)
        x_BLD += self.byte_position_embed_LD[...] + self.modality_embed_MD[...][TEXT]
        return self._padded(x_BLD, text_BT, valid_BT)

    def scale(self) -> Float[Array, ""]:
        """exp of a parameter, at most 100. The gradient passes through the bound, so that a
        parameter beyond it can return; CLIP clips the parameter instead."""
        free = self.logit_scale[...]
        bounded = jnp.minimum(free, math.log(LARGEST_SCALE))
        return jnp.exp(free + jax.lax.stop_gradient(bounded - free))

    def _padded(self, x_BLD: Array, id_BL: Array, valid_BL: Array) -> Tokens:
        behind = ((0, 0), (0, self.limoe.length - id_BL.shape[1]))
        x_BLD = jnp.where(valid_BL[..., None], x_BLD, 0.0)
        return Tokens(
            jnp.pad(x_BLD, (*behind, (0, 0))),
            jnp.pad(jnp.where(valid_BL, id_BL, 0), behind),
            jnp.pad(valid_BL, behind),
        )


def interleaved(image_B: Array, text_B: Array) -> Array:
    """[B, ...] of both -> [2 B, ...], alternating image and text: a pair stays on one device."""
    both = jnp.stack([image_B, text_B], axis=1)
    return constrain(both.reshape(-1, *image_B.shape[1:]), BATCH_AXES)


def by_pair(x_BL: Array) -> Array:
    """[2 B, L, ...] -> [B, 2 L, ...]."""
    return x_BL.reshape(-1, 2 * x_BL.shape[1], *x_BL.shape[2:])


def unit(x_BZ: Float[Array, "B Z"]) -> Float[Array, "B Z"]:
    """L2-normalise; zero maps to zero with a finite gradient."""
    return x_BZ * jax.lax.rsqrt(jnp.sum(jnp.square(x_BZ), axis=-1, keepdims=True) + 1e-12)
