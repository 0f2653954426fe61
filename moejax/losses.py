r"""Auxiliary router losses: functions of the routing and its statistics to one scalar.

Every balance loss is computed per scope (a sequence, a routing group or the whole batch), averaged
over scopes weighted by their valid tokens, and is 1 at perfect balance. So a value means the same
for every number of experts and every k, and token-weighted averages over micro-batches give the
value of the whole batch (for scopes that no micro-batch cuts).

Q scopes of U tokens each; padding is not counted. Arrays are global: on a mesh XLA inserts the
reductions, so the value cannot depend on it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import Policy

CONSISTENCY = "consistency"
"""The loss of two passes with different noise; the task runs both only where it has a weight."""


@partial(jax.jit, static_argnames="num_experts")
def expert_load(
    expert_QUK: Int[Array, "Q U K"], weight_QUK: Float[Array, "Q U K"], num_experts: int
) -> Float[Array, "Q E"]:
    """Active pairs (weight > 0) per scope and expert. A count: it carries no gradient."""
    expert_QU1K = jnp.where(weight_QUK > 0, expert_QUK, num_experts)[:, :, None, :]
    hit_QUEK = expert_QU1K == jnp.arange(num_experts)[:, None]
    return jnp.sum(hit_QUEK, axis=(1, 3), dtype=jnp.int32).astype(jnp.float32)


@jax.jit
def load_balance(
    load_QE: Float[Array, "Q E"],
    prob_QUE: Float[Array, "Q U E"],
    valid_QU: Bool[Array, "Q U"],
) -> Float[Array, ""]:
    r"""Share of pairs times mean router probability, summed over experts.

    .. math:: L = E \sum_e f_e P_e, \qquad
       f_e = \frac{\text{pairs of } e}{\text{pairs}}, \quad P_e = \operatorname{mean}_t p_{t,e}

    1 at perfect balance, E when one expert gets everything with certainty. The gradient flows
    through P only. f counts all k choices before capacity drops any; with k = 1 this is Switch's
    loss (Fedus et al., arXiv 2101.03961, eq. 4). docs/losses.md converts coefficients from other
    libraries, whose value at balance is 1, k or 1/k.
    """
    num_experts = load_QE.shape[-1]
    tokens_Q = jnp.sum(valid_QU, axis=1).astype(jnp.float32)
    share_QE = jax.lax.stop_gradient(load_QE / _at_least_one(jnp.sum(load_QE, -1, keepdims=True)))
    sum_QE = jnp.sum(jnp.where(valid_QU[..., None], prob_QUE, 0.0), axis=1)
    mean_QE = sum_QE / _at_least_one(tokens_Q)[:, None]
    return _over_scopes(num_experts * jnp.sum(share_QE * mean_QE, axis=-1), tokens_Q)


@jax.jit
def squared_share(mass_QE: Float[Array, "Q E"], valid_QU: Bool[Array, "Q U"]) -> Float[Array, ""]:
    r"""The unevenness of a mass over experts: 1 + CV\ :sup:`2`.

    .. math:: L = E \sum_e \left(\frac{m_e}{\sum_j m_j}\right)^2 = 1 + \operatorname{CV}(m)^2

    With m the summed gate weights this is the importance loss, with m the summed probabilities of
    being selected the load loss of Shazeer et al. (arXiv 1701.06538), whose CV^2 it exceeds by the
    constant 1 (population variance): equal gradients, equal coefficients.
    """
    num_experts = mass_QE.shape[-1]
    tokens_Q = jnp.sum(valid_QU, axis=1).astype(jnp.float32)
    total_Q1 = jnp.sum(mass_QE, axis=-1, keepdims=True)
    share_QE = mass_QE / jnp.where(total_Q1 > 0, total_Q1, 1.0)
    return _over_scopes(num_experts * jnp.sum(jnp.square(share_QE), axis=-1), tokens_Q)


@jax.jit
def z_loss(logits_QUE: Float[Array, "Q U E"], valid_QU: Bool[Array, "Q U"]) -> Float[Array, ""]:
    r"""Mean over valid tokens of the squared log-partition function of the router's logits.

    .. math:: L_z = \operatorname{mean}_t \left(\log \sum_e e^{h_{t,e}}\right)^2

    Keeps logits small, where a float32 softmax is exact. Zoph et al. (ST-MoE), arXiv 2202.08906,
    equation 5.
    """
    square_QU = jnp.square(jax.nn.logsumexp(logits_QUE, axis=-1))
    total = jnp.sum(jnp.where(valid_QU, square_QU, 0.0))
    return total / _at_least_one(jnp.sum(valid_QU).astype(jnp.float32))


@partial(jax.jit, static_argnames="num_experts")
def expert_mass(
    expert_QUK: Int[Array, "Q U K"], weight_QUK: Float[Array, "Q U K"], num_experts: int
) -> Float[Array, "Q E"]:
    """Summed gate weight per scope and expert; differentiable in the weights."""
    hit_QUKE = expert_QUK[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(hit_QUKE, weight_QUK[..., None], 0.0), axis=(1, 2))


def _at_least_one(count: Array) -> Array:
    return jnp.maximum(count, 1.0)


def _over_scopes(value_Q: Array, tokens_Q: Array) -> Array:
    """Mean over scopes, weighted by their valid tokens; 0 when there are none."""
    return jnp.sum(value_Q * tokens_Q) / _at_least_one(jnp.sum(tokens_Q))


def policy_gradient(
    policy: Policy, reward_BL: Float[Array, "B L"], valid_BL: Bool[Array, "B L"]
) -> dict[str, Float[Array, ""]]:
    r"""REINFORCE with a learned baseline, for sampled routing; ``policy`` leads with the layers.

    .. math:: L_{policy} = -\operatorname{mean}_{l,t} (r_t - b_{lt}) \log \pi(a_{lt}), \qquad
       L_{baseline} = \operatorname{mean}_{l,t} (r_t - b_{lt})^2

    Reward and, in the first, baseline are constants. One sample estimates the gradient of the
    expected reward without bias (Williams 1992; as RL-R in Clark et al., arXiv 2202.01169).
    """
    reward_BL = jax.lax.stop_gradient(reward_BL)
    advantage = reward_BL - policy.baseline_GT
    gain = jax.lax.stop_gradient(advantage) * policy.log_prob_GT
    count = _at_least_one(jnp.sum(valid_BL)) * policy.log_prob_GT.shape[0]

    def mean(value: Array) -> Array:
        return jnp.sum(jnp.where(valid_BL, value, 0.0)) / count

    return {"policy": -mean(gain), "baseline": mean(jnp.square(advantage))}


@jax.jit
def task_entropies(
    prob_BLE: Float[Array, "B L E"],
    valid_BL: Bool[Array, "B L"],
    task_B: Int[Array, "B"],
    floor_M: Float[Array, "M"],
) -> dict[str, Float[Array, ""]]:
    r"""LIMoE's entropy losses: each of M tasks (modalities) confident per token, spread overall.

    .. math::
       L_{local,m} = \operatorname{mean}_{t \in m} H(p_t), \qquad
       L_{global,m} = \max(0, \tau_m - H(\operatorname{mean}_{t \in m} p_t))

    Means are over the valid tokens of task m in the whole batch, H is in nats. With tau = log S the
    second is 0 as soon as the task is spread over S experts: a soft minimum. From 0 to log E, and
    from 0 to tau; both 0 where a task has no tokens. Not additive over micro-batches.

    Names: ``local_entropy_m`` and ``global_entropy_m``. Mustafa et al. (LIMoE), arXiv 2206.02770,
    whose global loss -H is shifted by tau before it is cut at 0, as here.
    """
    entropies = {}
    for task in range(floor_M.shape[0]):
        own_BL1 = (valid_BL & (task_B == task)[:, None])[..., None]
        tokens = jnp.sum(own_BL1).astype(jnp.float32)
        own_BLE = jnp.where(own_BL1, prob_BLE, 0.0)
        mean_E = jnp.sum(own_BLE, axis=(0, 1)) / _at_least_one(tokens)
        lack = jax.nn.relu(floor_M[task] - _entropy(mean_E))
        entropies[f"local_entropy_{task}"] = jnp.sum(_entropy(own_BLE)) / _at_least_one(tokens)
        entropies[f"global_entropy_{task}"] = jnp.where(tokens > 0, lack, 0.0)
    return entropies


def _entropy(p_E: Float[Array, "*B E"]) -> Float[Array, "*B"]:
    """In nats; p log p is 0 at 0, with a gradient of 0."""
    return -jnp.sum(p_E * jnp.log(jnp.where(p_E > 0, p_E, 1.0)), axis=-1)


@jax.jit
def symmetric_kl(
    logits_BLV: Float[Array, "B L V"],
    other_BLV: Float[Array, "B L V"],
    valid_BL: Bool[Array, "B L"],
) -> Float[Array, ""]:
    r"""The symmetric divergence of two predictions, averaged over valid tokens.

    .. math::
       L = \operatorname{mean}_t \tfrac12 \sum_v (p_{tv} - q_{tv}) (\log p_{tv} - \log q_{tv})
         = \operatorname{mean}_t \tfrac12 (KL(p \| q) + KL(q \| p))

    Zuo et al. (THOR), arXiv 2110.04260, whose code sums it over tokens. Both sides learn.
    """
    log_p_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32), axis=-1)
    log_q_BLV = jax.nn.log_softmax(other_BLV.astype(jnp.float32), axis=-1)
    gap_BLV = (jnp.exp(log_p_BLV) - jnp.exp(log_q_BLV)) * (log_p_BLV - log_q_BLV)
    total = jnp.sum(jnp.where(valid_BL, 0.5 * jnp.sum(gap_BLV, axis=-1), 0.0))
    return total / _at_least_one(jnp.sum(valid_BL).astype(jnp.float32))
