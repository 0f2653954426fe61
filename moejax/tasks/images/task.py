"""Image classification with a vision transformer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from moejax.config import Config
from moejax.config.build import loss_weights, stack_options
from moejax.data.source import Source
from moejax.errors import UserError
from moejax.options import RopeOptions
from moejax.tasks.images.dataset import load_images
from moejax.tasks.images.model import ViT, ViTConfig
from moejax.tasks.images.source import ImageSource
from moejax.tasks.language.task import cross_entropy
from moejax.tasks.task import Batch, Task, Totals, Units
from moejax.types import Context, LayerAux, Tap


def build(config: Config) -> tuple[Task, Source]:
    """The classifier and its images.

    Raises:
      UserError: images that cannot be read, or whose size is not a multiple of the patch size.
    """
    task, train = config.task, config.train
    if task.image_size % task.patch_size:
        raise UserError(
            f"task.image_size={task.image_size} is not a multiple of "
            f"task.patch_size={task.patch_size}; change one of them"
        )
    images = load_images(
        config.data.path, task.image_size, task.channels, config.data.eval_fraction
    )
    source = ImageSource(
        images, task.patch_size, train.batch_size, train.seed, train.eval_rows, task.shift
    )
    return ImageClassifier.from_config(config, len(images.classes)), source


@dataclasses.dataclass(frozen=True)
class ImageClassifier(Task):
    """A vision transformer with its loss: cross-entropy of the class of each image."""

    @classmethod
    def from_config(cls, config: Config, num_classes: int) -> "ImageClassifier":
        task = config.task
        model = stack_options(
            config,
            ViTConfig,
            attention={"causal": False, "rope": RopeOptions(theta=None)},
            experts={"vocab_size": (task.image_size // task.patch_size) ** 2},
            image_size=task.image_size,
            patch_size=task.patch_size,
            channels=task.channels,
            num_classes=num_classes,
        )
        return cls(model, loss_weights(config), config.optim.output_z_loss)

    @property
    def units(self) -> Units:
        return Units("image", "nats/image", self.model.num_patches)

    def module(self, rngs: nnx.Rngs) -> ViT:
        return ViT(self.model, rngs=rngs)

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B V"], LayerAux]:
        shape = (batch["image"].shape[0], self.model.num_patches)
        context = Context.of(
            *shape,
            # Gates that look up token ids see positions in the image: see ImageSource.
            token_BL=jnp.broadcast_to(jnp.arange(shape[1]), shape),
            valid_BL=self._by_patch(batch["valid"]),
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
            padded_behind=True,  # an image is whole, or all of it is padding
        )
        return self.built(params)(batch["image"], context, gate_state, train, tap)

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        logits_BV, aux = self.apply(params, gate_state, batch, step, key, train)
        with jax.named_scope("loss"):
            log_z_B, nats_B = cross_entropy(logits_BV, batch["label"])
            hit_B = jnp.argmax(logits_BV, axis=-1) == batch["label"]
        hits = {"accuracy": hit_B.astype(jnp.int32)}
        reward_BL, valid_BL = self._by_patch(-nats_B), self._by_patch(batch["valid"])
        return self.totals(aux, nats_B, batch["valid"], hits, reward_BL, valid_BL, log_z_B)

    def token_losses(self, predictions: Array, batch: Batch) -> Float[Array, "B L"]:
        return self._by_patch(cross_entropy(predictions, batch["label"])[1])

    def _by_patch(self, x_B: Array) -> Array:
        """A value per image, repeated for each of its patches."""
        return jnp.broadcast_to(x_B[:, None], (len(x_B), self.model.num_patches))
