"""What is trained: the contract between a model with its loss and the training loop."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.config import Config, make_gate, moe_config
from moejax.dispatch import Dropless
from moejax.losses import policy_gradient
from moejax.models.stack import Found, Watch
from moejax.models.trees import from_tree, to_tree
from moejax.types import GateTraits, MoEStats

Batch = dict[str, Array]
"""On the devices: what ``Source`` calls a batch."""


@runtime_checkable
class Summed(Protocol):
    """A metric of its own kind: a pytree of sums that knows its value, such as ``Ratio``."""

    def value(self) -> float: ...


class Ratio(NamedTuple):
    """A mean over fewer than all items: over those that have what it is of."""

    total: Any
    count: Any

    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


class Totals(NamedTuple):
    """Sums over items (tokens of text, images, examples), and statistics of the layers: all add up
    over micro-batches.

    ``metrics`` are sums over items too: rows say their means by these names, or of those that are
    ``Summed`` their values. ``auxiliary`` are the
    layers' mean losses times items, ``mean_square`` the layers' mean squares times items, ``means``
    the layers' other numbers times items: dividing by ``items`` gives means over the whole batch.
    """

    items: Int[Array, ""]
    loss: Float[Array, ""]
    log_z_square: Float[Array, ""]
    metrics: dict[str, Any]
    auxiliary: dict[str, Float[Array, ""]]
    means: dict[str, Float[Array, ""]]
    mean_square: Float[Array, "layers"]
    stats: MoEStats | None


class Units(NamedTuple):
    """What numbers of a run are of. ``item``: what losses are means over, in the singular."""

    item: str
    loss: str
    """Of the loss: "nats/token"."""
    tokens_per_row: int
    """Tokens that an MoE layer sees of a row of a batch."""
    items_per_row: int = 1


class Output(NamedTuple):
    """Of ``Task.apply``: what the model says, as the task knows it, and what its layers found."""

    said: Any
    found: Found


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its loss, as pure functions of plain pytrees.

    A task of its own has ``units``, ``module``, ``apply``, ``forward`` and ``token_losses``. The
    loss of a batch is (sum of losses + output_z_loss * sum of log_z^2) / items, plus the weighted
    auxiliary losses; a loss without a weight counts as it is.
    """

    model: Any
    """Sizes; has ``moe``, ``gate`` and ``num_moe_layers``, such as ``StackConfig``."""
    loss_weights: tuple[tuple[str, float], ...]
    output_z_loss: float

    causal: ClassVar[bool] = False
    """Whether a prediction may not depend on what comes later."""

    @property
    def units(self) -> Units:
        raise NotImplementedError

    def module(self, rngs: nnx.Rngs) -> Any:
        """The model, with parameters drawn from ``rngs``."""
        raise NotImplementedError

    def apply(
        self,
        params: PyTree,
        gate_state: PyTree,
        batch: Batch,
        step: Array,
        key: Array,
        train: bool,
        watch: Watch | None = None,
    ) -> Output:
        """The model on a batch; ``watch``: see ``models.stack.Stack``."""
        raise NotImplementedError

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        """Runs the model on a batch and adds up everything anyone wants to know of it."""
        raise NotImplementedError

    def token_losses(self, said: Any, batch: Batch) -> Float[Array, "B L"]:
        """The loss of each token, or of the item that the token belongs to: for the probe."""
        raise NotImplementedError

    def countable(self) -> "Task":
        """The same computation in the form whose FLOPs count as the model's own.

        No capacity padding, no recomputation, and attention as matrix products that can be seen.
        """
        moe = dataclasses.replace(self.model.moe, transport=Dropless(), eval_transport=Dropless())
        model = dataclasses.replace(self.model, moe=moe, remat="none", attention="xla")
        return dataclasses.replace(self, model=model)

    def init(self, key: Array) -> PyTree:
        """Fresh parameters, a nested dict."""
        return to_tree(nnx.state(self.module(nnx.Rngs(params=key))))

    def init_gate_state(self, token_counts: Any = None) -> PyTree:
        """Before the first step; ``token_counts`` of the training text, for gates that ask."""
        return self.abstract_module().init_gate_state(token_counts)

    def update_gate_state(self, gate_state: PyTree, totals: Totals) -> PyTree:
        return self.abstract_module().update_gate_state(gate_state, totals.stats)

    def expert_layers(self, params: PyTree) -> dict[str, Any]:
        """Parameters of the MoE layers, led by the layers: experts, and the gate's in "router"."""
        return params["periods"]["blocks"][str(self.model.period - 1)]["ffn"]

    def objective(self, totals: Totals, items: Array) -> Array:
        """The share of these totals in the loss of a batch with ``items`` items."""
        loss = totals.loss + self.output_z_loss * totals.log_z_square
        weights = dict(self.loss_weights)
        for name, value in totals.auxiliary.items():
            loss += weights.get(name, 1.0) * value
        return loss / items

    def hold(self, updates: PyTree, step: Array) -> PyTree:
        """The updates, with zeros for what the gate says is frozen at this step.

        No gradient is not enough: momentum goes on, and a sign of it at full speed.
        """
        still = GateTraits.of(self.model.gate).frozen(step) if self.model.num_moe_layers else {}
        if not still:
            return updates

        def held(path: tuple[Any, ...], update: Array) -> Array:
            *nodes, name = (str(getattr(key, "key", key)) for key in path)
            if "router" in nodes and name in still:
                return jnp.where(still[name], jnp.zeros_like(update), update)
            return update

        return jax.tree_util.tree_map_with_path(held, updates)

    def built(self, params: PyTree) -> Any:
        """The model with these parameters."""
        graph, template = nnx.split(self.abstract_module())
        return nnx.merge(graph, from_tree(template, params))

    def abstract_module(self) -> Any:
        """The model with shapes in the place of parameters."""
        return nnx.eval_shape(lambda: self.module(nnx.Rngs(0)))

    def totals(
        self,
        found: Found,
        loss_B: Float[Array, "..."],
        valid_B: Array,
        metrics: dict[str, Any],
        reward_BL: Float[Array, "B L"],
        valid_BL: Array,
        log_z_B: Array | float = 0.0,
    ) -> Totals:
        """Adds up a batch. ``loss_B``, ``valid_B`` and ``metrics``: by item, of any shape.

        ``reward_BL`` is what gates trained by policy get for each of the ``valid_BL`` tokens.
        """
        items = jnp.sum(valid_B, dtype=jnp.int32)
        losses = dict(found.losses)
        if found.policy is not None:
            losses |= policy_gradient(found.policy, reward_BL, valid_BL)

        def add(x_B: Array) -> Array:
            return jnp.sum(jnp.where(valid_B, x_B, jnp.zeros_like(x_B)))

        return Totals(
            items=items,
            loss=add(loss_B),
            log_z_square=add(jnp.square(jnp.broadcast_to(log_z_B, valid_B.shape))),
            metrics=jax.tree.map(add, metrics),
            auxiliary=jax.tree.map(lambda loss: loss * items, losses),
            means=jax.tree.map(lambda mean: mean * items, found.means),
            mean_square=found.mean_square * items,
            stats=found.stats,
        )


def stack_config(config: Config) -> dict[str, Any]:
    """What a config says of a model's layers: the arguments of ``StackConfig`` but for those that
    depend on the task."""
    model, moe = config.model, config.moe
    return {
        "d_model": model.d_model,
        "d_ff": model.d_ff,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim or model.d_model // model.num_heads,
        "activation": model.activation,
        "norm_eps": model.norm_eps,
        "dtype": model.dtype,
        "remat": model.remat,
        "attention": model.attention,
        "mod_capacity": model.mod_capacity,
        "mod_every": model.mod_every,
        "mod_predictor": model.mod_predictor,
        "moa_experts": model.moa_experts,
        "moa_k": model.moa_k,
        "every": moe.every,
        "first_dense": moe.first_dense,
        "moe": moe_config(config),
        "gate": make_gate(config),
        "expert_d_ff": moe.d_ff,
        "expert_activation": moe.activation,
        "shared_experts": moe.shared_experts,
        "shared_gate": moe.shared_gate,
        "residual": moe.residual,
        "balance_scope": moe.balance_scope,
    }


def loss_weights(config: Config) -> tuple[tuple[str, float], ...]:
    """The weights of auxiliary losses, as ``Task`` takes them."""
    return tuple(sorted(config.moe.losses.items()))
