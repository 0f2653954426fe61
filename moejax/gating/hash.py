"""Hash layers: a token's experts are a fixed function of its id."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from moejax.gating import ops
from moejax.gating.tables import balanced_table, bigram_hash
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    RouterStats,
    SlotRules,
    TrainedBy,
    Visibility,
)

TABLES = ("random", "balanced", "bigram")


@dataclasses.dataclass(frozen=True)
class Hash(ops.Stateless):
    r"""Each token visits the experts that tables, drawn once, give for its id. Nothing is learned.

    .. math:: y_t = \sum_{j=1}^k f_{h_j(id_t)}(x_t), \qquad
       h_j : \text{ids} \to \{(j-1) E/k, \ldots, j E/k - 1\}

    Every weight is 1, as in the paper: there is no gate. With k > 1 (multi-hash) column j chooses
    among the j-th block of E/k experts; their sum is one FFN k times as wide, each of whose k
    segments is looked up by a hash of its own.

    ``table``: "random" draws each id's expert; "balanced" deals ids in the order of their counts in
    the training text, each to the expert with the fewest occurrences so far, so that no expert has
    more than the mean plus the most frequent id; "bigram" hashes the id with the one before (none
    at the start of a sequence or segment, or behind padding).

    Tables depend on ``seed`` and on the layer, not on ``train.seed``. Balanced tables would be
    alike in all layers: ids whose counts are within a factor of 2 may change places in the order.
    Ids that do not occur are dealt out by number.

    Router statistics (entropy, balance losses) are those of the choice itself, 1/k per expert.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Roller, Sukhbaatar, Szlam, Weston, "Hash Layers For Large Sparse Models",
    arXiv 2106.04426.
    """

    table: Annotated[str, "'random', 'balanced' (by frequency) or 'bigram'"] = "random"
    k: Annotated[int, "tables, each over E/k of the experts"] = 1
    seed: Annotated[int, "of the tables"] = 0

    trained_by: ClassVar[TrainedBy] = "none"
    reads_tokens: ClassVar[bool] = True

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("table", self.table, TABLES)
        ops.check_k(self.k, num_experts)
        if num_experts % self.k:
            raise ValueError(
                f"gate.k={self.k} tables cannot share num_experts={num_experts} equally; use a k "
                "that divides it"
            )

    def columns(self, num_experts: int) -> int:
        return self.k

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {}

    def init_state(self, spec: GateSpec) -> GateState:
        """The tables, or what tells one bigram hash from another. They never change."""
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

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return ops.token_choice_capacity(num_tokens, num_experts, self.k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        # Weights are equal, columns share no expert, and experts that a token does not visit have
        # probability 0.
        def with_gate(rules: SlotRules) -> SlotRules:
            return ops.by_position(ops.without_reroute(rules))

        return ops.capacity_visibility(self.k, moe, columns=1, with_gate=with_gate)


def _counts(spec: GateSpec) -> Int[Array, "V"]:
    """How often each id occurs, scaled down by a power of 2 where the sum would not be int32."""
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
