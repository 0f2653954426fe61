"""Hierarchical mixture of experts: noisy top-k of groups, then of the experts in each group."""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import Stateless, token_choice_capacity
from moejax.gating.noisy_top_k import load_probability
from moejax.gating.visibility import capacity_visibility
from moejax.mesh import group_local
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    RouterStats,
    TrainedBy,
    Visibility,
)


class _Levels(NamedTuple):
    """One array per group of experts (A), and one per expert of each group (J)."""

    outer_GTA: Array
    inner_GTAJ: Array


@dataclasses.dataclass(frozen=True)
class Hierarchical(Stateless):
    r"""Top-k_1 of the groups of experts, then top-k_2 of the experts of each chosen group.

    .. math::
       G = \operatorname{softmax}(\operatorname{KeepTopK}(H, k_1)), \quad
       G_i = \operatorname{softmax}(\operatorname{KeepTopK}(H_i, k_2)), \quad
       y = \sum_{i \in S} \sum_{j \in S_i} G_i \, G_{ij} \, f_{ij}(x)

    H and each H_i are noisy logits as in gate ``shazeer``. Each level is renormalised over the k it
    kept, so a token's weights sum to 1. ``noisy=False`` draws no noise. Expert (i, j) has id
    i * E / groups + j: a group is a run of neighbouring experts. An ``expert`` mesh axis that
    ``groups`` divides (or that divides ``groups``) therefore gives each group its own devices, and
    a token's rows go to the devices of k_1 groups only.

    Losses: ``importance`` of the product weights, and ``load`` with the published estimate

    .. math:: \operatorname{load}_{ij} = \operatorname{load}_i(H) \cdot
       \frac{\sum_{t: i \in S_t} P_t(j | i)}{|\{t : i \in S_t\}|}

    computed over a routing group (``moe.group``); wider balance scopes sum over groups. Without
    noise it is the probability p_i p_{j|i}. The z-loss is that of the logits H_i + H_{ij}.

    Visibility: a token sees neither later tokens nor other sequences, except through capacity,
    which the original does not have.

    Reference: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, appendix B.
    """

    groups: Annotated[int, "groups of experts; they divide num_experts"] = 4
    k_groups: Annotated[int, "groups per token"] = 2
    k: Annotated[int, "experts per token within each of its groups"] = 2
    noisy: Annotated[bool, "learned noise on both levels' logits, in training"] = True
    min_std: Annotated[float, "smallest standard deviation of the noise"] = 0.01
    init_scale: Annotated[float, "without noise, router init: std = sqrt(init_scale/d_model)"] = 0.1

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        if self.groups < 1 or num_experts % self.groups:
            raise ValueError(
                f"gate.groups={self.groups} does not divide num_experts={num_experts}; choose a "
                "number of groups that does"
            )
        per_group = num_experts // self.groups
        for field, of, what in (("k_groups", self.groups, "groups"), ("k", per_group, "a group")):
            k = getattr(self, field)
            if not 1 <= k <= of:
                raise ValueError(
                    f"gate.{field}={k} must lie between 1 and {of}, the size of {what} "
                    f"(num_experts={num_experts}, gate.groups={self.groups})"
                )
            if train and k == 1 < of:
                raise ValueError(
                    f"gate.{field}=1 gives this level the constant weight 1 (softmax over one kept "
                    f"logit), so its router gets no gradient from the task; use gate.{field}=2"
                )
        ops.check_positive("min_std", self.min_std)
        ops.check_positive("init_scale", self.init_scale)

    def columns(self, num_experts: int) -> int:
        return self.k_groups * self.k

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        sizes = {"outer_DA": self.groups, "inner_DE": spec.num_experts}
        if not self.noisy:
            drawn = {}
            for i, (name, size) in enumerate(sizes.items()):
                wide = dataclasses.replace(spec, num_experts=size)
                drawn[name] = ops.init_router(jax.random.fold_in(key, i), wide, self.init_scale)
            return drawn
        sizes |= {"outer_noise_DA": self.groups, "inner_noise_DE": spec.num_experts}
        return {name: jnp.zeros((spec.d_model, size), jnp.float32) for name, size in sizes.items()}

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        clean = self._levels(x_GTD, params["outer_DA"], params["inner_DE"])
        noisy, std = clean, None
        if self.noisy:
            raw = self._levels(x_GTD, params["outer_noise_DA"], params["inner_noise_DE"])
            std = jax.tree.map(lambda h: jax.nn.softplus(h) + self.min_std, raw)
            if context.train:
                size = self.groups + params["inner_DE"].shape[1]
                noise = self._split(ops.row_noise(jax.random.normal, context, (size,)))
                noisy = jax.tree.map(lambda h, n, s: h + n * s, clean, noise, std)
        expert_GTK, weight_GTK, hit_GTA = group_local(self._select)(noisy)
        whole = (*x_GTD.shape[:2], params["inner_DE"].shape[1])
        inner_GTAJ = jax.nn.softmax(clean.inner_GTAJ, axis=-1)
        probs_GTE = (jax.nn.softmax(clean.outer_GTA)[..., None] * inner_GTAJ).reshape(whole)
        load_GTE = probs_GTE
        if std is not None:
            load_GTAJ = group_local(self._load)(clean, noisy, std, hit_GTA, context.valid_GT)
            load_GTE = load_GTAJ.reshape(whole)
        logits_GTE = (clean.outer_GTA[..., None] + clean.inner_GTAJ).reshape(whole)
        return GateOutput(
            ops.masked(expert_GTK, weight_GTK, context.valid_GT),
            RouterStats(logits_GTE, probs_GTE, load_GTE),
        )

    def _levels(self, x_GTD: Array, outer_DA: Array, inner_DE: Array) -> _Levels:
        return self._split(ops.router_logits(x_GTD, jnp.concatenate([outer_DA, inner_DE], axis=1)))

    def _split(self, both_GTN: Array) -> _Levels:
        outer_GTA, inner_GTE = both_GTN[..., : self.groups], both_GTN[..., self.groups :]
        return _Levels(outer_GTA, inner_GTE.reshape(*inner_GTE.shape[:2], self.groups, -1))

    def _select(self, noisy: _Levels) -> tuple[Array, Array, Array]:
        """Experts and weights, heaviest first, and a mask of the groups that each token chose."""
        group_GTP, share_GTP = ops.top_k_routing(noisy.outer_GTA, self.k_groups, renormalize=True)
        each_GTAS, within_GTAS = ops.top_k_routing(noisy.inner_GTAJ, self.k, renormalize=True)
        at_GTP1 = group_GTP[..., None]
        chosen_GTPS = jnp.take_along_axis(each_GTAS, at_GTP1, axis=2)
        expert_GTPS = at_GTP1 * noisy.inner_GTAJ.shape[-1] + chosen_GTPS
        weight_GTPS = share_GTP[..., None] * jnp.take_along_axis(within_GTAS, at_GTP1, axis=2)
        flat = (*group_GTP.shape[:2], self.k_groups * self.k)
        # A product of small weights may underflow, and 0 would mark the pair as absent.
        weight_GTK = ops.at_least_tiny(weight_GTPS.reshape(flat))
        weight_GTK, order_GTK = jax.lax.top_k(weight_GTK, flat[-1])
        expert_GTK = jnp.take_along_axis(expert_GTPS.reshape(flat), order_GTK, axis=-1)
        return expert_GTK, weight_GTK, jnp.any(at_GTP1 == jnp.arange(self.groups), axis=2)

    def _load(
        self, clean: _Levels, noisy: _Levels, std: _Levels, hit_GTA: Array, valid_GT: Array
    ) -> Array:
        outer_GTA, inner_GTAJ = (
            load_probability(clean[level], noisy[level], std[level], k)
            for level, k in enumerate((self.k_groups, self.k))
        )
        valid_GT1 = valid_GT[..., None]
        smooth_GA = jnp.sum(jnp.where(valid_GT1, outer_GTA, 0.0), axis=1)
        sent_GA = jnp.sum(hit_GTA & valid_GT1, axis=1, dtype=jnp.float32)
        ratio_GA = smooth_GA / jnp.maximum(sent_GA, 1.0)
        return jnp.where(hit_GTA[..., None], inner_GTAJ, 0.0) * ratio_GA[:, None, :, None]

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return token_choice_capacity(num_tokens, num_experts, self.k_groups * self.k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return capacity_visibility(self.k_groups * self.k, moe)
