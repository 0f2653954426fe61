"""What a model knows about its tokens besides their activations. Needs jax alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a model knows about its tokens besides their activations, sequence by sequence.

    ``row_B`` are global ids of the sequences: noise is keyed by them, so a sequence draws the same
    noise wherever it lies. ``key`` may be None when nothing random is asked for.
    """

    token_BL: Int[Array, "B L"]
    position_BL: Int[Array, "B L"]
    segment_BL: Int[Array, "B L"]
    valid_BL: Bool[Array, "B L"]
    row_B: Int[Array, "B"]
    task_B: Int[Array, "B"]
    step: Int[Array, ""]
    key: PRNGKeyArray | None

    @classmethod
    def of(cls, batch: int, length: int, **known: Any) -> "Context":
        """A context of ``batch`` sequences; what is not ``known`` is taken as all valid, all 0."""
        zero_BL = jnp.zeros((batch, length), jnp.int32)
        default: dict[str, Any] = {
            "token_BL": zero_BL,
            "position_BL": jnp.broadcast_to(jnp.arange(length), (batch, length)),
            "segment_BL": zero_BL,
            "valid_BL": jnp.ones((batch, length), bool),
            "row_B": jnp.arange(batch),
            "task_B": jnp.zeros(batch, jnp.int32),
            "step": jnp.int32(0),
            "key": None,
        }
        return cls(**{**default, **known})

    def grouped(self, rows: int, train: bool) -> "GateContext":
        """The same, in routing groups of ``rows`` sequences."""

        def tokens(x_BL: Array) -> Array:
            return x_BL.reshape(-1, rows * x_BL.shape[1])

        return GateContext(
            token_GT=tokens(self.token_BL),
            position_GT=tokens(self.position_BL),
            segment_GT=tokens(self.segment_BL),
            valid_GT=tokens(self.valid_BL),
            row_GR=self.row_B.reshape(-1, rows),
            task_GR=self.task_B.reshape(-1, rows),
            step=self.step,
            key=self.key,
            train=train,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateContext:
    """Everything but the activations that a gate may look at, in routing groups.

    ``key`` already depends on (seed, step, layer); gates fold in ``row_GR``, the global ids of the
    sequences in each group, so that noise never depends on the device that draws it.
    """

    token_GT: Int[Array, "G T"]
    position_GT: Int[Array, "G T"]
    segment_GT: Int[Array, "G T"]
    valid_GT: Bool[Array, "G T"]
    row_GR: Int[Array, "G R"]
    task_GR: Int[Array, "G R"]
    step: Int[Array, ""]
    key: PRNGKeyArray | None
    train: bool = dataclasses.field(metadata={"static": True})
