"""The library's gates without an input: one choice of experts, the same for every example.

A router that reads the constant 1 is a vector of logits; DSelect-k has a static mode of its own.
Noise, where a gate has some, is drawn anew for every example of a batch, as for tokens.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from moejax import gating
from moejax.types import Context, Gate, GateOutput, GateParams, GateSpec

K = 4
"""Experts to select, and selectors of DSelect-k."""
START = 0.01
"""Standard deviation of logits at the start: near a tie, as DSelect-k starts near all experts."""


@dataclasses.dataclass(frozen=True)
class StaticGate:
    """A gate of the library and how it is used here.

    ``noisy``: weights differ between the examples of a batch in training. ``dense``: evaluation
    takes softmax(h) over all experts instead of the gate's own evaluation (Gumbel-softmax: it is
    the mean of what training samples at a low temperature).
    """

    gate: Gate
    noisy: bool = False
    dense: bool = False

    def init(self, key: Array, num_experts: int) -> GateParams:
        return self.gate.init(key, GateSpec(1, num_experts))

    def training(
        self, params: GateParams, num_experts: int, batch: int, step: Array, key: Array
    ) -> "Weights":
        """Weights [B or 1, E] of a step, and the two losses of DSelect-k (0 for other gates)."""
        tokens = batch if self.noisy else 1
        out = self._call(params, num_experts, tokens, step=step, key=key)
        zero = jnp.zeros(())
        entropy_G = out.means.get("selector_entropy", zero)
        penalty = out.losses.get("dselect_range", zero)
        return Weights(_of_experts(out, num_experts), jnp.sum(entropy_G), jnp.asarray(penalty))

    def evaluation(self, params: GateParams, num_experts: int) -> Array:
        """Weights [E] without noise."""
        out = self._call(params, num_experts, 1)
        return out.stats.probs_GTE[0, 0] if self.dense else _of_experts(out, num_experts)[0]

    def _call(self, params: GateParams, num_experts: int, tokens: int, **known) -> GateOutput:
        state = self.gate.init_state(GateSpec(1, num_experts))
        context = Context.of(1, tokens, **known).grouped(1, train=bool(known))
        return self.gate(params, state, jnp.ones((1, tokens, 1)), context)


class Weights(NamedTuple):
    weight_BE: Array
    entropy: Array
    """sum_i H(r(z_i)), the mean over the batch."""
    range: Array
    """sum_i 1 / sum_e r_e(z_i), the mean over the batch; 0 if E is a power of two."""


def dselect_k(gamma: float, k: int = K) -> StaticGate:
    """Its losses are weighted by who trains it."""
    return StaticGate(gating.DSelectK(k=k, gamma=gamma, per_example=False, entropy_weight=0.0))


def top_k(start: float = START, k: int = K) -> StaticGate:
    """Softmax over the k kept logits, no noise."""
    return StaticGate(gating.TopK(k=k, renormalize=True, init_scale=start**2))


def noisy_top_k(k: int = K) -> StaticGate:
    """Learned noise in training (Shazeer et al. 2017), none in evaluation; no balance losses."""
    return StaticGate(gating.NoisyTopK(k=k), noisy=True)


def gumbel_softmax(steps: int) -> StaticGate:
    """softmax((h + Gumbel) / tau) over all experts, tau falling from 1 to 0.1 by equal factors."""
    gate = gating.make(
        "evomoe", temperature=1.0, min_temperature=0.1, temperature_steps=steps,
        threshold=0.0, hard_step=-1, weights="gumbel", init_scale=START**2,
    )  # fmt: skip
    return StaticGate(gate, noisy=True, dense=True)


def softmax() -> StaticGate:
    """The dense mixture."""
    return StaticGate(gating.Dense(init_scale=START**2))


def _of_experts(out: GateOutput, num_experts: int) -> Array:
    """The routing of a single group as weights of experts [T, E]."""
    expert_TK, weight_TK = out.routing.expert_GTK[0], out.routing.weight_GTK[0]
    is_expert_TKE = expert_TK[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(is_expert_TKE, weight_TK[..., None], 0.0), axis=1)
