"""Hash layers: a token's experts are a fixed function of its id."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from moejax.gating import ops
from moejax.gating.gate import ConstantState, FixedK
from moejax.gating.visibility import by_position, capacity_visibility, without_reroute
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    MoEConfig,
    RouterStats,
    SlotRules,
    TrainedBy,
    Visibility,
    valid_before,
)

TABLES = ("random", "balanced", "bigram")


@dataclasses.dataclass(frozen=True)
class Hash(ConstantState, FixedK):
    r"""Each token visits the experts that fixed tables give for its id. Nothing is learned.

    .. math:: y_t = \sum_{j=1}^k f_{h_j(id_t)}(x_t), \qquad
       h_j : \text{ids} \to \{(j-1) E/k, \ldots, j E/k - 1\}

    Every weight is 1, as in the paper. With k > 1 (multi-hash) column j chooses among the j-th
    block of E/k experts; the sum is one FFN k times as wide whose k segments are looked up by
    separate hashes.

    ``table``: "random" draws each id's expert; "balanced" assigns ids in the order of their counts
    in the training text, each to the expert with the fewest occurrences so far, so that no expert
    exceeds the mean by more than the most frequent id; "bigram" hashes the id together with that of
    the valid token before it in the same text, if there is one.

    Tables depend on ``seed`` and on the layer, not on ``train.seed``. So that balanced tables
    differ between layers, ids whose counts are within a factor of 2 may change places in the order.
    Ids that do not occur are spread evenly over the experts.

    Router statistics (entropy, balance losses) are those of the choice itself, 1/k per expert.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Roller, Sukhbaatar, Szlam, Weston, "Hash Layers For Large Sparse Models",
    arXiv 2106.04426.
    """

    table: Annotated[str, "'random', 'balanced' (by frequency) or 'bigram'"] = "random"
    k: Annotated[int, "tables, each over E/k of the experts"] = 1
    seed: Annotated[int, "of the tables"] = 0

    trained_by: ClassVar[TrainedBy] = "none"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("table", self.table, TABLES)
        ops.check_k(self.k, num_experts)
        if num_experts % self.k:
            raise ValueError(
                f"gate.k={self.k} tables cannot share num_experts={num_experts} equally; use a k "
                "that divides it"
            )

    def traits(self) -> GateTraits:
        return GateTraits(reads=("tokens",), reads_past=self.table == "bigram")

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {}

    def init_state(self, spec: GateSpec) -> GateState:
        """The tables, or the salts of bigram hashes; neither ever changes."""
        key = jax.random.fold_in(jax.random.key(self.seed), spec.layer)
        block = spec.num_experts // self.k
        known = {"expert_E": jnp.arange(spec.num_experts, dtype=jnp.int32)}
        if self.table == "bigram":
            salt_K = jax.random.bits(key, (self.k,), jnp.uint32)
            return {**known, "salt_K": lax.bitcast_convert_type(salt_K, jnp.int32)}
        if spec.vocab_size < 1:
            raise ValueError(
                f"gate.table={self.table!r} has a place per token id, but vocab_size="
                f"{spec.vocab_size}; pass vocab_size to moejax.MoE, or use gate.table=bigram"
            )
        if self.table == "random":
            local_KV = jax.random.randint(key, (self.k, spec.vocab_size), 0, block, jnp.int32)
        else:
            counts_V = _counts(spec)
            keys_K = jax.random.split(key, self.k)
            local_KV = jax.vmap(lambda key: balanced_table(counts_V, block, key))(keys_K)
        first_K1 = block * jnp.arange(self.k, dtype=jnp.int32)[:, None]
        return {**known, "table_KV": local_KV + first_K1}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        if self.table == "bigram":
            block = state["expert_E"].size // self.k
            local_GTK = bigram_hash(context, state["salt_K"]) % jnp.uint32(block)
            first_K = block * jnp.arange(self.k, dtype=jnp.int32)
            expert_GTK = local_GTK.astype(jnp.int32) + first_K
        else:
            found_KGT = jnp.take(state["table_KV"], context.token_GT, axis=1, mode="clip")
            expert_GTK = jnp.moveaxis(found_KGT, 0, -1)
        weight_GTK = jnp.ones(expert_GTK.shape, jnp.float32)
        hit_GTKE = expert_GTK[..., None] == state["expert_E"]
        probs_GTE = jnp.mean(hit_GTKE, axis=2, dtype=jnp.float32)
        logits_GTE = jnp.log(jnp.maximum(probs_GTE, jnp.finfo(jnp.float32).tiny))
        return GateOutput(
            ops.masked(expert_GTK, weight_GTK, context.valid_GT),
            RouterStats(logits_GTE, probs_GTE, probs_GTE),
        )

    def visibility(self, moe: MoEConfig) -> Visibility:
        # Columns share no expert, weights are equal, and experts that a token does not visit have
        # probability 0.
        def with_gate(rules: SlotRules) -> SlotRules:
            return by_position(without_reroute(rules))

        return capacity_visibility(self.k, moe, columns=1, with_gate=with_gate)


def _counts(spec: GateSpec) -> Int[Array, "V"]:
    """The count of each id, divided by a power of 2 where the sum would overflow int32."""
    if spec.token_counts is None:
        raise ValueError(
            "gate.table='balanced' needs the tokens' counts, which `moejax train` takes from its "
            "text; pass gate_state=layer.init_gate_state(token_counts=lambda: counts), or use "
            "gate.table=random"
        )
    counts_V = np.asarray(spec.token_counts(), np.int64)
    if counts_V.shape != (spec.vocab_size,):
        raise ValueError(
            f"gate.table='balanced' needs a count for each of vocab_size={spec.vocab_size} ids; "
            f"token_counts has shape {counts_V.shape}"
        )
    shift = max(int(counts_V.sum()).bit_length() - 31, 0)
    return jnp.asarray(counts_V >> shift, jnp.int32)


def balanced_table(
    counts_V: Int[Array, "V"], num_experts: int, key: PRNGKeyArray | None = None
) -> Int[Array, "V"]:
    """Experts of token ids: most frequent id first, each to the least loaded expert.

    With a key, ids whose counts are within a factor of 2 may change places in the order. In any
    order, no expert's load exceeds the mean by more than the largest count. Ids that do not occur
    go to the expert with the fewest ids. Ties go to the lower expert and the lower id.
    """
    rank_V = counts_V.astype(jnp.float32)
    if key is not None:
        rank_V *= jax.random.uniform(key, counts_V.shape, jnp.float32, 1.0, 2.0)
    order_V = jnp.argsort(-rank_V, stable=True)

    def deal(carry: tuple[Array, Array], count: Array) -> tuple[tuple[Array, Array], Array]:
        load_E, ids_E = carry
        expert = jnp.argmin(jnp.where(count > 0, load_E, ids_E)).astype(jnp.int32)
        return (load_E.at[expert].add(count), ids_E.at[expert].add(1)), expert

    zero_E = jnp.zeros(num_experts, jnp.int32)
    _, expert_V = lax.scan(deal, (zero_E, zero_E), counts_V[order_V])
    return jnp.zeros_like(expert_V).at[order_V].set(expert_V, unique_indices=True)


def bigram_hash(context: GateContext, salt_K: Int[Array, "K"]) -> UInt32[Array, "G T K"]:
    """A 32-bit hash of each token id and the id before it, for each salt.

    The id before is that of the last valid token of the same text, or -1.
    """
    shape = (context.row_GR.size, -1)
    token_BL, segment_BL = context.token_GT.reshape(shape), context.segment_GT.reshape(shape)
    before_BL = valid_before(context.valid_GT.reshape(shape))
    at_BL = jnp.maximum(before_BL, 0)
    follows_BL = jnp.take_along_axis(segment_BL, at_BL, axis=1) == segment_BL
    previous_BL = jnp.take_along_axis(token_BL, at_BL, axis=1)
    previous_BL = jnp.where(follows_BL & (before_BL >= 0), previous_BL, -1)
    token_GT1 = context.token_GT.astype(jnp.uint32)[..., None]
    previous_GT1 = previous_BL.reshape(context.token_GT.shape).astype(jnp.uint32)[..., None]
    return _scramble(_scramble(token_GT1 ^ salt_K.astype(jnp.uint32)) + previous_GT1)


def _scramble(bits: Array) -> Array:
    """A bijection of 32-bit words in which every bit depends on every other (xor, shift, odd)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
