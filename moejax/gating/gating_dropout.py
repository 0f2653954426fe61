"""Gating dropout: in a random share of steps every token stays on its own shard's experts."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.gating import ops
from moejax.gating.gate import InitScale, LinearRouter, Renormalize, Stateless, TokenChoice
from moejax.gating.top_k import TopK
from moejax.types import GateContext, GateOutput, GateParams, GateState, GateTraits, TrainedBy

COIN = 2**31 - 3
"""Separates the draw of a step from the draws of rows."""


@dataclasses.dataclass(frozen=True)
class GatingDropout(Stateless, LinearRouter, TokenChoice):
    r"""Top-k over all experts; in a ``local_share`` of training steps over the token's own shard.

    .. math::
       S = \operatorname{top}_k(h_e : e \in \text{shard}(t)) \text{ with probability } p, \quad
       \operatorname{top}_k(h) \text{ otherwise}

    Weights are those of top-k: a softmax over the k chosen experts or, without ``renormalize``,
    over all. One draw per step and layer decides for all tokens, so that no device exchanges tokens
    on a local step. Evaluation has no local steps.

    Shards are logical, and results are the same on every mesh. Shard i of N = ``local_shards`` owns
    experts i E/N .. (i+1) E/N - 1, and runs of ``local_rows`` sequences belong to shards 0, 1, ...,
    N - 1, 0, ... in turn. These are the device shards of a mesh with expert = N if ``local_rows``
    is the batch size over data x fsdp x expert; local steps with transport ``dropless`` then send
    no token to another device (docs/gates.md counts bytes). A run warns at its start if the fields
    do not fit the mesh. ``cells`` sends its buffers in any case and would drop most pairs of a
    local step, since a sequence then has E/N experts.

    On a local step a single sequence cannot be balanced but a batch can, so the preset computes
    balance losses over the batch. Logged: ``moe/gate/local``, 1 on local steps (mean over layers).

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    Reference: Liu et al., "Gating Dropout: Communication-efficient Regularization for Sparsely
    Activated Transformers", arXiv 2205.14336. Deviations: layers draw separately, and a shard with
    several experts routes among them by the logits. The share 0.3 is from memory and not verified;
    the variant that skips the experts of a dropped step (Gate-Expert-Drop) is not implemented.
    """

    k: Annotated[int, "experts per token"] = TopK.k
    renormalize: Renormalize = TopK.renormalize
    jitter: Annotated[float, "router input noise U(1-e, 1+e) in training"] = TopK.jitter
    init_scale: InitScale = TopK.init_scale
    local_share: Annotated[float, "probability that a step is local"] = 0.3
    local_shards: Annotated[int, "shards of experts, mesh.expert to save traffic (0: off)"] = 4
    local_rows: Annotated[
        int, "sequences per shard: train.batch_size / (mesh.data x mesh.fsdp x mesh.expert)"
    ] = 4

    trained_by: ClassVar[TrainedBy] = "task"

    @property
    def top_k(self) -> TopK:
        """The gate of all steps that are not local."""
        return TopK(self.k, self.renormalize, self.jitter, init_scale=self.init_scale)

    def traits(self) -> GateTraits:
        return GateTraits(advice=self._advice)

    def check(self, num_experts: int, train: bool) -> None:
        self.top_k.check(num_experts, train)
        if not 0.0 <= self.local_share <= 1.0:
            raise ValueError(f"gate.local_share={self.local_share} must lie in [0, 1]")
        ops.check_not_negative("local_shards", self.local_shards)
        ops.check_positive("local_rows", self.local_rows)
        if self.local_shards and num_experts % self.local_shards:
            raise ValueError(
                f"gate.local_shards={self.local_shards} does not divide num_experts={num_experts}; "
                "use the size of the mesh's expert axis, or 0 for no dropout"
            )
        if self.local_shards and self.k > num_experts // self.local_shards:
            raise ValueError(
                f"gate.k={self.k} exceeds the {num_experts // self.local_shards} experts of one of "
                f"gate.local_shards={self.local_shards} (num_experts={num_experts}); lower gate.k "
                "or gate.local_shards"
            )

    def _advice(self, rows: int, mesh: Mapping[str, int]) -> str:
        wanted = {"local_shards": mesh["expert"], "local_rows": rows}
        at_home = all(getattr(self, field) == value for field, value in wanted.items())
        off = not (self.local_shards and self.local_share)
        if off or at_home or mesh["expert"] == 1:
            return ""
        return (
            f"gate.local_shards={self.local_shards} and gate.local_rows={self.local_rows} are not "
            f"this mesh's, so local steps save no traffic; use gate.local_shards={mesh['expert']} "
            f"and gate.local_rows={rows}"
        )

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        if not (context.train and self.local_shards and self.local_share):
            return self.top_k(params, state, x_GTD, context)
        logits_GTE = self.top_k.logits(params, x_GTD, context)
        local = self.is_local(context)
        allowed_GTE = self.at_home(context, logits_GTE.shape[-1]) | ~local
        expert_GTK = ops.local_best(jnp.where(allowed_GTE, logits_GTE, -jnp.inf), self.k)
        weight_GTK = ops.softmax_weights(logits_GTE, expert_GTK, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        local_G = jnp.broadcast_to(local.astype(jnp.float32), len(x_GTD))
        return GateOutput(routing, ops.softmax_stats(logits_GTE), means={"local": local_G})

    def is_local(self, context: GateContext) -> Bool[Array, ""]:
        """True if the step is local: one draw for all its tokens and micro-batches.

        Raises:
          ValueError: the context has no key.
        """
        if context.key is None:
            raise ValueError("this gate draws random numbers: pass a context with a PRNG key")
        return jax.random.bernoulli(
            jax.random.fold_in(context.key, COIN), jnp.float32(self.local_share)
        )

    def at_home(self, context: GateContext, num_experts: int) -> Bool[Array, "G T E"]:
        """The experts of each token's own shard, as a mask."""
        home_GR = context.row_GR // self.local_rows % self.local_shards
        home_GT = jnp.repeat(home_GR, context.token_GT.shape[1] // home_GR.shape[1], axis=1)
        shard_E = jnp.arange(num_experts) // (num_experts // self.local_shards)
        return home_GT[..., None] == shard_E
