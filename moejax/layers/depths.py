"""Mixture-of-Depths: a block that only some tokens of each sequence pass through."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.dispatch import pack
from moejax.gating.ops import router_logits
from moejax.layers.basic import TrainOrEval, fan_in, is_training
from moejax.mesh import group_local
from moejax.options import DepthsOptions
from moejax.types import Context, LayerAux


class Chosen(NamedTuple):
    """The tokens that pass through a routed block, as indices in both directions.

    ``index_BC``: their positions in the sequence, ascending, then positions of other tokens.
    ``valid_BC``: False for those others, which fill up a sequence with fewer than C chosen tokens.
    ``slot_BL``: a token's index among the chosen, C for tokens that are not chosen.
    """

    index_BC: Int[Array, "B C"]
    valid_BC: Bool[Array, "B C"]
    slot_BL: Int[Array, "B L"]

    @property
    def member_BL(self) -> Bool[Array, "B L"]:
        return self.slot_BL < self.index_BC.shape[1]


def choose(
    score_BL: Float[Array, "B L"], valid_BL: Bool[Array, "B L"], options: DepthsOptions
) -> Chosen:
    """The valid tokens of each sequence with the best scores; ties go to the earlier token.

    Their number depends on the number of valid tokens of the sequence.
    """
    length = valid_BL.shape[1]
    count = options.chosen(length)
    # A table, since the product with the capacity would be rounded in float32.
    room_N = jnp.asarray([0, *(options.chosen(n + 1) for n in range(length))], jnp.int32)
    room_B1 = room_N[jnp.sum(valid_BL, axis=1, dtype=jnp.int32)][:, None]
    best_BC = jax.lax.top_k(jnp.where(valid_BL, score_BL, -jnp.inf), count)[1]
    key_BC = jnp.sort(jnp.where(jnp.arange(count) < room_B1, best_BC, best_BC + length), axis=-1)
    index_BC, valid_BC = key_BC % length, key_BC < length
    place_BC = jnp.where(valid_BC, jnp.arange(count), count)

    def slots(index_C: Array, place_C: Array) -> Array:
        return jnp.full(length, count).at[index_C].set(place_C, unique_indices=True)

    return Chosen(index_BC, valid_BC, jax.vmap(slots)(index_BC, place_BC))


def _plan(chosen: Chosen) -> pack.Plan:
    """One row for each place among the chosen, sequence after sequence."""
    (batch, length), count = chosen.slot_BL.shape, chosen.index_BC.shape[1]
    row_B1, member_BL = jnp.arange(batch)[:, None], chosen.member_BL
    token_BC = jnp.where(chosen.valid_BC, row_B1 * length + chosen.index_BC, batch * length)
    place_BL = jnp.where(member_BL, row_B1 * count + chosen.slot_BL, 0)
    return pack.Plan(token_BC.reshape(-1), place_BL.reshape(-1, 1), member_BL.reshape(-1, 1))


def _take(x_BLD: Array, chosen: Chosen) -> Array:
    rows_MD = pack.gather_rows(x_BLD.reshape(-1, x_BLD.shape[-1]), _plan(chosen))
    return rows_MD.reshape(*chosen.index_BC.shape, -1)


def _put_back(x_BCD: Array, chosen: Chosen) -> Array:
    """Zeros for tokens that were not chosen."""
    tokens_tD = pack.sum_rows(x_BCD.reshape(-1, x_BCD.shape[-1]), _plan(chosen))
    return tokens_tD.reshape(*chosen.slot_BL.shape, -1)


class Depths(TrainOrEval):
    r"""Routes tokens through a block f or around it.

    .. math::
       r_t = w \cdot x_t, \qquad
       y_t = \begin{cases} x_t + r_t f(x)_t & t \in S \\ x_t & \text{otherwise} \end{cases}

    f is the change that the block adds to its input (attention and feed-forward), computed among
    the tokens of S only, at their positions in the sequence. In training, S holds the
    ceil(capacity n) tokens with the largest r among the n valid tokens of a sequence. That depends
    on later tokens, so evaluation predicts for each token whether it would be in S:

    * predictor "mlp": sigmoid(MLP(stop_gradient(x))) > 1/2;
    * predictor "router": sigmoid(r) > 1/2,

    each trained by the binary cross-entropy to the membership in S, which in the second case also
    moves w and x. Evaluation is exact, not cheaper: the block runs on all tokens; those outside S
    are masked as attention keys, and are padding to experts.

    Reference: Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro, "Mixture-of-Depths",
    arXiv 2404.02258. Our choices: r starts with variance 1 for tokens of unit mean square, and the
    MLP has one hidden layer (GELU) of d_model / 4 units, at least 8.
    """

    def __init__(self, d_model: int, options: DepthsOptions, *, rngs: nnx.Rngs):
        self.options = options
        params = {"weight_D": fan_in(rngs.params(), (d_model, 1), jnp.float32)[:, 0]}
        if options.predictor == "mlp":
            hidden = max(d_model // 4, 8)
            params |= {
                "hidden_DF": fan_in(rngs.params(), (d_model, hidden), jnp.float32),
                "hidden_bias_F": jnp.zeros(hidden),
                "out_F": fan_in(rngs.params(), (hidden, 1), jnp.float32)[:, 0],
                "out_bias": jnp.zeros(()),
            }
        self.router = nnx.data(jax.tree.map(nnx.Param, params))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context: Context,
        train: bool | None,
        change: Callable[[Array, Context], tuple[Array, LayerAux]],
    ) -> tuple[Array, LayerAux]:
        """The output, and the report of ``change(x, context)``, which is f, with the router's.

        Raises:
          ValueError: packed texts, which would compete with each other in training.
        """
        train = is_training(self, train)
        if train and self.options.capacity < 1 and context.segment_BL is not None:
            raise ValueError(
                f"depths.capacity={self.options.capacity:g} chooses among the tokens of a row, "
                "which holds several texts (context.segment_BL); give each text a row of its own "
                "in training, or use capacity=0"
            )
        with jax.named_scope("router"):
            # Padding may hold anything, and must not reach a gradient.
            score_BL, logit_BL = self._scores(jnp.where(context.valid_BL[..., None], x_BLD, 0))
            chosen = group_local(lambda score, valid: choose(score, valid, self.options))(
                score_BL, context.valid_BL
            )
            chosen = Chosen(*checkpoint_name(tuple(chosen), "routing"))
        through_BL = chosen.member_BL if train else (logit_BL > 0) & context.valid_BL
        if train:
            with jax.named_scope("pack"):
                x_BCD = group_local(_take)(x_BLD, chosen)
            f_BCD, aux = change(x_BCD, _context_of(context, chosen))
            with jax.named_scope("unpack"):
                f_BLD = group_local(_put_back)(f_BCD, chosen)
        else:
            # Tokens outside S are padding between valid tokens.
            through = dataclasses.replace(context, valid_BL=through_BL, padded_behind=False)
            f_BLD, aux = change(x_BLD, through)
            f_BLD = jnp.where(through_BL[..., None], f_BLD, 0)
        y_BLD = x_BLD + (score_BL[..., None] * f_BLD).astype(x_BLD.dtype)
        report = _report(logit_BL, chosen.member_BL, through_BL, context.valid_BL)
        if aux.stats is not None:
            report.means["mod/to_experts"] = report.means["mod/selected"]
        return y_BLD, aux.joined(report)

    def _scores(self, x_BLD: Array) -> tuple[Array, Array]:
        """The router's scores r, and the logits of the prediction."""
        params = self.router
        score_BL = router_logits(x_BLD, params["weight_D"][...][:, None])[..., 0]
        if self.options.predictor == "router":
            return score_BL, score_BL
        hidden_BLF = router_logits(jax.lax.stop_gradient(x_BLD), params["hidden_DF"][...])
        hidden_BLF = jax.nn.gelu(hidden_BLF + params["hidden_bias_F"][...])
        logit_BL1 = router_logits(hidden_BLF, params["out_F"][...][:, None])
        return score_BL, logit_BL1[..., 0] + params["out_bias"][...]


def _context_of(context: Context, chosen: Chosen) -> Context:
    """The context of the chosen tokens."""
    names = ["token_BL", "position_BL"]
    names += ["segment_BL"] if context.segment_BL is not None else []

    names += ["expert_BLMK"] if context.expert_BLMK is not None else []

    def take(chosen: Chosen, *known: Array) -> tuple[Array, ...]:
        def taken(x_BL: Array) -> Array:
            index_BC = chosen.index_BC.reshape(*chosen.index_BC.shape, *(1,) * (x_BL.ndim - 2))
            return jnp.take_along_axis(x_BL, index_BC, axis=1)

        return tuple(map(taken, known))

    taken = group_local(take)(chosen, *(getattr(context, name) for name in names))
    known = dict(zip(names, taken, strict=True))
    return dataclasses.replace(context, **known, valid_BL=chosen.valid_BC, padded_behind=True)


def _report(logit_BL: Array, member_BL: Array, through_BL: Array, valid_BL: Array) -> LayerAux:
    """The predictor's loss; the shares of tokens that went through and of right predictions."""

    def mean(value_BL: Array) -> Array:
        total = jnp.sum(jnp.where(valid_BL, value_BL, 0.0))
        return total / jnp.maximum(jnp.sum(valid_BL, dtype=jnp.float32), 1.0)

    nats_BL = -jax.nn.log_sigmoid(jnp.where(member_BL, logit_BL, -logit_BL))
    right_BL = (logit_BL > 0) == member_BL
    return LayerAux(
        losses={"mod_predictor": mean(nats_BL)},
        means={
            "mod/selected": mean(through_BL.astype(jnp.float32)),
            "mod/agreement": mean(right_BL.astype(jnp.float32)),
        },
    )
