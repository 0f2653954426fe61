"""Facts about the tokens of a batch besides their activations. Needs jax alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Facts about the tokens of a batch besides their activations, sequence by sequence.

    ``valid_BL``: False marks padding, which may lie anywhere and hold anything: nothing attends to
    it, it visits no expert and counts in no mean. ``segment_BL``: a number for each text packed
    into a sequence; tokens attend to their own segment only. None: one segment. ``row_B``: global
    ids of the sequences. Noise is keyed by them, so a sequence draws the same noise on any device.
    ``key`` may be None when nothing draws noise.

    ``padded_behind`` promises that no padding lies before a valid token of its sequence. Fused
    causal attention then omits a mask that would hide nothing, and gates that cut sequences into
    segments need not reorder tokens. ``knows_tokens``: whether ``token_BL`` was given, for gates
    that route by it.

    ``expert_BLMK``: the K experts that each token visits in each of the M MoE layers, in the place
    of the router's choice; the router still weighs them and gets the gradient. A token whose ids
    are all -1 in a layer follows the router there. A layer of its own has M = 1.

    ``source_B``: the number of the data source of each sequence, for statistics alone; may be None.
    """

    token_BL: Int[Array, "B L"]
    position_BL: Int[Array, "B L"]
    segment_BL: Int[Array, "B L"] | None
    valid_BL: Bool[Array, "B L"]
    row_B: Int[Array, "B"]
    task_B: Int[Array, "B"]
    step: Int[Array, ""]
    key: PRNGKeyArray | None
    padded_behind: bool = dataclasses.field(default=False, metadata={"static": True})
    knows_tokens: bool = dataclasses.field(default=True, metadata={"static": True})
    expert_BLMK: Int[Array, "B L M K"] | None = None
    source_B: Int[Array, "B"] | None = None

    @classmethod
    def of(cls, batch: int, length: int, **known: Any) -> "Context":
        """A context of ``batch`` sequences. By default all tokens are valid and ids are 0.

        Positions count from 0 at the first valid token of a sequence, or of a segment.
        """
        default: dict[str, Any] = {
            "token_BL": jnp.zeros((batch, length), jnp.int32),
            "segment_BL": None,
            "valid_BL": jnp.ones((batch, length), bool),
            "row_B": jnp.arange(batch, dtype=jnp.int32),
            "task_B": jnp.zeros(batch, jnp.int32),
            "step": jnp.int32(0),
            "key": None,
            "knows_tokens": "token_BL" in known,
        }
        given = {**default, **known}
        if "position_BL" not in given:
            of_tokens = [x for x in (given["valid_BL"], given["segment_BL"]) if x is not None]
            if all(jnp.shape(x) == (batch, length) and are_whole(x) for x in of_tokens):
                given["position_BL"] = positions(given["valid_BL"], given["segment_BL"])
            else:  # a mistake that the layer reports
                given["position_BL"] = jnp.zeros((batch, length), jnp.int32)
        return cls(**given)

    def of_layers(self, first: int | Array, count: int) -> "Context":
        """The same context with the given experts of these MoE layers alone."""
        if self.expert_BLMK is None:
            return self
        own_BLMK = jax.lax.dynamic_slice_in_dim(self.expert_BLMK, first, count, axis=2)
        return dataclasses.replace(self, expert_BLMK=own_BLMK)

    def grouped(self, rows: int, train: bool) -> "GateContext":
        """The same context in routing groups of ``rows`` sequences."""

        segment_BL = self.segment_BL

        def tokens(x_BL: Array) -> Array:
            batch, length = x_BL.shape
            return x_BL.reshape(batch // rows, rows * length)

        return GateContext(
            token_GT=tokens(self.token_BL),
            position_GT=tokens(self.position_BL),
            segment_GT=tokens(jnp.zeros_like(self.token_BL) if segment_BL is None else segment_BL),
            valid_GT=tokens(self.valid_BL),
            row_GR=self.row_B.reshape(len(self.row_B) // rows, rows),
            task_GR=self.task_B.reshape(len(self.task_B) // rows, rows),
            step=self.step,
            key=self.key,
            train=train,
            padded_behind=self.padded_behind,
            packed=segment_BL is not None,
        )


def are_whole(x: Any) -> bool:
    """True if an array holds booleans or whole numbers."""
    kind = jnp.result_type(x)
    return jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.bool_)


def positions(
    valid_BL: Bool[Array, "B L"], segment_BL: Int[Array, "B L"] | None
) -> Int[Array, "B L"]:
    """Positions from 0 at the first valid token; padding before it has 0 too.

    Padding between valid tokens counts. The count restarts at a valid token whose segment differs
    from that of the valid token before it.
    """
    valid_BL = jnp.asarray(valid_BL)
    index_BL = jnp.broadcast_to(jnp.arange(valid_BL.shape[1], dtype=jnp.int32), valid_BL.shape)
    before_BL = valid_before(valid_BL)
    starts_BL = before_BL < 0
    if segment_BL is not None:
        segment_BL = jnp.asarray(segment_BL)
        own_BL = jnp.take_along_axis(segment_BL, jnp.maximum(before_BL, 0), axis=1)
        starts_BL |= own_BL != segment_BL
    start_BL = jax.lax.cummax(jnp.where(valid_BL & starts_BL, index_BL, -1), axis=1)
    return jnp.where(start_BL < 0, 0, index_BL - start_BL)


def valid_before(valid_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """The index of the last valid token before each token; -1 without one."""
    length = valid_BL.shape[1]
    last_BL = jax.lax.cummax(jnp.where(valid_BL, jnp.arange(length, dtype=jnp.int32), -1), axis=1)
    return jnp.pad(last_BL, ((0, 0), (1, 0)), constant_values=-1)[:, :length]


class Order(NamedTuple):
    """An order of each sequence with its valid tokens first and its padding behind them.

    ``token_BL``: the index of the i-th token in this order; ``place_BL``: the inverse. Both None:
    tokens stay in place.
    """

    token_BL: Int[Array, "B L"] | None = None
    place_BL: Int[Array, "B L"] | None = None

    @classmethod
    def of(cls, valid_BL: Bool[Array, "B L"]) -> "Order":
        """The order for these valid tokens."""
        before_BL = jnp.cumsum(valid_BL, axis=1, dtype=jnp.int32)
        index_L = jnp.arange(valid_BL.shape[1], dtype=jnp.int32)
        padding_BL = before_BL[:, -1:] + index_L - before_BL
        place_BL = jnp.where(valid_BL, before_BL - 1, padding_BL)

        def inverse(place_L: Array) -> Array:
            return jnp.zeros_like(place_L).at[place_L].set(index_L, unique_indices=True)

        return cls(jax.vmap(inverse)(place_BL), place_BL)

    def tokens(self, x_BL: Array) -> Array:
        """[B, L, ...] in the original order -> in this order."""
        return _at(x_BL, self.token_BL)

    def places(self, x_BL: Array) -> Array:
        """[B, L, ...] in this order -> in the original order."""
        return _at(x_BL, self.place_BL)


def _at(x_BL: Array, index_BL: Array | None) -> Array:
    if index_BL is None:
        return x_BL
    index_BL = index_BL.reshape(*index_BL.shape, *(1,) * (x_BL.ndim - 2))
    return jnp.take_along_axis(x_BL, index_BL, axis=1, mode="clip")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateContext:
    """A gate's inputs besides the activations, in routing groups.

    ``key`` already depends on (seed, step, layer). Gates fold in ``row_GR``, the global ids of the
    sequences in each group, so that noise does not depend on the device that draws it.
    ``padded_behind``: see ``Context``. ``packed``: rows hold several texts, one per segment.
    ``expert_GTK``: experts that were chosen elsewhere, for gates whose traits say ``follows``.
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
    padded_behind: bool = dataclasses.field(default=False, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    expert_GTK: Int[Array, "G T K"] | None = None
