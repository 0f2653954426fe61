"""THOR: in training one random expert per layer serves the whole batch."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.gating import ops
from moejax.gating.gate import Unlearned
from moejax.types import GateContext, GateOutput, GateParams, GateState, GateTraits, Routing

EVALUATIONS = ("token", "sequence", "mean")
STEP_DRAW = 1
"""Separates the draw of a step from the draws of rows, which are keyed by row ids."""


@dataclasses.dataclass(frozen=True)
class Thor(Unlearned):
    r"""All tokens of a step visit one expert per layer, drawn at random.

    .. math::
       y_t = f_a(x_t), \quad a \sim \operatorname{Uniform}(1..E) \text{ per step and layer}

    A consistency loss (``moe.losses.consistency``, set by the preset) makes the experts
    interchangeable: the model runs twice with different draws, and the loss pulls the two
    distributions of the next token together (docs/losses.md).

    ``evaluation``: "token" draws an expert per token and "sequence" one per sequence (both from the
    run's seed, so that the loss is reproducible; both need a key). "mean" averages all experts at E
    times the compute and draws nothing.

    With ``cells`` every expert needs a slot for every token, whatever the capacity factor: use
    ``dropless`` (the preset).

    Visibility: experts do not depend on any token.

    Reference: Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts",
    arXiv 2110.04260. Deviations: the consistency loss is a mean over tokens and is added to the
    mean of the two cross-entropies; the authors' code sums all three. Halving their weight (1 in
    the code; 5 in the paper, from memory and not verified) gives the same gradient up to that
    common factor; the preset's 0.5 corresponds to the code. "sequence" draws per sequence; their
    code for it draws per position.
    """

    evaluation: Annotated[str, "'token' or 'sequence': a random expert each; 'mean': all"] = "token"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_choice("evaluation", self.evaluation, EVALUATIONS)

    def traits(self) -> GateTraits:
        # A sequence's noise is one draw, and its first number is the expert of a sequence.
        return GateTraits(reads_past=self.evaluation == "token")

    def columns(self, num_experts: int) -> int:
        return num_experts if self.evaluation == "mean" else 1

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        groups, tokens = context.valid_GT.shape
        num_experts = state["expert_E"].size
        stats = ops.uniform_stats(num_experts, groups, tokens)
        if self.evaluation == "mean":
            weight_GTE = stats.probs_GTE
            if context.train:
                chosen_E = state["expert_E"] == self._of_step(context, num_experts)
                weight_GTE = jnp.broadcast_to(chosen_E.astype(jnp.float32), weight_GTE.shape)
            return GateOutput(ops.heaviest(weight_GTE, 0, context.valid_GT)[0], stats)
        if context.train:
            expert_GT = jnp.broadcast_to(self._of_step(context, num_experts), (groups, tokens))
        else:
            expert_GT = self._of_row_or_token(context, num_experts)
        weight_GT = context.valid_GT.astype(jnp.float32)
        return GateOutput(Routing(expert_GT[..., None], weight_GT[..., None]), stats)

    def _of_step(self, context: GateContext, num_experts: int) -> Int[Array, ""]:
        if context.key is None:
            raise ValueError("gate thor draws an expert per step: pass a context with a PRNG key")
        key = jax.random.fold_in(context.key, STEP_DRAW)
        return jax.random.randint(key, (), 0, num_experts, jnp.int32)

    def _of_row_or_token(self, context: GateContext, num_experts: int) -> Int[Array, "G T"]:
        groups, tokens = context.valid_GT.shape
        # One number per token, so that both draws are keyed by the row alone; a sequence takes
        # that of its first valid token.
        uniform_GT = ops.row_noise(jax.random.uniform, context, ())
        if self.evaluation == "sequence":
            uniform_BL = uniform_GT.reshape(context.row_GR.size, -1)
            first_B1 = ops.order_of(context).tokens(uniform_BL)[:, :1]
            uniform_GT = jnp.broadcast_to(first_B1, uniform_BL.shape).reshape(groups, tokens)
        expert_GT = (uniform_GT * num_experts).astype(jnp.int32)
        return jnp.minimum(expert_GT, num_experts - 1)

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return num_tokens
