"""A model with its loss: the contract between the trained function and the training loop."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from moejax.dispatch import Dropless
from moejax.losses import policy_gradient
from moejax.types import GateTraits, LayerAux, MoEStats, Tap

Batch = dict[str, Array]
"""On the devices: what ``Source`` calls a batch."""


@runtime_checkable
class Summed(Protocol):
    """A metric that is a pytree of sums and computes its value from them, such as ``Ratio``."""

    def value(self) -> float: ...


class Ratio(NamedTuple):
    """A mean over ``count`` of the items."""

    total: Any
    count: Any

    def value(self) -> float:
        return float(self.total) / float(self.count) if self.count else math.nan


class Totals(NamedTuple):
    """Sums over items (tokens of text, images, examples), and statistics of the layers.

    All add up over micro-batches. ``metrics`` are sums over items: rows have their means under
    these names, or their values where they are ``Summed``. ``auxiliary`` (losses), ``means`` and
    ``mean_square`` are those of ``LayerAux`` times items: dividing by ``items`` gives means over
    the whole batch.
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
    """The units of a run's numbers. ``item``: what losses are means over, in the singular."""

    item: str
    loss: str
    """The unit of the loss, such as "nats/token"."""
    tokens_per_row: int
    """Tokens of a batch's row that an MoE layer gets."""
    items_per_row: int = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its loss, as pure functions of plain pytrees.

    A new task defines ``units``, ``module``, ``apply``, ``forward`` and ``token_losses``. The loss
    of a batch is (sum of losses + output_z_loss * sum of log_z^2) / items, plus the weighted
    auxiliary losses; a loss without a weight counts as it is.
    """

    model: Any
    """The model's options; has ``moe``, ``gate`` and ``num_moe_layers``, like ``StackOptions``."""
    loss_weights: tuple[tuple[str, float], ...]
    output_z_loss: float

    causal: ClassVar[bool] = False
    """True if a prediction must not depend on later tokens."""

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
        tap: Tap | None = None,
    ) -> tuple[Any, LayerAux]:
        """The model's predictions for a batch, and its layers' report.

        ``tap``: see ``models.stack.Stack``.
        """
        raise NotImplementedError

    def forward(
        self, params: PyTree, gate_state: PyTree, batch: Batch, step: Array, key: Array, train: bool
    ) -> Totals:
        """Runs the model on a batch and adds up its losses, metrics and statistics."""
        raise NotImplementedError

    def token_losses(self, predictions: Any, batch: Batch) -> Float[Array, "B L"]:
        """The loss of each token, or of the item that it belongs to: for the probe."""
        raise NotImplementedError

    def countable(self) -> "Task":
        """The same model in the form whose FLOPs are counted.

        Without capacity padding and recomputation, and with attention as visible matrix products.
        """
        moe = dataclasses.replace(self.model.moe, transport=Dropless(), eval_transport=Dropless())
        attention = dataclasses.replace(self.model.attention, implementation="xla")
        model = self.model.with_experts(config=moe)
        model = dataclasses.replace(model, remat="none", attention=attention)
        return dataclasses.replace(self, model=model)

    def init(self, key: Array) -> PyTree:
        """Fresh parameters, a nested dict."""
        return to_tree(nnx.state(self.module(nnx.Rngs(params=key))))

    def init_gate_state(self, token_counts: Any = None) -> PyTree:
        """The states before the first step; some gates read the text's ``token_counts``."""
        return self.abstract_module().init_gate_state(token_counts)

    def update_gate_state(self, gate_state: PyTree, totals: Totals) -> PyTree:
        return self.abstract_module().update_gate_state(gate_state, totals.stats)

    def expert_layers(self, params: PyTree) -> dict[str, Any]:
        """Parameters of the MoE layers, led by the layers: experts, and the gate's in "router"."""
        blocks = params["periods"]["blocks"]
        layers = [blocks[str(place)]["ffn"] for place in self.model.sparse_places]
        if len(layers) == 1:
            return layers[0]
        # Of the layers of one period, the first of every period would come first.
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *layers)

    def objective(self, totals: Totals, items: Array) -> Array:
        """The contribution of these totals to the loss of a batch with ``items`` items."""
        loss = totals.loss + self.output_z_loss * totals.log_z_square
        weights = dict(self.loss_weights)
        for name, value in totals.auxiliary.items():
            loss += weights.get(name, 1.0) * value
        return loss / items

    def hold(self, updates: PyTree, step: Array) -> PyTree:
        """The updates, with zeros for the parameters that the gate freezes at this step.

        Zero gradients would not do: momentum keeps moving a parameter, its sign at full speed.
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

    def built_apart(self, params: PyTree) -> Any:
        """The model whose periods have parameters of their own: see ``Stack.take_apart``."""

        def apart() -> Any:
            module = self.module(nnx.Rngs(0))
            module.take_apart()
            return module

        graph, template = nnx.split(nnx.eval_shape(apart))
        return nnx.merge(graph, from_tree(template, params))

    def abstract_module(self) -> Any:
        """The model with shapes instead of parameters."""
        return nnx.eval_shape(lambda: self.module(nnx.Rngs(0)))

    def totals(
        self,
        aux: LayerAux,
        loss_B: Float[Array, "..."],
        valid_B: Array,
        metrics: dict[str, Any],
        reward_BL: Float[Array, "B L"],
        valid_BL: Array,
        log_z_B: Array | float = 0.0,
    ) -> Totals:
        """Adds up a batch. ``loss_B``, ``valid_B`` and ``metrics`` have one value per item.

        ``reward_BL``: the reward of gates trained by policy for each of the ``valid_BL`` tokens.
        """
        assert aux.mean_square is not None, "every model reports it"
        items = jnp.sum(valid_B, dtype=jnp.int32)
        losses = dict(aux.losses)
        if aux.policy is not None:
            losses |= policy_gradient(aux.policy, reward_BL, valid_BL)

        def add(x_B: Array) -> Array:
            return jnp.sum(jnp.where(valid_B, x_B, jnp.zeros_like(x_B)))

        return Totals(
            items=items,
            loss=add(loss_B),
            log_z_square=add(jnp.square(jnp.broadcast_to(log_z_B, valid_B.shape))),
            metrics=jax.tree.map(add, metrics),
            auxiliary=jax.tree.map(lambda loss: loss * items, losses),
            means=jax.tree.map(lambda mean: mean * items, aux.means),
            mean_square=aux.mean_square * items,
            stats=aux.stats,
        )


def to_tree(state: PyTree) -> dict[str, Any]:
    """A module's ``nnx.State`` as nested dicts of arrays with string keys."""
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = variable[...]
    return tree


def from_tree(template: PyTree, tree: PyTree) -> PyTree:
    """The inverse of ``to_tree``; ``template`` gives the structure."""

    def leaf(path: tuple[Any, ...]) -> Array:
        node = tree
        for part in path:
            node = node[str(part)]
        return node

    return nnx.from_flat_state(
        [(path, variable.replace(leaf(path))) for path, variable in nnx.to_flat_state(template)]
    )
