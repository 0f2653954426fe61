"""Forced routing: a given load pattern, for benchmarks."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import FixedK, Unlearned
from moejax.types import GateContext, GateOutput, GateParams, GateState, GateTraits

PATTERNS = ("balanced", "skewed", "one")
BITS = 20
"""Probabilities and draws of ``skewed`` are multiples of 2^-BITS, which keeps experts distinct."""


def zipf_inclusion(num_experts: int, k: int, exponent: float) -> np.ndarray:
    """P(a token visits expert e) in proportion to (e + 1)^-exponent, at most 1 each, k in all."""
    share_E = np.arange(1.0, num_experts + 1) ** -exponent
    capped = 0  # shares decrease, so only the first experts can exceed 1
    while capped < k and share_E[capped] * (k - capped) >= share_E[capped:].sum():
        capped += 1
    rest_E = share_E[capped:] * (k - capped) / max(share_E[capped:].sum(), 1e-300)
    return np.concatenate([np.ones(capped), rest_E])


@dataclasses.dataclass(frozen=True)
class Forced(Unlearned, FixedK):
    r"""k experts per token by its position alone, each with weight 1/k.

    .. math:: y_t = \frac{1}{k} \sum_{e \in S(\text{position}, \text{row})} f_e(x_t)

    * ``balanced``: (position + row) k + j modulo E: a run of E tokens loads every expert k times.
    * ``skewed``: expert e gets a share of the tokens in proportion to (e + 1)^-exponent (at most
      all of them), in pseudo-random order: a Weyl sequence over positions and rows selects a
      systematic sample of k distinct experts.
    * ``one``: all tokens visit experts 0 to k - 1.

    The routing is the same in every step, layer and run, in training and in evaluation, so two
    measurements never differ by their routing. Nothing is learned or drawn.

    Visibility: neither a token's experts nor their free slots depend on any token.

    Reference: none; systematic sampling is from Madow (1949).
    """

    pattern: Annotated[str, "'balanced', 'skewed' (Zipf) or 'one' (experts 0 to k-1)"] = "balanced"
    exponent: Annotated[float, "of the Zipf law of 'skewed' (0: nearly balanced)"] = 1.0
    k: Annotated[int, "experts per token"] = 2

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_choice("pattern", self.pattern, PATTERNS)
        ops.check_not_negative("exponent", self.exponent)

    def traits(self) -> GateTraits:
        return GateTraits(reads=("positions",))

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        num_experts = state["expert_E"].size
        groups, tokens = context.valid_GT.shape
        row_GT = jnp.repeat(context.row_GR, tokens // context.row_GR.shape[1], axis=1)
        expert_GTK = self.experts(context.position_GT, row_GT, num_experts)
        weight_GTK = jnp.full(expert_GTK.shape, 1.0 / self.k, jnp.float32)
        share_E = jnp.asarray(self._inclusion(num_experts) / self.k, jnp.float32)
        return GateOutput(
            ops.masked(expert_GTK, weight_GTK, context.valid_GT),
            ops.constant_stats(share_E, groups, tokens),
        )

    def experts(self, position_GT: Array, row_GT: Array, num_experts: int) -> Array:
        """The experts of every token, int32[G, T, K]."""
        column_K = jnp.arange(self.k, dtype=jnp.int32)
        if self.pattern == "one":
            return jnp.broadcast_to(column_K, (*position_GT.shape, self.k))
        if self.pattern == "balanced":
            place_GT1 = ((position_GT + row_GT) % num_experts)[..., None]
            return ((place_GT1 * self.k + column_K) % num_experts).astype(jnp.int32)
        place_GT = position_GT.astype(jnp.uint32) + row_GT.astype(jnp.uint32) * np.uint32(
            0x85EBCA6B
        )
        draw_GT = (place_GT * np.uint32(0x9E3779B9)) >> np.uint32(32 - BITS)
        at_GTK = draw_GT.astype(jnp.int32)[..., None] + (column_K << BITS)
        # The expert whose interval of [0, k) holds the point; no interval is longer than 1.
        ends_E = np.rint(np.cumsum(self._inclusion(num_experts)) * 2**BITS).astype(np.int32)
        inner_E = jnp.asarray(ends_E[:-1])
        return jnp.searchsorted(inner_E, at_GTK, side="right").astype(jnp.int32)

    def _inclusion(self, num_experts: int) -> np.ndarray:
        """P(a token visits expert e), over many tokens."""
        if self.pattern == "one":
            return (np.arange(num_experts) < self.k).astype(float)
        exponent = self.exponent if self.pattern == "skewed" else 0.0
        return zipf_inclusion(num_experts, self.k, exponent)
