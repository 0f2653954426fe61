"""The multi-gate mixture of experts: experts shared by all tasks, one gate per task."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.contrib.multitask.dispatch import SharedExperts, multi_gate
from moejax.dispatch import Dropless
from moejax.experts import ACTIVATIONS, is_gated
from moejax.gating.dselect_k import DSelectK
from moejax.layers.arguments import check_context, check_gate_state, check_tokens, drawn_from
from moejax.layers.basic import TrainOrEval, is_training, own_promotion
from moejax.layers.moe import expert_init
from moejax.layers.routing_stats import (
    collect_stats,
    of_evaluation,
    of_training,
    router_losses,
    sum_over_groups,
    with_cuts,
)
from moejax.mesh import constrain
from moejax.types import (
    Context,
    Gate,
    GateOutput,
    GateSpec,
    GateState,
    GateTraits,
    MoEConfig,
    MoEInfo,
    MoEOutput,
    MoEStats,
    Routing,
)

GATE_INPUTS: tuple[str, ...] = ("example", "constant")


class MultiGateMoE(TrainOrEval):
    r"""Experts f_e shared by M gates; each gate mixes them for one task.

    .. math:: y_m(x) = \sum_e g_{m,e}(x) \, f_e(x), \qquad m = 1 \dots M

    ``y_MBO, info = layer(x_BD)``. A gate sees examples as sequences of length 1. Any gate can be
    used that routes an example by this example alone; the parameters of all gates are stacked, and
    the gate is called once, vmapped over tasks. Every expert is computed on every example, as in
    the papers, so that a sparse gate saves no time in training.

    All arrays in ``info`` (a ``MoEInfo``) lead with the gates, including losses: a gate is reported
    like a separate layer. Balance losses are computed on the whole batch. There is no capacity;
    pairs are dropped only where the gate itself cuts (``max_active``).

    Args:
      d_model, d_ff, d_out: widths of input, of an expert's hidden layer and of its output.
      num_experts: experts E, a multiple of the mesh's ``expert`` axis.
      num_gates: M; 1 for one gate that all tasks share (OMoE).
      gate: the gating function; every task has its own parameters, state and noise.
      gate_input: "example": the gate sees x. "constant": it sees the number 1, so its choice is
        the same for all examples (static gating) and a router has one free logit per expert.
        DSelect-k needs ``per_example=False`` then, which makes its codes such free numbers.
      activation: activation of the experts, "relu" or "gelu".

    Raises:
      ValueError: a choice that cannot work, naming field, value and remedy.

    References: Ma, Zhao, Yi, Chen, Hong, Chi, "Modeling Task Relationships in Multi-task Learning
    with Multi-gate Mixture-of-Experts", KDD 2018, doi 10.1145/3219819.3220007 (softmax gates);
    Hazimeh et al., "DSelect-k", arXiv 2106.03760 (sparse gates, static gating). Deviation: experts
    have an output layer, so that ``d_out`` does not depend on ``d_ff``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        d_out: int,
        num_experts: int,
        num_gates: int,
        *,
        gate: Gate,
        gate_input: str = "example",
        activation: str = "relu",
        rngs: nnx.Rngs,
    ):
        check_gate(gate, num_experts, gate_input)
        if activation not in ACTIVATIONS or is_gated(activation):
            raise ValueError(f"activation={activation!r} is no plain activation; use relu or gelu")
        self.gate, self.gate_input, self.activation = gate, gate_input, activation
        self.d_model, self.num_experts, self.num_gates = d_model, num_experts, num_gates
        keys = jax.random.split(rngs.params(), num_gates)
        params = jax.vmap(lambda key, task: gate.init(key, self._spec(task)))(
            keys, jnp.arange(num_gates)
        )
        self.router = nnx.data(jax.tree.map(nnx.Param, params))
        wide, narrow = (num_experts, d_model, d_ff), (num_experts, d_ff, d_out)
        self.in_EDF = nnx.Param(expert_init(rngs.params(), wide, jnp.float32))
        self.shift_EF = nnx.Param(jnp.zeros((num_experts, d_ff), jnp.float32))
        self.out_EFO = nnx.Param(expert_init(rngs.params(), narrow, jnp.float32))
        self.shift_EO = nnx.Param(jnp.zeros((num_experts, d_out), jnp.float32))

    @own_promotion()
    def __call__(
        self,
        x_BD: Float[Array, "B D"],
        context: Context | None = None,
        gate_state: GateState | None = None,
        train: bool | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> MoEOutput:
        """All gates' mixtures of all experts, y [M, B, O]. ``context``: B sequences of length 1.

        ``train`` and ``rngs``: see ``MoE``.
        """
        train = is_training(self, train)
        check_tokens(x_BD, self.d_model, "B")
        self.gate.check(self.num_experts, train)
        context = Context.of(len(x_BD), 1) if context is None else context
        check_context(context, len(x_BD), 1)
        context = drawn_from(rngs, context)
        # Padding may hold anything: a NaN would survive a weight of 0 in losses and gradients.
        x_BD = jnp.where(context.valid_BL, x_BD, 0)
        seen_BLD = x_BD[:, None, :]
        if self.gate_input == "constant":
            seen_BLD = jnp.ones((len(x_BD), 1, 1), jnp.float32)
        state = self.init_gate_state()
        if gate_state is not None:
            check_gate_state(gate_state, state, type(self.gate).__name__)
            state = gate_state

        def one_gate(params: Any, state: GateState, index: Array) -> tuple[Array, MoEInfo]:
            own = context
            if context.key is not None:
                own = dataclasses.replace(context, key=jax.random.fold_in(context.key, index))
            output = self.gate(params, state, seen_BLD, own.grouped(1, train))
            return dense_weights(output.routing, self.num_experts)[:, 0], _info(output, context)

        with jax.named_scope("router"):
            gates = jnp.arange(self.num_gates)
            weight_MBE, info = jax.vmap(one_gate)(self._gate_params(), state, gates)
        y_BMO = multi_gate(x_BD, jnp.moveaxis(weight_MBE, 0, 1), self.experts(), self.activation)
        info = info if train else info._replace(stats=of_evaluation(info.stats))
        y_MBO = constrain(jnp.moveaxis(y_BMO, 1, 0), None, ("data", "fsdp", "expert"))
        return MoEOutput(y_MBO, info)

    def init_gate_state(self) -> GateState:
        """All gates' states before the first step, stacked."""
        gates = jnp.arange(self.num_gates)
        return jax.vmap(lambda task: self.gate.init_state(self._spec(task)))(gates)

    def update_gate_state(self, state: GateState, stats: MoEStats) -> GateState:
        """The states after an optimizer step with ``stats`` (summed over micro-batches).

        Raises:
          ValueError: the statistics of an evaluation, which moves no gate's state.
        """
        of_training(stats)
        if not jax.tree.leaves(state):
            return state
        return jax.vmap(self.gate.update)(state, stats)

    def experts(self) -> SharedExperts:
        """The experts' stacked weights."""
        arrays = (self.in_EDF, self.shift_EF, self.out_EFO, self.shift_EO)
        return SharedExperts(*(array[...] for array in arrays))

    def _spec(self, task: int | Array) -> GateSpec:
        width = 1 if self.gate_input == "constant" else self.d_model
        return GateSpec(width, self.num_experts, layer=task)

    def _gate_params(self) -> Any:
        return jax.tree.map(
            lambda p: p[...], self.router, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )


def check_gate(gate: Gate, num_experts: int, gate_input: str) -> None:
    """Raises ValueError unless the gate can route single examples, alone."""
    if gate_input not in GATE_INPUTS:
        raise ValueError(
            f"gate_input={gate_input!r} is unknown; use one of {', '.join(GATE_INPUTS)}"
        )
    gate.check(num_experts, train=False)
    if gate_input == "constant" and isinstance(gate, DSelectK) and gate.per_example:
        # z = a + b * 1: two parameters with one gradient, which Adam moves twice as far.
        raise ValueError(
            "gate.per_example=True with gate_input=constant makes two parameters of every number "
            "of the code; use per_example=False"
        )
    visibility = gate.visibility(MoEConfig(num_experts, Dropless(), Dropless()))
    name, traits, reason = type(gate).__name__, GateTraits.of(gate), ""
    if traits.mixes:
        reason = f"mixes {traits.mixes}"
    elif traits.reads or traits.check_data is not None:
        reason = "reads tokens or sequences"
    elif gate.trained_by == "policy":
        reason = "is trained by a policy gradient"
    elif any(visibility):
        reason = "routes an example by others"
    if reason:
        raise ValueError(
            f"{name} {reason}, which examples of tables do not allow; use a gate that looks "
            "at one example, such as dense, top_k or dselect_k"
        )


def dense_weights(routing: Routing, num_experts: int) -> Float[Array, "G T E"]:
    """The weight of each expert in a routing, 0 for experts that the token does not visit."""
    hit_GTKE = routing.expert_GTK[..., None] == jnp.arange(num_experts)
    # The select keeps inactive columns inactive in the backward pass too.
    weight_GTK = jnp.where(routing.weight_GTK > 0, routing.weight_GTK, 0.0)
    return jnp.sum(jnp.where(hit_GTKE, weight_GTK[..., None], 0.0), axis=2)


def _info(output: GateOutput, context: Context) -> MoEInfo:
    """The report of one gate. Its groups are examples; its losses are those of the whole batch."""
    kept_GTK = output.routing.weight_GTK > 0
    stats = collect_stats(output.routing, output.stats.probs_GTE, kept_GTK, context.valid_BL)
    if output.cut_GTE is not None:
        stats = with_cuts(stats, output.cut_GTE)
    given = (output.routing, output.stats)
    routing, router = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), given)
    losses = router_losses(routing, router, context.valid_BL.reshape(1, -1))
    return MoEInfo(
        losses={**losses, **output.losses},
        stats=dataclasses.replace(stats, gate=sum_over_groups(output.means, context.valid_BL)),
        routing=output.routing,
        kept_GTK=kept_GTK,
        router=output.stats,
    )
