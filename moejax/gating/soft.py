"""Soft MoE: experts process weighted means of a group's tokens."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.gating import ops
from moejax.gating.gate import Stateless
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    MoEConfig,
    Slots,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Soft(Stateless):
    r"""Each expert has P slots, means of all tokens; a token's output is a mean of all slots.

    .. math::
       \ell_{ti} = s \, \hat x_t \cdot \hat\mu_i, \qquad
       D = \operatorname{softmax}_t \ell, \qquad C = \operatorname{softmax}_i \ell, \qquad
       y_t = \sum_{i=1}^{E P} C_{ti} \, f_{e(i)}\Big(\sum_{t'} D_{t'i} x_{t'}\Big), \qquad
       \hat v = v / \sqrt{|v|^2 + 10^{-6}}

    The first softmax is over the valid tokens of a group, the second over its X = E P slots; slot i
    belongs to expert e(i) = i // P. Only the inputs of the logits are normalised. All arithmetic is
    float32. ``normalize=False`` computes l = x mu, without the learned scale s. Padding has weight
    0 in both; a group without valid tokens has slots of zeros, and its output is 0.

    Nothing is dropped and there is nothing to balance, so both losses are off. ``moe.transport``,
    capacity factors, ``moe.priority`` and ``moe.reroute`` are not used: slots travel to their
    experts and back, in one all-to-all each, and a group stays on one device.

    P = ``slots`` does not depend on the length of a group, because mu [D, X] has a column for each
    slot. With the authors' capacity factor c it is round(c T / E), so P slots correspond to
    c = E P / T; at c = 1 the experts cost as much as if every token visited one. For a given E P
    the authors find P = 1, with as many experts as possible, best.

    The routing serves statistics only: column e is expert e, with the sum of C over its slots as
    weight, so every token visits every expert. The logits of an expert, for ``losses.z``, are
    log-sum-exps over its slots, without noise: their softmax is the sum of the slots'
    probabilities, and their log-sum-exp is that of all slots.

    ``moe/gate/``: ``combine_similarity``, ``dispatch_similarity`` and ``router_similarity`` are
    mean cosines between the C of two tokens, the D of two slots, and the mu of two slots. Near 1,
    all tokens get the same output, or all experts the same input.

    Visibility: a token sees its whole group, in training and evaluation, even with E P = 1.

    Reference: Puigcerver, Riquelme, Mustafa, Houlsby, "From Sparse to Soft Mixtures of Experts",
    arXiv 2308.00951; initialisation and epsilon are those of the authors' V-MoE code. Deviation:
    padding, which images do not have.
    """

    slots: Annotated[int, "slots per expert, whatever the length of a group"] = 1
    normalize: Annotated[bool, "unit tokens and slots in the logits, with a learned scale"] = True
    noise_std: Annotated[float, "standard deviation of the logits' noise in training"] = 0.0

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_positive("slots", self.slots)
        ops.check_not_negative("noise_std", self.noise_std)

    def traits(self) -> GateTraits:
        return GateTraits(mixes="slots", reads_past=True)

    def columns(self, num_experts: int) -> int:
        return num_experts

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        shape = (spec.d_model, spec.num_experts, self.slots)
        mu_DEP = jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)
        params = {"router_DX": mu_DEP.reshape(spec.d_model, -1)}
        return {**params, "scale": jnp.float32(1.0)} if self.normalize else params

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTX = self._logits(params, x_GTD)
        noisy_GTX = logits_GTX
        if context.train and self.noise_std:
            noise_GTX = ops.row_noise(jax.random.normal, context, logits_GTX.shape[-1:])
            noisy_GTX = logits_GTX + self.noise_std * noise_GTX
        mixing = Slots(
            dispatch_GTX=softmax_over_tokens(noisy_GTX, context.valid_GT),
            combine_GTX=jnp.where(context.valid_GT[..., None], jax.nn.softmax(noisy_GTX), 0.0),
        )
        share_GTE = jnp.sum(self._by_expert(mixing.combine_GTX), axis=-1)
        # A share of 0 would mark the pair as absent.
        share_GTE = ops.at_least_tiny(share_GTE)
        routing, _ = ops.heaviest(share_GTE, 0, context.valid_GT)
        stats = ops.softmax_stats(jax.nn.logsumexp(self._by_expert(logits_GTX), axis=-1))
        means = self._similarities(params, mixing, context.valid_GT)
        return GateOutput(routing, stats, means=means, mixing=mixing)

    def _logits(self, params: GateParams, x_GTD: Array) -> Float[Array, "G T X"]:
        x_GTD, mu_DX = x_GTD.astype(jnp.float32), params["router_DX"]
        if not self.normalize:
            return ops.router_logits(x_GTD, mu_DX)
        return ops.router_logits(unit(x_GTD, axis=-1), params["scale"] * unit(mu_DX, axis=0))

    def _by_expert(self, slots_GTX: Array) -> Float[Array, "G T E P"]:
        return slots_GTX.reshape(*slots_GTX.shape[:2], -1, self.slots)

    def _similarities(
        self, params: GateParams, mixing: Slots, valid_GT: Array
    ) -> dict[str, Float[Array, "G"]]:
        router = mean_cosine(params["router_DX"].T[None])
        return {
            "combine_similarity": mean_cosine(mixing.combine_GTX, valid_GT),
            "dispatch_similarity": mean_cosine(jnp.swapaxes(mixing.dispatch_GTX, 1, 2)),
            "router_similarity": jnp.broadcast_to(router, valid_GT.shape[:1]),
        }

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return self.slots

    def visibility(self, moe: MoEConfig) -> Visibility:
        several = moe.group not in ("sequence", "1")
        return Visibility(True, several, True, several)


def unit(v: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Vectors along ``axis`` divided by sqrt(|v|^2 + 1e-6)."""
    return v * jax.lax.rsqrt(jnp.sum(jnp.square(v), axis=axis, keepdims=True) + 1e-6)


def softmax_over_tokens(
    logits_GTX: Float[Array, "G T X"], valid_GT: Bool[Array, "G T"]
) -> Float[Array, "G T X"]:
    """Softmax over the valid tokens of each group, 0 elsewhere; finite, as is its gradient."""
    valid_GT1 = valid_GT[..., None]
    # Not -inf: in a group without valid tokens that would be 0/0.
    logits_GTX = jnp.where(valid_GT1, logits_GTX, jnp.finfo(jnp.float32).min)
    return jnp.where(valid_GT1, jax.nn.softmax(logits_GTX, axis=1), 0.0)


def mean_cosine(
    v_GNA: Float[Array, "G N A"], counts_GN: Bool[Array, "G N"] | None = None
) -> Float[Array, "G"]:
    """Mean cosine between two different vectors among those that count; 0 for fewer than two.

    Computed from the length of the sum of unit vectors, without products of all pairs.
    """
    square_GN1 = jnp.sum(jnp.square(v_GNA), axis=-1, keepdims=True)
    some_GN1 = square_GN1 > 0 if counts_GN is None else (square_GN1 > 0) & counts_GN[..., None]
    unit_GNA = jnp.where(some_GN1, v_GNA * jax.lax.rsqrt(jnp.where(some_GN1, square_GN1, 1.0)), 0.0)
    total_G = jnp.sum(jnp.square(jnp.sum(unit_GNA, axis=1)), axis=-1)
    same_G = jnp.sum(some_GN1, axis=(1, 2)).astype(jnp.float32)
    count_G = jnp.full(total_G.shape, v_GNA.shape[1]) if counts_GN is None else counts_GN.sum(1)
    pairs_G = (count_G * (count_G - 1)).astype(jnp.float32)
    return jnp.where(pairs_G > 0, (total_G - same_G) / jnp.maximum(pairs_G, 1.0), 0.0)
