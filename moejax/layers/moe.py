"""The mixture-of-experts layer: where gate, dispatch, experts and flax meet."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax import gating
from moejax.dispatch import FlatMoEConfig, check_options
from moejax.dispatch.api import dispatch, mix
from moejax.dispatch.reroute import reroute
from moejax.experts import ACTIVATIONS, is_gated
from moejax.gating.ops import group_mean, router_logits, row_noise
from moejax.layers.arguments import (
    check_context,
    check_gate_state,
    check_known,
    check_packed,
    check_rngs,
    check_sizes,
    check_tokens,
    checked_dtype,
    drawn_from,
)
from moejax.layers.basic import FFN, TrainOrEval, is_training, own_promotion
from moejax.layers.routing_stats import layer_info, of_training
from moejax.mesh import constrain, group_local
from moejax.types import (
    SCOPES,
    Context,
    ExpertWeights,
    Gate,
    GateContext,
    GateOutput,
    GateSpec,
    GateState,
    GateTraits,
    MoEOutput,
    MoEStats,
    Priority,
    Routing,
    SlotRules,
    Transport,
)

expert_init = nnx.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
)

PRIORITY_NOISE = 2**31 - 1
"""Keeps the draws of priority "random" apart from a gate's own."""


DEFAULTS = {
    **{
        name: getattr(FlatMoEConfig, name)
        for name in (
            "transport",
            "capacity_factor",
            "eval_transport",
            "eval_capacity_factor",
            "priority",
            "group",
        )
    },
    "num_shared": 0,
    "shared_gate": False,
    "residual": False,
    "balance_scope": "sequence",
}
"""What an argument is that is neither given nor set by the preset that ``gate`` names."""

OF_PRESET = {"num_shared": "shared_experts"}
"""Arguments that ``moejax.gating.preset_overrides`` knows by another name."""


class MoE(TrainOrEval):
    """A sparse feed-forward layer for any Flax NNX model, with or without a mesh.

    ``y, info = layer(x_BLD)``: each token visits the experts its gate picks. Under
    ``jax.set_mesh`` tokens are split over the axes (data, fsdp, expert), experts over ``expert``
    and hidden widths over ``tensor``; results do not depend on the split. ``layer.eval()`` and
    ``layer.train()`` switch it as they switch dropout.

    Args:
      d_model, d_ff: width of the tokens and of one expert's hidden layer.
      num_experts: experts E, a multiple of the mesh's ``expert`` axis.
      gate: the gating function: ``moejax.gating.make(...)``, your own, or a name such as "mixtral".
        A name sets the arguments below as the published model has them
        (``moejax.gating.preset_overrides``), where you do not give them.
      transport: "cells" (fixed capacity), "dropless", "dropless_once" (a token goes once to each
        device that has experts of it), "gather" or "all_experts"; the same five for
        ``eval_transport``, used in evaluation. Or a value, which has its own options:
        ``moejax.dispatch.Cells(capacity_factor=2.0)``. Gates that mix (Soft MoE) use none.
      capacity_factor: slots per expert over the mean number of pairs ("cells" only).
      priority: who stays when an expert is full: "position", "choice", "gate" or "random".
      reroute: how often a pair that finds an expert full tries its token's next-best ("cells").
      group: tokens that share slots: "sequence", a whole number of sequences ("4"), or "batch".
      balance_scope: balance losses per "sequence", "group" or "batch".
      num_shared: experts every token visits, computed as one FFN of width num_shared * d_ff.
      shared_gate: weigh the shared experts' output by sigmoid(x w), one weight per token (Qwen).
      residual: weigh routed and shared experts by the two values of softmax(x W + b) (DeepSpeed's
        residual MoE: Rajbhandari et al., arXiv 2201.05596); without, they are added up.
      num_tasks: tasks that ``Context.task_B`` tells apart, for gates with parameters per task.
        With more than one, statistics count pairs by task.
      entropy_floors: adds LIMoE's entropy losses, with a threshold for each task.
      dtype: of the experts' computation and of the output, float32 or bfloat16; None is that of the
        input. The router computes in float32, on the input as it is given.
      param_dtype: of the experts' parameters, shared ones too. Those of the router are float32.

    Raises:
      ValueError: a choice that cannot work, naming field, value and remedy.
      UserError: a name of a gate that is unknown.
    """

    @own_promotion()
    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        gate: Gate | str,
        transport: Transport | str | None = None,
        capacity_factor: float | None = None,
        eval_transport: Transport | str | None = None,
        eval_capacity_factor: float | None = None,
        priority: Priority | None = None,
        group: str | int | None = None,
        reroute: int = 0,
        activation: str = "swiglu",
        num_shared: int | None = None,
        shared_gate: bool | None = None,
        residual: bool | None = None,
        balance_scope: str | None = None,
        vocab_size: int = 0,
        num_tasks: int = 1,
        entropy_floors: tuple[float, ...] = (),
        layer: int | Array = 0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        given = {name: value for name, value in locals().items() if name in DEFAULTS}
        check_options({**given, "reroute": reroute or None})
        gate, chosen = _with_preset(gate, given)
        check_sizes(1, d_model=d_model, d_ff=d_ff, num_experts=num_experts, num_tasks=num_tasks)
        check_sizes(0, num_shared=chosen["num_shared"], reroute=reroute, vocab_size=vocab_size)
        check_rngs(rngs)
        shared = (
            chosen.pop("num_shared") * d_ff,
            chosen.pop("shared_gate"),
            chosen.pop("residual"),
        )
        self.balance_scope: str = chosen.pop("balance_scope")
        self.config = FlatMoEConfig(num_experts, reroute=reroute, **chosen).resolve()
        for field, value, valid in (
            ("activation", activation, ACTIVATIONS),
            ("balance_scope", self.balance_scope, SCOPES),
        ):
            if value not in valid:
                raise ValueError(f"{field}={value!r} is unknown; use one of {', '.join(valid)}")
        if entropy_floors and len(entropy_floors) != num_tasks:
            raise ValueError(
                f"entropy_floors={entropy_floors} must have one number for each of num_tasks="
                f"{num_tasks} tasks, or none"
            )
        gate.check(num_experts, train=False)
        self.entropy_floors = entropy_floors
        self.gate, self.activation = gate, activation
        self.d_model, self.vocab_size, self.num_tasks = d_model, vocab_size, num_tasks
        self.dtype = None if dtype is None else checked_dtype("dtype", dtype)
        self.param_dtype = checked_dtype("param_dtype", param_dtype)
        params = gate.init(rngs.params(), self._spec(layer))
        self.router = nnx.data(jax.tree.map(nnx.Param, params))
        wide, narrow = (num_experts, d_model, d_ff), (num_experts, d_ff, d_model)
        if is_gated(activation):
            self.gate_EDF = nnx.Param(expert_init(rngs.params(), wide, self.param_dtype))
        self.up_EDF = nnx.Param(expert_init(rngs.params(), wide, self.param_dtype))
        self.down_EFD = nnx.Param(expert_init(rngs.params(), narrow, self.param_dtype))
        self._build_shared(d_model, *shared, rngs)

    @own_promotion()
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        context: Context | None = None,
        gate_state: GateState | None = None,
        train: bool | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> MoEOutput:
        """Routes, computes and adds up; ``info`` has losses, statistics and the routing used.

        The output holds no residual: add it to ``x_BLD`` yourself. ``gate_state`` defaults to the
        initial state; it is read, never written (see ``update_gate_state``). ``train`` defaults to
        what ``layer.train()`` or ``layer.eval()`` said last, and to training. ``rngs``: where gates
        that draw get their key from (stream "gate", or "default"), if the context has none.

        Raises:
          ValueError: an argument whose shape, type or structure does not fit, in one line.
        """
        train = is_training(self, train)
        check_tokens(x_BLD, self.d_model)
        if not x_BLD.size:
            return self._of_nothing(x_BLD, context, gate_state, train)
        self.gate.check(self.config.num_experts, train)
        batch, length, _ = x_BLD.shape
        if context is None:
            context = Context.of(batch, length, padded_behind=True)
        check_context(context, batch, length)
        check_packed(context, self.gate)
        check_known(context, self.gate)
        context = drawn_from(rngs, context)
        # Padding may hold anything. A NaN would survive the weight 0 in the losses and backwards.
        x_BLD = jnp.where(context.valid_BL[..., None], x_BLD, 0)
        state = self._checked_state(gate_state)
        rows = self.config.rows_per_group(batch)
        if batch % rows:
            raise ValueError(
                f"group={self.config.group!r}: {batch} sequences are not a multiple of {rows}"
            )
        gate_context = context.grouped(rows, train)
        x_GTD = x_BLD.reshape(batch // rows, rows * length, -1)
        with jax.named_scope("router"):
            output = self.gate(self._gate_params(), state, x_GTD, gate_context)
        if self.dtype is not None:
            x_BLD, x_GTD = x_BLD.astype(self.dtype), x_GTD.astype(self.dtype)
        if output.mixing is None:
            y_GTD, kept_GTK, sent = self._dispatch(x_BLD, x_GTD, output, gate_context)
        else:
            y_GTD = mix(x_GTD, output.mixing, self.expert_weights(), self.activation)
            kept_GTK, sent = output.routing.weight_GTK > 0, output
        if output.identity_weight_GT is not None:
            y_GTD += (output.identity_weight_GT[..., None] * x_GTD).astype(y_GTD.dtype)
        y_BLD = y_GTD.reshape(x_BLD.shape)
        if self.shared is not None:
            with jax.named_scope("ffn"):
                y_BLD = self._with_shared(x_BLD, y_BLD)
        with jax.named_scope("router"):
            # Losses and counts are of what the gate chose: rerouting must not hide an imbalance.
            chosen = dataclasses.replace(sent, routing=output.routing)
            info = layer_info(
                chosen, kept_GTK, context, self.balance_scope, self.num_tasks, self.entropy_floors
            )
            stats = dataclasses.replace(info.stats, train=train)
            info = info._replace(routing=sent.routing, stats=stats)
        return MoEOutput(constrain(y_BLD, ("data", "fsdp", "expert")), info)

    def _of_nothing(
        self, x_BLD: Array, context: Context | None, gate_state: GateState | None, train: bool
    ) -> MoEOutput:
        """An empty batch: its empty output, and what the layer says of a group of padding."""
        batch, length, width = x_BLD.shape
        shape = (max(batch, self.config.rows_per_group(1)), max(length, 1))
        known = {} if context is None else {"key": context.key, "step": context.step}
        ids_BL = jnp.zeros(shape, jnp.int32)
        padding = Context.of(*shape, token_BL=ids_BL, valid_BL=jnp.zeros(shape, bool), **known)
        y_BLD, info = self(jnp.zeros((*shape, width), x_BLD.dtype), padding, gate_state, train)
        return MoEOutput(y_BLD[:batch, :length], info)

    def _build_shared(
        self, d_model: int, d_ff: int, shared_gate: bool, residual: bool, rngs: nnx.Rngs
    ) -> None:
        """The shared experts, one FFN of width ``d_ff`` (0: none), and what weighs them."""
        dtype = self.param_dtype
        self.shared = FFN(d_model, d_ff, self.activation, dtype, rngs=rngs) if d_ff else None
        if shared_gate and not d_ff:
            raise ValueError("shared_gate=True weighs shared experts; set num_shared, or False")
        self.shared_gate = shared_gate
        if shared_gate:
            self.shared_gate_D = nnx.Param(nnx.initializers.zeros(rngs.params(), (d_model,)))
        if residual and (shared_gate or not d_ff):
            raise ValueError(
                "residual=True weighs routed against shared experts: it needs num_shared > 0 and "
                "shared_gate=False"
            )
        self.residual = residual
        if residual:  # as torch.nn.Linear(d_model, 2) starts in DeepSpeed
            limits = {"minval": -(d_model**-0.5), "maxval": d_model**-0.5}
            drawn = jax.random.uniform(rngs.params(), (d_model + 1, 2), jnp.float32, **limits)
            self.residual_DN = nnx.Param(drawn[:-1])
            self.residual_bias_N = nnx.Param(drawn[-1])

    @own_promotion()
    def init_gate_state(
        self, layer: int | Array = 0, token_counts: Callable[[], np.ndarray] | None = None
    ) -> GateState:
        """The gate's state before the first step; some hash gates need the tokens' counts [V]."""
        spec = dataclasses.replace(self._spec(layer), token_counts=token_counts)
        return self.gate.init_state(spec)

    @own_promotion()
    def update_gate_state(self, state: GateState, stats: MoEStats) -> GateState:
        """The state after an optimizer step that saw ``stats`` (summed over micro-batches).

        Raises ValueError if they are an evaluation's."""
        return self.gate.update(state, of_training(stats))

    def _checked_state(self, given: GateState | None) -> GateState:
        """The state as given, or that before the first step."""
        if given is None:
            return self.init_gate_state()
        # The state of a recorded routing is as large as its file: it is not made once more.
        if GateTraits.of(self.gate).check_rows is None:
            counts = functools.partial(np.zeros, self.vocab_size, np.int64)
            wanted = jax.eval_shape(lambda: self.init_gate_state(token_counts=counts))
            check_gate_state(given, wanted, type(self.gate).__name__)
        return given

    def expert_weights(self) -> ExpertWeights:
        """The experts' stacked weights."""
        gate_EDF = self.gate_EDF[...] if is_gated(self.activation) else None
        return ExpertWeights(gate_EDF, self.up_EDF[...], self.down_EFD[...])

    def _spec(self, layer: int | Array) -> GateSpec:
        num_experts = self.config.num_experts
        return GateSpec(self.d_model, num_experts, self.vocab_size, layer, self.num_tasks)

    def _gate_params(self) -> Any:
        return jax.tree.map(
            lambda p: p[...], self.router, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )

    def _with_shared(self, x_BLD: Array, routed_BLD: Array) -> Array:
        if not self.residual:
            return routed_BLD + self._shared_output(x_BLD)
        logits_BLN = router_logits(x_BLD, self.residual_DN[...]) + self.residual_bias_N[...]
        routed, shared = jnp.split(jax.nn.softmax(logits_BLN, axis=-1), 2, axis=-1)
        y_BLD = routed * routed_BLD + shared * self._shared_output(x_BLD)
        return y_BLD.astype(routed_BLD.dtype)

    def _shared_output(self, x_BLD: Array) -> Array:
        assert self.shared is not None
        y_BLD = self.shared(x_BLD)
        if not self.shared_gate:
            return y_BLD
        score_BL1 = router_logits(x_BLD, self.shared_gate_D[..., None])
        return (jax.nn.sigmoid(score_BL1) * y_BLD).astype(y_BLD.dtype)

    def _dispatch(
        self, x_BLD: Array, x_GTD: Array, output: GateOutput, context: GateContext
    ) -> tuple[Array, Array, GateOutput]:
        """Output, pairs that found room, and the gate's output with the routing that was sent."""
        config = self.config
        transport = config.transport if context.train else config.eval_transport
        rules, capacity = transport.slot_rules, 0
        score_GT = priority_score(output.routing, context, rules)
        tokens, columns = x_GTD.shape[1], output.routing.expert_GTK.shape[-1]
        if rules is not None:
            factor = rules.capacity_factor
            capacity = self.gate.capacity(tokens, config.num_experts, factor)
            if rules.reroute:
                output = _rerouted(output, score_GT, capacity, rules, context.valid_GT)
        routing = output.routing
        if rules is None:
            # Without capacity groups mean nothing: sequences spread over the mesh more finely.
            shape = x_BLD.shape[:2]
            x_GTD, score_GT = x_BLD, score_GT.reshape(shape)
            routing = jax.tree.map(lambda a: a.reshape(*shape, columns), routing)
        y, kept = dispatch(
            x_GTD,
            routing,
            score_GT,
            self.expert_weights(),
            transport=transport,
            activation=self.activation,
            capacity=capacity,
        )
        y_GTD = y.reshape(-1, tokens, x_BLD.shape[-1])
        return y_GTD, kept.reshape(-1, tokens, columns), output


def _rerouted(
    output: GateOutput, score_GT: Array, capacity: int, rules: SlotRules, valid_GT: Array
) -> GateOutput:
    before = output.routing
    move = functools.partial(
        reroute, capacity=capacity, priority=rules.priority, rounds=rules.reroute
    )
    after = Routing(
        *group_local(move)(before.expert_GTK, before.weight_GTK, output.stats.probs_GTE, score_GT)
    )
    moved_GT = jnp.sum(after.expert_GTK != before.expert_GTK, axis=-1).astype(jnp.float32)
    means = {**output.means, "rerouted": group_mean(moved_GT, valid_GT)}
    return dataclasses.replace(output, routing=after, means=means)


def priority_score(routing: Routing, context: GateContext, rules: SlotRules | None) -> Array:
    """Higher is served earlier; used with slots and priorities "gate" and "random" only."""
    if rules is not None and rules.draws_score:
        return row_noise(jax.random.uniform, context, (), tag=PRIORITY_NOISE)
    return jax.lax.stop_gradient(jnp.max(routing.weight_GTK, axis=-1))


def _with_preset(gate: Gate | str, given: dict[str, Any]) -> tuple[Gate, dict[str, Any]]:
    """The gate, and each argument as given, else as the preset has it, else at its default."""
    preset: dict[str, Any] = {}
    if isinstance(gate, str):
        preset, gate = gating.preset_overrides(gate), gating.make(gate)
    elif not isinstance(gate, Gate) or isinstance(gate, type):
        raise ValueError(
            f"gate={gate!r} is neither the name of a gate, such as 'mixtral', nor a gate, such as "
            "moejax.gating.make('mixtral', k=4)"
        )

    def choose(name: str, default: Any) -> Any:
        return (
            preset.get(OF_PRESET.get(name, name), default) if given[name] is None else given[name]
        )

    chosen = {name: choose(name, default) for name, default in DEFAULTS.items()}
    return gate, {**chosen, "group": str(chosen["group"])}
