"""Several regressions and binary tasks on the rows of a table, with experts that they share."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from moejax.config import Config, make_gate
from moejax.config.build import gate_message, loss_weights
from moejax.contrib.multitask.files import load_table
from moejax.contrib.multitask.generated import correlated, groups, recommender
from moejax.contrib.multitask.mmoe import check_gate
from moejax.contrib.multitask.model import Head, MultiTask, MultiTaskConfig, head_losses
from moejax.contrib.multitask.source import TableSource
from moejax.contrib.multitask.tables import Table
from moejax.data.source import Source
from moejax.dispatch import AllExperts
from moejax.errors import UserError
from moejax.mesh import AXES, resolve_shape
from moejax.tasks.task import Batch, Ratio, Task, Totals, Units
from moejax.types import Context, LayerAux, MoEConfig, Tap

BINS, WIDEST = 2000, 20.0
"""Number and range of the bins of logits for the area under the ROC curve: 0.02 wide."""


def build(config: Config) -> tuple[Task, Source]:
    """The model and its table.

    Raises:
      UserError: a table that cannot be read or made, or options that exclude each other.
    """
    _check(config)
    table, train = load(config), config.train
    return MultiTaskLearning.from_config(config, table), TableSource(
        table, train.batch_size, train.seed, train.eval_rows
    )


def load(config: Config) -> Table:
    """The table named in the config."""
    task, fraction = config.task, config.data.eval_fraction
    if task.data == "file":
        if not config.data.path:
            raise UserError("data.path: task.data=file needs a .csv, .tsv or .parquet file")
        return load_table(
            config.data.path,
            targets=_names(task.targets),
            categorical=_names(task.categorical),
            numeric=_names(task.numeric),
            split=task.split,
            time=task.time,
            eval_fraction=fraction,
            min_count=task.min_count,
        )
    if config.data.path:
        raise UserError(
            f"data.path={config.data.path!r} is read by task.data=file, and task.data={task.data}"
        )
    if task.data == "correlated":
        return correlated(task.data_seed, task.rows, task.rho, fraction)
    if task.data == "groups":
        return groups(task.data_seed, task.rows, task.tasks, fraction)
    return recommender(
        task.data_seed,
        task.rows,
        fraction,
        users=task.num_users,
        items=task.num_items,
        shared=task.shared,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(config: Config) -> None:
    """Raise UserError for options that are invalid for this task alone."""
    task, moe = config.task, config.moe
    if moe.every > 1:
        raise UserError(f"moe.every={moe.every}: a multi-task model has one mixture; use 1 or 0")
    if (task.sharing == "shared_bottom") != (moe.every == 0):
        raise UserError(
            f"task.sharing={task.sharing} with moe.every={moe.every}: a shared bottom is the model "
            "without a mixture; use task.sharing=shared_bottom and moe.every=0 together, or neither"
        )
    if moe.activation == "swiglu":
        raise UserError("moe.activation=swiglu is not for these experts; use relu or gelu")
    if config.train.grad_accum > 1:
        raise UserError(
            f"train.grad_accum={config.train.grad_accum}: balance losses of examples need the "
            "whole batch at once; use train.grad_accum=1"
        )
    if not moe.every:
        return
    try:
        check_gate(make_gate(config), moe.num_experts, task.gate_input)
    except ValueError as error:
        raise UserError(gate_message(moe.gate.name, error)) from error
    sizes = {axis: config.mesh[axis] for axis in AXES}
    shards = resolve_shape(sizes, jax.device_count() if -1 in sizes.values() else None)["expert"]
    if moe.num_experts % shards:
        raise UserError(
            f"moe.num_experts={moe.num_experts} is not a multiple of mesh.expert={shards}; change "
            "one of them"
        )


class BinnedArea(NamedTuple):
    """The area under the ROC curve, from histograms of the logits of ones and of zeros.

    The probability that a one scores higher than a zero, pairs in the same bin counted half: exact
    up to pairs whose logits are within a bin of 0.02, or both beyond 20.
    """

    ones_Z: Any
    zeros_Z: Any

    def value(self) -> float:
        ones_Z, zeros_Z = (np.asarray(x, np.float64) for x in self)
        pairs = ones_Z.sum() * zeros_Z.sum()
        below_Z = np.cumsum(zeros_Z) - zeros_Z
        return float(ones_Z @ (below_Z + zeros_Z / 2) / pairs) if pairs else float("nan")


def binned_area(logit_B: Array, target_B: Array, counted_B: Array) -> BinnedArea:
    """The histograms of a batch."""
    scaled_B = (logit_B + WIDEST) / (2 * WIDEST) * BINS
    bin_B = jnp.clip(jnp.floor(scaled_B), 0, BINS - 1).astype(jnp.int32)
    hit_BZ = bin_B[:, None] == jnp.arange(BINS)

    def count(which_B: Array) -> Array:
        return jnp.sum(hit_BZ & (which_B & counted_B)[:, None], axis=0, dtype=jnp.int32)

    return BinnedArea(count(target_B > 0.5), count(target_B <= 0.5))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["total", "count"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class MeanSquare:
    """A mean squared error in the target's units, from sums in units of its ``scale``.

    The square of a scale may be beyond float32, so that the units come last and on the host.
    """

    total: Any
    count: Any
    scale: float

    def value(self) -> float:
        return self.scale**2 * Ratio(self.total, self.count).value()


@dataclasses.dataclass(frozen=True)
class MultiTaskLearning(Task):
    """A multi-task model with its loss: the tasks' losses, added up.

    The loss of a regression is its squared error in units of the training targets' variance, so
    that predicting the mean costs 1 in any units; the loss of a binary task is its log loss in
    nats. A missing target adds nothing to the loss of its task.

    The losses of the gates are summed over gates too, so that a weight has the same effect on each
    gate for any number of tasks. Their mean over gates is logged, as for layers: a balance loss is
    1 at perfect balance.
    """

    model: MultiTaskConfig

    @classmethod
    def from_config(cls, config: Config, table: Table) -> "MultiTaskLearning":
        task, moe = config.task, config.moe
        model = MultiTaskConfig(
            heads=tuple(Head(t.name, t.kind, t.mean, t.scale) for t in table.targets),
            num_dense=len(table.dense),
            category_sizes=table.category_sizes,
            d_embed=task.d_embed,
            d_bottom=task.d_bottom,
            d_ff=moe.d_ff,
            d_out=task.d_out,
            d_tower=task.d_tower,
            sharing=task.sharing,
            gate_input=task.gate_input,
            activation=moe.activation,
            dtype=config.model.dtype,
            moe=MoEConfig(moe.num_experts, AllExperts(), AllExperts()),
            gate=make_gate(config),
        )
        return cls(model, loss_weights(config), 0.0)

    @property
    def units(self) -> Units:
        return Units("example", "per example", 1)

    def module(self, rngs: nnx.Rngs) -> MultiTask:
        return MultiTask(self.model, rngs=rngs)

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B M"], LayerAux]:
        context = Context.of(
            len(batch["row"]),
            1,
            valid_BL=batch["valid"][:, None],
            row_B=batch["row"],
            step=step,
            key=jax.random.fold_in(key, step),
        )
        model = self.built(params)
        return model(batch["dense"], batch["category"], context, gate_state, train, tap)

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        value_BM, aux = self.apply(params, gate_state, batch, step, key, train)
        with jax.named_scope("loss"):
            loss_B = self._losses(value_BM, batch)
            metrics = self._metrics(value_BM, batch)
            areas = {} if train else self._areas(value_BM, batch)
        unused = jnp.zeros((len(loss_B), 1))
        totals = self.totals(aux, loss_B, batch["valid"], metrics, unused, batch["valid"][:, None])
        return totals._replace(metrics=totals.metrics | areas)

    def token_losses(self, predictions: Array, batch: Batch) -> Float[Array, "B 1"]:
        return self._losses(predictions, batch)[:, None]

    def objective(self, totals: Totals, items: Array) -> Array:
        gates = self.model.num_moe_layers
        summed = {name: gates * mean for name, mean in totals.auxiliary.items()}
        return super().objective(totals._replace(auxiliary=summed), items)

    def countable(self) -> Task:
        """The task itself: every expert is computed on every example."""
        return self

    def init_gate_state(self, token_counts: Any = None) -> PyTree:
        return self.abstract_module().init_gate_state()

    def expert_layers(self, params: PyTree) -> dict[str, Any]:
        """All gates share the experts."""
        layer, gates = params["mixture"], self.model.num_moe_layers
        experts = {"up_EDF": layer["in_EDF"], "down_EFD": layer["out_EFO"]}
        led = {name: jnp.broadcast_to(w, (gates, *w.shape)) for name, w in experts.items()}
        return {**led, "router": layer["router"]}

    def _losses(self, value_BM: Array, batch: Batch) -> Float[Array, "B"]:
        loss_BM = head_losses(value_BM, batch["target"], self.model.heads)
        return jnp.sum(jnp.where(batch["present"], loss_BM, 0.0), axis=1)

    def _metrics(self, value_BM: Array, batch: Batch) -> dict[str, Any]:
        """Metrics by task, over the examples with its target."""
        loss_BM = head_losses(value_BM, batch["target"], self.model.heads)
        metrics = {}
        for m, head in enumerate(self.model.heads):
            here_B = batch["present"][:, m]
            count_B = here_B.astype(jnp.int32)
            loss_B = jnp.where(here_B, loss_BM[:, m], 0.0)
            if head.kind == "regression":
                metrics[f"mse/{head.name}"] = MeanSquare(loss_B, count_B, head.scale)
                continue
            right_B = (value_BM[:, m] > 0) == (batch["target"][:, m] > 0.5)
            metrics[f"log_loss/{head.name}"] = Ratio(loss_B, count_B)
            metrics[f"accuracy/{head.name}"] = Ratio(
                jnp.where(here_B, right_B.astype(jnp.float32), 0.0), count_B
            )
        return metrics

    def _areas(self, value_BM: Array, batch: Batch) -> dict[str, BinnedArea]:
        counted_BM = batch["present"] & batch["valid"][:, None]
        return {
            f"auc/{head.name}": binned_area(value_BM[:, m], batch["target"][:, m], counted_BM[:, m])
            for m, head in enumerate(self.model.heads)
            if head.kind == "binary"
        }
