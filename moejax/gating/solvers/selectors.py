"""Smoothed binary codes: the selectors of DSelect-k (Hazimeh et al., arXiv 2106.03760)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY = 1e-6
"""Added where the published formulas divide by, or take the logarithm of, what may be 0."""


def smooth_step(z: Float[Array, "*any"], gamma: float) -> Float[Array, "*any"]:
    r"""0 up to -gamma/2, 1 from gamma/2, between them the cubic with slope 0 at both ends.

    .. math:: S(z) = -\frac{2}{\gamma^3} z^3 + \frac{3}{2 \gamma} z + \frac12

    Exactly 0 and 1 outside, where its gradient is 0: a bit that is decided stays decided.
    """
    scaled = jnp.clip(z.astype(jnp.float32) / gamma, -0.5, 0.5)
    cubic = (1.5 - 2.0 * scaled * scaled) * scaled + 0.5
    return jnp.where(scaled <= -0.5, 0.0, jnp.where(scaled >= 0.5, 1.0, cubic))


def selectors(
    z_SM: Float[Array, "*b S M"], code_E: Int[Array, "E"], gamma: float
) -> Float[Array, "*b S E"]:
    r"""Each selector's distribution over experts.

    .. math:: r_e(z) = \prod_j S(z_j)^{\text{bit}_j(e)} \, (1 - S(z_j))^{1 - \text{bit}_j(e)}

    with the bits of the expert's code, most significant first. Sums to 1 over all 2^M codes, so to
    less over E of them when E is no power of two.
    """
    bits = z_SM.shape[-1]
    step_SM = smooth_step(z_SM, gamma)
    chosen_SE = jnp.ones((*z_SM.shape[:-1], code_E.size), jnp.float32)
    for j in range(bits):
        is_one_E = (code_E >> (bits - 1 - j)) & 1 == 1
        one_S1 = step_SM[..., j, None]
        chosen_SE = chosen_SE * jnp.where(is_one_E, one_S1, 1.0 - one_S1)
    return chosen_SE


def dselect_k_weights(
    z_SM: Float[Array, "*b S M"], w_S: Float[Array, "*b S"], num_experts: int, gamma: float
) -> Float[Array, "*b E"]:
    r"""Expert weights of S selectors with codes z and mixing logits w.

    .. math:: q = \sum_i \operatorname{softmax}(w)_i \, r(z_i)

    At most S weights stay above 0 once all bits are decided (fewer if selectors agree). Not
    renormalised when E is no power of two.

    Raises:
      ValueError: z has not ceil(log2 E) bits.
    """
    if z_SM.shape[-1] != code_bits(num_experts):
        raise ValueError(
            f"num_experts={num_experts} have codes of {code_bits(num_experts)} bits, "
            f"not {z_SM.shape[-1]}"
        )
    return mix(w_S, selectors(z_SM, jnp.arange(num_experts), gamma))


def mix(w_S: Float[Array, "*b S"], chosen_SE: Float[Array, "*b S E"]) -> Float[Array, "*b E"]:
    """The selectors' distributions, weighted by a softmax."""
    share_S1 = jax.nn.softmax(w_S.astype(jnp.float32), axis=-1)[..., None]
    # Not a matmul: a weight must be exactly 0 where every selector is.
    return jnp.sum(share_S1 * chosen_SE, axis=-2)


def code_bits(num_experts: int) -> int:
    """Bits that number the experts: ceil(log2 E)."""
    return max(num_experts - 1, 0).bit_length()


def smoothed_entropy(chosen_SE: Float[Array, "*b S E"]) -> Float[Array, "*b S"]:
    """Entropy in nats as published, with ``TINY`` inside the logarithm."""
    return -jnp.sum(chosen_SE * jnp.log(chosen_SE + TINY), axis=-1)
