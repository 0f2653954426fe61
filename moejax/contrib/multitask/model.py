"""Multi-task model of tables: shared experts, one gate and one tower per task."""

import dataclasses
import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.contrib.multitask.mmoe import MultiGateMoE
from moejax.experts import activate
from moejax.layers.basic import fan_in
from moejax.mesh import BATCH_AXES, constrain
from moejax.models.stack import mean_square
from moejax.types import Context, Gate, LayerAux, MoEConfig, MoEInfo, MoEStats, Tap

Kind = Literal["regression", "binary"]
SHARINGS: tuple[str, ...] = ("mmoe", "omoe", "shared_bottom")


@dataclasses.dataclass(frozen=True)
class Head:
    """One task: its name and kind; a regression predicts y = mean + scale * (tower's output)."""

    name: str
    kind: Kind = "regression"
    mean: float = 0.0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTaskConfig:
    """Sizes and choices of the model.

    ``num_dense`` numeric features; ``category_sizes`` values of each categorical one, the unknown
    value included, each embedded with ``d_embed`` numbers. ``d_bottom``: width of a shared layer
    before the experts (0: none). ``d_ff`` and ``d_out``: an expert's hidden layer and output.
    ``d_tower``: a tower's hidden layer. ``sharing``: "mmoe" (a gate per task), "omoe" (one gate for
    all) or "shared_bottom" (no gate; one network as wide as all experts together).
    """

    heads: tuple[Head, ...]
    num_dense: int
    category_sizes: tuple[int, ...]
    d_embed: int
    d_bottom: int
    d_ff: int
    d_out: int
    d_tower: int
    sharing: str
    gate_input: str
    activation: str
    dtype: str
    moe: MoEConfig
    gate: Gate

    def __post_init__(self) -> None:
        if self.sharing not in SHARINGS:
            raise ValueError(
                f"sharing={self.sharing!r} is unknown; use one of {', '.join(SHARINGS)}"
            )
        if not self.heads:
            raise ValueError("heads=() leaves nothing to predict; name at least one target")
        if self.num_dense + len(self.category_sizes) == 0:
            raise ValueError("no features to predict from; name numeric or categorical columns")

    @property
    def every(self) -> int:
        """1 with a mixture, 0 without, as in the other models."""
        return int(self.sharing != "shared_bottom")

    @property
    def num_moe_layers(self) -> int:
        """Gates: each is reported like a layer."""
        return {"mmoe": len(self.heads), "omoe": 1, "shared_bottom": 0}[self.sharing]

    @property
    def d_features(self) -> int:
        return self.num_dense + len(self.category_sizes) * self.d_embed


class MultiTask(nnx.Module):
    """``model(dense_BF, category_BC, context, gate_state, train)`` -> values [B, M], ``LayerAux``.

    Values are those of the towers: ``predict`` brings them to the targets' units. Features are
    numeric columns beside embeddings of categorical ones. ``context`` has B sequences of length 1
    (see ``MultiGateMoE``).

    Reference: Ma et al., KDD 2018, doi 10.1145/3219819.3220007.
    """

    def __init__(self, config: MultiTaskConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.category_sizes:
            shape = (sum(config.category_sizes), config.d_embed)
            # Unit variance, like standardised numeric features.
            self.embed_VD = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        width = config.d_features
        if config.d_bottom:
            self.bottom = Layer(width, config.d_bottom, rngs=rngs)
            width = config.d_bottom
        if config.every:
            self.mixture = MultiGateMoE(
                width,
                config.d_ff,
                config.d_out,
                config.moe.num_experts,
                config.num_moe_layers,
                gate=config.gate,
                gate_input=config.gate_input,
                activation=config.activation,
                rngs=rngs,
            )
        else:
            wide = config.moe.num_experts * config.d_ff
            self.shared = nnx.List(
                [Layer(width, wide, rngs=rngs), Layer(wide, config.d_out, rngs=rngs)]
            )
        self.towers = Towers(len(config.heads), config.d_out, config.d_tower, rngs=rngs)

    def __call__(
        self,
        dense_BF: Float[Array, "B F"],
        category_BC: Int[Array, "B C"],
        context: Context,
        gate_state: PyTree,
        train: bool | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B M"], LayerAux]:
        config = self.config
        chex.assert_shape(dense_BF, (None, config.num_dense))
        chex.assert_shape(category_BC, (len(dense_BF), len(config.category_sizes)))
        x_BD = self._features(dense_BF, category_BC)
        # Padding may hold anything: a NaN would survive a loss of weight 0 in the gradient.
        x_BD = constrain(jnp.where(context.valid_BL, x_BD, 0), BATCH_AXES)
        if config.d_bottom:
            x_BD = activate(config.activation, None, self.bottom(x_BD))
        info: MoEInfo | None = None
        taps: dict[str, Array] | None = None
        if config.every:
            y_MBO, info = self.mixture(x_BD, context, gate_state, train)
            if tap:
                # A gate's input is that of a layer whose sequences have one token.
                taps = jax.vmap(functools.partial(tap, x_BD[:, None, :]))(info)
        else:
            hidden_BF = activate(config.activation, None, self.shared[0](x_BD))
            y_MBO = self.shared[1](hidden_BF)[None]
        y_MBO = jnp.broadcast_to(y_MBO, (len(config.heads), *y_MBO.shape[1:]))
        value_MB = self.towers(y_MBO, config.activation).astype(jnp.float32)
        return value_MB.T, _report(y_MBO, value_MB, context, info, taps)

    def init_gate_state(self) -> PyTree:
        """Initial gate states, stacked over gates."""
        return self.mixture.init_gate_state() if self.config.every else ()

    def update_gate_state(self, state: PyTree, stats: MoEStats | None) -> PyTree:
        """Every gate's state after an optimizer step."""
        return state if stats is None else self.mixture.update_gate_state(state, stats)

    def _features(self, dense_BF: Array, category_BC: Array) -> Array:
        sizes = self.config.category_sizes
        parts = [dense_BF]
        if sizes:
            # One table after the other. Whole on every device before the lookup, as in the LM.
            first_C = jnp.cumsum(jnp.asarray((0, *sizes[:-1]), jnp.int32))
            embed_VD = constrain(self.embed_VD[...])
            embed_BCD = jnp.take(embed_VD, category_BC + first_C, axis=0)
            parts.append(embed_BCD.reshape(len(dense_BF), -1))
        return jnp.concatenate(parts, axis=1).astype(jnp.dtype(self.config.dtype))


class Layer(nnx.Module):
    """An affine map."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs):
        self.map_DF = nnx.Param(fan_in(rngs.params(), (width, out), jnp.float32))
        self.shift_F = nnx.Param(jnp.zeros(out, jnp.float32))

    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B F"]:
        return x_BD @ self.map_DF[...].astype(x_BD.dtype) + self.shift_F[...].astype(x_BD.dtype)


class Towers(nnx.Module):
    """One small network per task, stacked: hidden layer, activation, one number."""

    def __init__(self, tasks: int, width: int, hidden: int, *, rngs: nnx.Rngs):
        stacked = nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )
        self.up_MOF = nnx.Param(stacked(rngs.params(), (tasks, width, hidden), jnp.float32))
        self.shift_MF = nnx.Param(jnp.zeros((tasks, hidden), jnp.float32))
        read_MF1 = stacked(rngs.params(), (tasks, hidden, 1), jnp.float32)
        self.read_MF = nnx.Param(read_MF1[..., 0])
        self.bias_M = nnx.Param(jnp.zeros(tasks, jnp.float32))

    def __call__(self, x_MBO: Float[Array, "M B O"], activation: str) -> Float[Array, "M B"]:
        def tower(x_BO: Array, up_OF: Array, shift_F: Array, read_F: Array, bias: Array) -> Array:
            hidden_BF = activate(activation, None, x_BO @ up_OF + shift_F)
            return hidden_BF @ read_F + bias

        weights = (self.up_MOF, self.shift_MF, self.read_MF, self.bias_M)
        return jax.vmap(tower)(x_MBO, *(w[...].astype(x_MBO.dtype) for w in weights))


def _report(
    y_MBO: Array, value_MB: Array, context: Context, info: MoEInfo | None, taps: Any
) -> LayerAux:
    valid_MB = jnp.broadcast_to(context.valid_BL[:, 0], value_MB.shape)
    squares = [mean_square(y_MBO, valid_MB), mean_square(value_MB[..., None], valid_MB)]
    if info is None:
        return LayerAux(mean_square=jnp.stack(squares))
    losses = jax.tree.map(jnp.mean, info.losses)
    return LayerAux(losses, stats=info.stats, taps=taps, mean_square=jnp.stack(squares))


def predict(value_BM: Any, heads: tuple[Head, ...]) -> Float[np.ndarray, "B M"]:
    """Predictions of regressions in the units of their targets, and logits of binary tasks.

    On the host, in float64: float32 has too few digits for a large mean with a small spread.
    """
    mean_M = np.array([head.mean for head in heads])
    return np.asarray(value_BM, np.float64) * np.array([head.scale for head in heads]) + mean_M


def head_losses(
    value_BM: Float[Array, "B M"], target_BM: Float[Array, "B M"], heads: tuple[Head, ...]
) -> Float[Array, "B M"]:
    """Each task's loss: squared error, or log loss in nats.

    Targets of regressions are standardised, (y - mean) / scale: errors are in units of the spread.
    """
    binary_M = jnp.asarray([head.kind == "binary" for head in heads])
    square_BM = jnp.square(value_BM - target_BM)
    # log(1 + e^v) - t v, without overflow.
    log_BM = jax.nn.softplus(value_BM) - target_BM * value_BM
    return jnp.where(binary_M, log_BM, square_BM)
