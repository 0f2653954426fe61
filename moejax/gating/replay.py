"""Replay: the routing of another run or checkpoint, from a file."""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import ConstantState, token_choice_capacity
from moejax.record import routing as recording
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateState,
    GateTraits,
    MoEConfig,
    RouterStats,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Replay(ConstantState):
    r"""Every token visits the experts recorded for its row and position.

    .. math:: y_{rl} = a_{rl} x_{rl} + \sum_k w_{rlk} f_{e_{rlk}}(x_{rl}), \qquad
       (a, e, w) \text{ as in the file, by layer, global row id and position}

    For studies of router drift: the experts of one checkpoint with the routing of another, or a
    run trained with a fixed routing. ``moejax eval --record-routing=FILE`` writes the file, with
    rows of the training data if ``--record-steps`` is given. A run must have the recorded rows.
    Nothing is learned; recorded weights are constants. In a layer of your own, shorter sequences
    take the beginning of each row. Positions are those of the context, so padding before a
    sequence shifts nothing.

    a is 0 except for gates that keep a share of the input (BASE, StableMoE). w is 0 where the
    recorded pair found no room: dropped pairs stay dropped and are counted as dropped. Transport
    ``cells`` may drop further pairs. The balance losses and the router's probabilities are computed
    from the recorded weights, not from the recorded router.

    Visibility: that of the recorded run in evaluation, in both phases, because training rows are
    recorded in evaluation mode too. A routing that was chosen with knowledge of later tokens still
    reveals them.
    """

    path: Annotated[str, "a file written by `moejax eval --record-routing`"] = ""

    trained_by: ClassVar[TrainedBy] = "none"

    def check(self, num_experts: int, train: bool) -> None:
        if not self.path:
            raise ValueError(
                "gate.path='' must name a recorded routing; `moejax eval --record-routing=FILE` "
                "writes one"
            )
        recorded = self._recording().num_experts
        if recorded != num_experts:
            raise ValueError(
                f"gate.path={self.path!r} was recorded with {recorded} experts, but num_experts="
                f"{num_experts}; use num_experts={recorded}"
            )

    def _check_data(self, layers: int, length: int, train_rows: int, eval_rows: int) -> None:
        """Raises ValueError unless the file has these layers, positions and rows."""
        for split, rows, remedy in (
            ("train", train_rows, "record training rows with --record-steps"),
            ("eval", eval_rows, "record with the same train.eval_rows"),
        ):
            shape = getattr(self._recording(), split).expert_MNLK.shape[:3]
            short = shape[1] < rows
            if rows and (short or shape[0] != layers or shape[2] < length):
                raise ValueError(
                    f"gate.path={self.path!r} has {shape[0]} layers x {shape[1]} {split} rows x "
                    f"{shape[2]} positions, but {layers} x {rows} x {length} are needed; "
                    f"{remedy if short else 'record with the same model and train.seq_len'}"
                )

    def _check_rows(self, train: bool, row_N: np.ndarray, digest_N: np.ndarray) -> None:
        """Raises ValueError unless these rows are the recorded ones."""
        split = "train" if train else "eval"
        differ_N = getattr(self._recording(), split).digest_N[row_N] != digest_N
        if np.any(differ_N):
            raise ValueError(
                f"gate.path={self.path!r} was recorded of other data: {split} row "
                f"{row_N[np.argmax(differ_N)]} is not the one it routes; use the data, "
                f"train.seq_len{', train.seed' if train else ''} and train.eval_rows of the "
                "recorded run, or record again"
            )

    def traits(self) -> GateTraits:
        return GateTraits(check_data=self._check_data, check_rows=self._check_rows)

    def columns(self, num_experts: int) -> int:
        return self._recording().eval.expert_MNLK.shape[-1] if self.path else 1

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {}

    def init_state(self, spec: GateSpec) -> GateState:
        """This layer's tables, without those that are 0 everywhere in the file."""
        recording = self._recording()
        states = {}
        for split, routed in (("eval", recording.eval), ("train", recording.train)):
            weight = np.where(routed.kept_MNLK, routed.weight_MNLK, 0.0)
            dropped = np.where(routed.kept_MNLK, 0.0, routed.weight_MNLK) > 0
            tables = {
                "expert_NLK": routed.expert_MNLK.astype(np.int32),
                "weight_NLK": weight.astype(np.float32),
            }
            if dropped.any():
                tables["dropped_NLK"] = dropped.astype(np.int32)
            if routed.identity_MNL is not None and routed.identity_MNL.any():
                tables["identity_NL"] = routed.identity_MNL.astype(np.float32)
            if routed.rows:
                states[split] = {k: jnp.asarray(v)[spec.layer] for k, v in tables.items()}
        return states

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        split = "train" if context.train else "eval"
        if split not in state:
            raise ValueError(
                f"gate.path={self.path!r} has no rows of the training data; record them with "
                "`moejax eval --record-routing=FILE --record-steps=N`"
            )
        if context.packed:
            raise ValueError(
                "gate replay follows the routing of whole rows, which hold several texts here "
                "(context.segment_BL); give each text the row it was recorded in"
            )
        table = state[split]
        rows = context.row_GR.size
        position_BL = context.position_GT.reshape(rows, -1)

        def recorded(table_NL: Array) -> Array:
            """The entry at each token's position; 0, which visits no expert, beyond the record."""
            found_BL = table_NL[context.row_GR.reshape(rows)]
            at_BL = position_BL.reshape(*position_BL.shape, *(1,) * (table_NL.ndim - 2))
            found_BL = jnp.take_along_axis(found_BL, at_BL, axis=1, mode="fill", fill_value=0)
            return found_BL.reshape(*context.valid_GT.shape, *table_NL.shape[2:])

        expert_GTK, weight_GTK = recorded(table["expert_NLK"]), recorded(table["weight_NLK"])
        num_experts = self._recording().num_experts
        hit_GTKE = expert_GTK[..., None] == jnp.arange(num_experts)
        mass_GTE = jnp.sum(jnp.where(hit_GTKE, weight_GTK[..., None], 0.0), axis=2)
        mass_GTE = jnp.where(jnp.any(mass_GTE > 0, axis=-1, keepdims=True), mass_GTE, 1.0)
        probs_GTE = mass_GTE / jnp.sum(mass_GTE, axis=-1, keepdims=True)
        logits_GTE = jnp.log(jnp.maximum(probs_GTE, jnp.finfo(jnp.float32).tiny))
        cut_GTE = identity_GT = None
        if "dropped_NLK" in table:
            dropped_GTK = (recorded(table["dropped_NLK"]) > 0) & context.valid_GT[..., None]
            cut_GTE = jnp.any(hit_GTKE & dropped_GTK[..., None], axis=2)
        if "identity_NL" in table:
            identity_GT = jnp.where(context.valid_GT, recorded(table["identity_NL"]), 0.0)
        return GateOutput(
            ops.masked(expert_GTK, weight_GTK, context.valid_GT),
            RouterStats(logits_GTE, probs_GTE, probs_GTE),
            identity_weight_GT=identity_GT,
            cut_GTE=cut_GTE,
        )

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        k = self.columns(num_experts)
        return token_choice_capacity(num_tokens, num_experts, k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        if not self.path:
            return Visibility()
        future, others = (self._recording().sees(what) for what in recording.SEES)
        return Visibility(future, others, future, others)

    def _recording(self) -> recording.Recording:
        try:
            return recording.load(self.path)
        except ValueError as error:
            raise ValueError(f"gate.path={self.path!r} {error}") from error
