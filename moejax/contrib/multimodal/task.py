"""Contrastive learning of images and captions in one tower."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from moejax.config import Config
from moejax.config.build import loss_weights, stack_options
from moejax.contrib.multimodal.model import BYTES, Embeddings, LIMoE, LIMoEConfig, interleaved
from moejax.contrib.multimodal.source import PairSource, encode, prompts
from moejax.data.source import Source
from moejax.errors import UserError
from moejax.mesh import BATCH_AXES, ambient, axis_size
from moejax.options import RopeOptions
from moejax.tasks.images.dataset import load_images
from moejax.tasks.task import Batch, Task, Totals, Units
from moejax.types import GateTraits, LayerAux, Tap


def build(config: Config) -> tuple[Task, Source]:
    """The tower and the pairs.

    Raises:
      UserError: sizes that do not fit the images or the captions, gradient accumulation, a
        recorded routing, or a missing scikit-learn.
    """
    own, train = config.task, config.train
    if train.grad_accum > 1:
        raise UserError(
            f"train.grad_accum={train.grad_accum} would contrast a micro-batch with itself "
            "only; task multimodal needs the whole batch at once: use train.grad_accum=1"
        )
    images = load_images(eval_fraction=config.data.eval_fraction)
    size = images.train_NHWC.shape[1]
    if size % own.patch_size:
        fitting = [str(n) for n in range(1, size + 1) if size % n == 0]
        raise UserError(
            f"task.patch_size={own.patch_size} does not divide images of {size} x {size} pixels; "
            f"use {', '.join(fitting)}"
        )
    for name in ("image_experts", "text_experts"):
        if own[name] > config.moe.num_experts:
            raise UserError(
                f"task.{name}={own[name]:g} is more than moe.num_experts="
                f"{config.moe.num_experts}; use at most that"
            )
    source = PairSource(
        images, own.patch_size, own.caption_length, train.batch_size, train.seed, train.eval_rows
    )
    task = Multimodal.from_config(config, size)
    if task.model.num_moe_layers and GateTraits.of(task.model.gate).check_rows is not None:
        raise UserError(
            f"moe.gate.name={config.moe.gate.name} looks up routing by rows of text, and a pair is "
            "two sequences; use another gate"
        )
    return task, source


@dataclasses.dataclass(frozen=True)
class Multimodal(Task):
    r"""Contrastive learning over the pairs of a batch, all devices together.

    .. math::
       s_{ij} = \tau\, u_i \cdot v_j, \qquad
       L = \frac{1}{2B} \sum_i \frac{1}{|P_i|} \sum_{j \in P_i}
           \left( -\log \frac{e^{s_{ij}}}{\sum_k e^{s_{ik}}}
                  -\log \frac{e^{s_{ji}}}{\sum_k e^{s_{ki}}} \right)

    u are images, v captions, tau is a learned scale and P_i are the pairs with the digit of i: with
    ten digits captions repeat in a batch, and all captions of a digit match it (Yang et al., UniCL,
    arXiv 2204.03610). With distinct labels this is CLIP's loss (arXiv 2103.00020). At equal
    similarities it is log B. Invalid pairs match nothing.

    In evaluation, ``accuracy`` is zero-shot: the predicted class has the prompt most similar to the
    image. ``image_to_text`` and ``text_to_image``: the most similar one in the batch has the right
    digit.
    """

    prompts: tuple[str, ...]
    """A caption per class, in the order of the labels; empty: no zero-shot evaluation."""

    @classmethod
    def from_config(cls, config: Config, image_size: int) -> "Multimodal":
        own = config.task
        patches = (image_size // own.patch_size) ** 2
        return cls(
            stack_options(
                config,
                LIMoEConfig,
                attention={"causal": False, "rope": RopeOptions(theta=None)},
                experts={
                    "vocab_size": BYTES + patches,
                    "num_tasks": 2,
                    "entropy_floors": (math.log(own.image_experts), math.log(own.text_experts)),
                },
                image_size=image_size,
                patch_size=own.patch_size,
                caption_length=own.caption_length,
                embed_dim=own.embed_dim,
            ),
            loss_weights(config),
            0.0,
            prompts(),
        )

    @property
    def units(self) -> Units:
        return Units("pair", "nats/pair", 2 * self.model.length)

    def module(self, rngs: nnx.Rngs) -> LIMoE:
        return LIMoE(self.model, rngs=rngs)

    def countable(self) -> "Task":
        """Without the prompts, which are not a part of the cost of a pair."""
        return dataclasses.replace(super().countable(), prompts=())

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        tap: Tap | None = None,
    ) -> tuple[Embeddings, LayerAux]:
        model, valid_B = self.built(params), batch["valid"]
        return model(
            model.patches(batch["image"], valid_B),
            model.texts(batch["text"], batch["text_valid"] & valid_B[:, None]),
            batch["row"],
            step,
            jax.random.fold_in(key, step),
            gate_state,
            train,
            tap,
        )

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        embeddings, aux = self.apply(params, gate_state, batch, step, key, train)
        label_B, valid_B = batch["label"], batch["valid"]
        with jax.named_scope("loss"):
            logits_BB = similarities(embeddings)
            loss_B = contrastive(logits_BB, label_B, valid_B)
            hits = {
                "image_to_text": retrieved(logits_BB, label_B, valid_B),
                "text_to_image": retrieved(logits_BB.T, label_B, valid_B),
            }
        if self.prompts and not train:
            class_XZ = self._classes(params, gate_state, step, key)
            hits["accuracy"] = jnp.argmax(embeddings.image_BZ @ class_XZ.T, axis=-1) == label_B
        hits = {name: hit_B.astype(jnp.int32) for name, hit_B in hits.items()}
        valid_BL = interleaved(*valid_tokens(batch, self.model))
        reward_BL = jnp.broadcast_to(-jnp.repeat(loss_B, 2)[:, None], valid_BL.shape)
        return self.totals(aux, loss_B, valid_B, hits, reward_BL, valid_BL)

    def token_losses(self, predictions: Embeddings, batch: Batch) -> Float[Array, "B L"]:
        """The loss of the pair, among those of ``batch``."""
        loss_B = contrastive(similarities(predictions), batch["label"], batch["valid"])
        return jnp.broadcast_to(loss_B[:, None], (len(loss_B), 2 * self.model.length))

    def _classes(
        self, params: PyTree, gate_state: PyTree, step: Array, key: Array
    ) -> Float[Array, "X Z"]:
        """Embeddings of the prompts, padded to the rows that mesh and groups need."""
        text, valid = encode(self.prompts, self.model.caption_length)
        shards = axis_size(ambient(), *BATCH_AXES)
        missing = -len(text) % (shards * self.model.moe.rows_per_group(1))
        rows = ((0, missing), (0, 0))
        model = self.built(params)
        tokens = model.texts(jnp.pad(jnp.asarray(text), rows), jnp.pad(jnp.asarray(valid), rows))
        key = jax.random.fold_in(key, step)
        return model.embed_texts(tokens, step, key, gate_state)[: len(text)]


def valid_tokens(batch: Batch, model: LIMoEConfig) -> tuple[Array, Array]:
    """Masks of the positions with tokens, for images and for captions, bool[B, L] each."""
    valid_B1 = batch["valid"][:, None]
    position_L = jnp.arange(model.length)
    text_BL = jnp.pad(batch["text_valid"], ((0, 0), (0, model.length - model.caption_length)))
    return valid_B1 & (position_L < model.patches), valid_B1 & text_BL


def similarities(embeddings: Embeddings) -> Float[Array, "B B"]:
    """Similarity of every image (row) with every caption (column)."""
    return embeddings.scale * (embeddings.image_BZ @ embeddings.text_BZ.T)


def contrastive(
    logits_BB: Float[Array, "B B"], label_B: Int[Array, "B"], valid_B: Bool[Array, "B"]
) -> Float[Array, "B"]:
    """The loss of each pair, averaged over both directions: see ``Multimodal``. 0 if invalid."""
    match_BB = (label_B[:, None] == label_B) & valid_B
    share_BB = match_BB / jnp.maximum(jnp.sum(match_BB, axis=1, keepdims=True), 1)

    def one_way(logits_BB: Array) -> Array:
        log_p_BB = jax.nn.log_softmax(_among_valid(logits_BB, valid_B), axis=1)
        return -jnp.sum(jnp.where(match_BB, share_BB * log_p_BB, 0.0), axis=1)

    loss_B = (one_way(logits_BB) + one_way(logits_BB.T)) / 2
    return jnp.where(valid_B, loss_B, 0.0)


def retrieved(
    logits_BB: Float[Array, "B B"], label_B: Int[Array, "B"], valid_B: Bool[Array, "B"]
) -> Bool[Array, "B"]:
    """True for rows whose most similar valid column has the row's label."""
    return label_B[jnp.argmax(_among_valid(logits_BB, valid_B), axis=1)] == label_B


def _among_valid(logits_BB: Array, valid_B: Array) -> Array:
    """Mask with a finite number instead of -inf: a batch may have no valid pair."""
    return jnp.where(valid_B, logits_BB, jnp.finfo(jnp.float32).min)
