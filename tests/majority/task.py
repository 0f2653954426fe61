"""The majority of a vector of bits: the smallest complete task."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from moejax.config import Config
from moejax.config.build import loss_weights, stack_options
from moejax.data.source import Source
from moejax.options import RopeOptions, StackOptions
from moejax.tasks.language.task import cross_entropy
from moejax.tasks.task import Batch, Task, Totals, Units
from moejax.types import Context, LayerAux, Tap
from tests.majority.model import MajorityModel
from tests.majority.source import MajoritySource


def build(config: Config) -> tuple[Task, Source]:
    """The classifier and its vectors."""
    task, train = config.task, config.train
    source = MajoritySource(task.bits, config.data.eval_fraction, train.batch_size, train.seed)
    model = stack_options(
        config,
        StackOptions,
        attention={"causal": False, "rope": RopeOptions(theta=None)},
        experts={"vocab_size": 2},
    )
    return Majority(model, loss_weights(config), 0.0, task.bits), source


@dataclasses.dataclass(frozen=True)
class Majority(Task):
    """Cross-entropy of the majority."""

    bits: int

    @property
    def units(self) -> Units:
        return Units("vector", "nats/vector", self.bits)

    def module(self, rngs: nnx.Rngs) -> MajorityModel:
        return MajorityModel(self.model, self.bits, rngs=rngs)

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
        context = Context.of(
            *batch["bit"].shape,
            token_BL=batch["bit"],
            valid_BL=self._by_bit(batch["valid"]),
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
        )
        return self.built(params)(batch["bit"], context, gate_state, train, tap)

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        logits_BV, aux = self.apply(params, gate_state, batch, step, key, train)
        _, nats_B = cross_entropy(logits_BV, batch["majority"])
        correct_B = jnp.argmax(logits_BV, axis=-1) == batch["majority"]
        metrics = {"accuracy": correct_B.astype(jnp.int32)}
        reward_BL, valid_BL = self._by_bit(-nats_B), self._by_bit(batch["valid"])
        return self.totals(aux, nats_B, batch["valid"], metrics, reward_BL, valid_BL)

    def token_losses(self, predictions: Array, batch: Batch) -> Float[Array, "B L"]:
        return self._by_bit(cross_entropy(predictions, batch["majority"])[1])

    def _by_bit(self, x_B: Array) -> Array:
        """A value per vector, repeated for each of its bits."""
        return jnp.broadcast_to(x_B[:, None], (len(x_B), self.bits))
