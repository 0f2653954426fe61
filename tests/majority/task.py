"""The majority of a vector of bits: the smallest complete task."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from moejax.config import Config
from moejax.data.source import Source
from moejax.models.stack import StackConfig, Watch
from moejax.tasks.language.task import cross_entropy
from moejax.tasks.task import Batch, Output, Task, Totals, Units, loss_weights, stack_config
from moejax.types import Context
from tests.majority.model import MajorityModel
from tests.majority.source import MajoritySource


def build(config: Config) -> tuple[Task, Source]:
    """The classifier and its vectors."""
    task, train = config.task, config.train
    source = MajoritySource(task.bits, config.data.eval_fraction, train.batch_size, train.seed)
    model = StackConfig(causal=False, vocab_size=2, **stack_config(config))
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
        watch: Watch | None = None,
    ) -> Output:
        context = Context.of(
            *batch["bit"].shape,
            token_BL=batch["bit"],
            valid_BL=self._by_bit(batch["valid"]),
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
        )
        return Output(*self.built(params)(batch["bit"], context, gate_state, train, watch))

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        logits_BV, found = self.apply(params, gate_state, batch, step, key, train)
        _, nats_B = cross_entropy(logits_BV, batch["majority"])
        correct_B = jnp.argmax(logits_BV, axis=-1) == batch["majority"]
        metrics = {"accuracy": correct_B.astype(jnp.int32)}
        reward_BL, valid_BL = self._by_bit(-nats_B), self._by_bit(batch["valid"])
        return self.totals(found, nats_B, batch["valid"], metrics, reward_BL, valid_BL)

    def token_losses(self, predictions: Array, batch: Batch) -> Float[Array, "B L"]:
        return self._by_bit(cross_entropy(predictions, batch["majority"])[1])

    def _by_bit(self, x_B: Array) -> Array:
        """A value per vector, repeated for each of its bits."""
        return jnp.broadcast_to(x_B[:, None], (len(x_B), self.bits))
