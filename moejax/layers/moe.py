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
from moejax.dispatch import check_options
from moejax.dispatch.api import dispatch, mix
from moejax.dispatch.reroute import reroute
from moejax.experts import is_gated
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
    given_experts,
)
from moejax.layers.basic import FFN, TrainOrEval, is_training, own_promotion
from moejax.layers.routing_stats import layer_info, of_training
from moejax.mesh import constrain, group_local
from moejax.options import (
    DispatchOptions,
    FFNOptions,
    MoEOptions,
    Options,
    option_fields,
    renamed,
)
from moejax.types import (
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


class MoELayer(TrainOrEval):
    """A mixture-of-experts layer from its options; ``MoE`` is the same from keyword arguments.

    ``layer``: the layer's number in its model, which some gates initialise by.

    Raises:
      ValueError: options that do not fit each other or the gate, naming field, value and remedy.
    """

    def __init__(
        self, d_model: int, options: MoEOptions, layer: int | Array = 0, *, rngs: nnx.Rngs
    ):
        options.check()
        options.gate.check(options.config.num_experts, train=False)
        self.options, self.gate, self.config = options, options.gate, options.config
        self.d_model = d_model
        params = self.gate.init(rngs.params(), self._spec(layer))
        self.router = nnx.data(jax.tree.map(nnx.Param, params))
        experts, d_ff, dtype = self.config.num_experts, options.d_ff, jnp.dtype(options.param_dtype)
        wide, narrow = (experts, d_model, d_ff), (experts, d_ff, d_model)
        if is_gated(options.activation):
            self.gate_EDF = nnx.Param(expert_init(rngs.params(), wide, dtype))
        self.up_EDF = nnx.Param(expert_init(rngs.params(), wide, dtype))
        self.down_EFD = nnx.Param(expert_init(rngs.params(), narrow, dtype))
        if options.expert_bias:
            if is_gated(options.activation):
                self.gate_bias_EF = nnx.Param(jnp.zeros((experts, d_ff), dtype))
            self.up_bias_EF = nnx.Param(jnp.zeros((experts, d_ff), dtype))
            self.down_bias_ED = nnx.Param(jnp.zeros((experts, d_model), dtype))
        sizes = FFNOptions(
            d_ff=options.shared_d_ff or max(options.shared_experts, 1) * d_ff,
            activation=options.activation,
        )
        self.shared = FFN(d_model, sizes, dtype, rngs=rngs) if options.shared_experts else None
        if options.shared_gate:
            self.shared_gate_D = nnx.Param(nnx.initializers.zeros(rngs.params(), (d_model,)))
        if options.residual:  # as torch.nn.Linear(d_model, 2) starts in DeepSpeed
            limits = {"minval": -(d_model**-0.5), "maxval": d_model**-0.5}
            drawn = jax.random.uniform(rngs.params(), (d_model + 1, 2), jnp.float32, **limits)
            self.residual_DN = nnx.Param(drawn[:-1])
            self.residual_bias_N = nnx.Param(drawn[-1])

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
        """Routes the tokens to their experts and adds up the outputs.

        ``info`` has the losses, the statistics and the routing. The output holds no residual: add
        it to ``x_BLD`` yourself. ``gate_state`` defaults to the initial state; it is read, never
        written (see ``update_gate_state``). ``train`` defaults to the last ``layer.train()`` or
        ``layer.eval()``, and to training. ``rngs``: the source of the key for gates that draw
        noise (stream "gate", or "default"), if the context has none.

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
        if context.expert_BLMK is not None:
            expert_BLK = given_experts(context, self.gate, self.config.num_experts)
            expert_GTK = expert_BLK.reshape(batch // rows, rows * length, -1)
            gate_context = dataclasses.replace(gate_context, expert_GTK=expert_GTK)
        x_GTD = x_BLD.reshape(batch // rows, rows * length, -1)
        with jax.named_scope("router"):
            output = self.gate(self._gate_params(), state, x_GTD, gate_context)
        if (dtype := self.options.dtype) is not None:
            x_BLD, x_GTD = x_BLD.astype(dtype), x_GTD.astype(dtype)
        if output.mixing is None:
            y_GTD, kept_GTK, routing, moved = self._dispatch(x_BLD, x_GTD, output, gate_context)
        else:
            y_GTD = mix(x_GTD, output.mixing, self.expert_weights(), self.options.activation)
            kept_GTK, routing, moved = output.routing.weight_GTK > 0, output.routing, {}
        if output.identity_weight_GT is not None:
            y_GTD += (output.identity_weight_GT[..., None] * x_GTD).astype(y_GTD.dtype)
        y_BLD = y_GTD.reshape(x_BLD.shape)
        if self.shared is not None:
            with jax.named_scope("ffn"):
                y_BLD = self._with_shared(x_BLD, y_BLD)
        with jax.named_scope("router"):
            info = layer_info(output, routing, kept_GTK, context, self.options, train, moved)
        return MoEOutput(constrain(y_BLD, ("data", "fsdp", "expert")), info)

    def _of_nothing(
        self, x_BLD: Array, context: Context | None, gate_state: GateState | None, train: bool
    ) -> MoEOutput:
        """The empty output of an empty batch, with the info of a group of padding."""
        batch, length, width = x_BLD.shape
        shape = (max(batch, self.config.rows_per_group(1)), max(length, 1))
        known = {} if context is None else {"key": context.key, "step": context.step}
        ids_BL = jnp.zeros(shape, jnp.int32)
        padding = Context.of(*shape, token_BL=ids_BL, valid_BL=jnp.zeros(shape, bool), **known)
        y_BLD, info = self(jnp.zeros((*shape, width), x_BLD.dtype), padding, gate_state, train)
        return MoEOutput(y_BLD[:batch, :length], info)

    @own_promotion()
    def init_gate_state(
        self, layer: int | Array = 0, token_counts: Callable[[], np.ndarray] | None = None
    ) -> GateState:
        """The gate's state before the first step; some hash gates need the tokens' counts [V]."""
        spec = dataclasses.replace(self._spec(layer), token_counts=token_counts)
        return self.gate.init_state(spec)

    @own_promotion()
    def update_gate_state(self, state: GateState, stats: MoEStats) -> GateState:
        """The state after an optimizer step with ``stats`` (summed over micro-batches).

        Raises:
          ValueError: the statistics of an evaluation, which moves no gate's state.
        """
        return self.gate.update(state, of_training(stats))

    def _checked_state(self, given: GateState | None) -> GateState:
        """The given state, or the initial one."""
        if given is None:
            return self.init_gate_state()
        # The state of a recorded routing is as large as its file: it is not made a second time.
        if GateTraits.of(self.gate).check_rows is None:
            counts = functools.partial(np.zeros, self.options.vocab_size, np.int64)
            wanted = jax.eval_shape(lambda: self.init_gate_state(token_counts=counts))
            check_gate_state(given, wanted, type(self.gate).__name__)
        return given

    def expert_weights(self) -> ExpertWeights:
        """The experts' stacked weights."""
        gated, bias = is_gated(self.options.activation), self.options.expert_bias
        return ExpertWeights(
            self.gate_EDF[...] if gated else None,
            self.up_EDF[...],
            self.down_EFD[...],
            self.gate_bias_EF[...] if gated and bias else None,
            self.up_bias_EF[...] if bias else None,
        )

    def _spec(self, layer: int | Array) -> GateSpec:
        options = self.options
        return GateSpec(
            self.d_model, self.config.num_experts, options.vocab_size, layer, options.num_tasks
        )

    def _gate_params(self) -> Any:
        return jax.tree.map(
            lambda p: p[...], self.router, is_leaf=lambda p: isinstance(p, nnx.Variable)
        )

    def _with_shared(self, x_BLD: Array, routed_BLD: Array) -> Array:
        if not self.options.residual:
            return routed_BLD + self._shared_output(x_BLD)
        logits_BLN = router_logits(x_BLD, self.residual_DN[...]) + self.residual_bias_N[...]
        routed, shared = jnp.split(jax.nn.softmax(logits_BLN, axis=-1), 2, axis=-1)
        y_BLD = routed * routed_BLD + shared * self._shared_output(x_BLD)
        return y_BLD.astype(routed_BLD.dtype)

    def _shared_output(self, x_BLD: Array) -> Array:
        assert self.shared is not None
        y_BLD = self.shared(x_BLD)
        if not self.options.shared_gate:
            return y_BLD
        score_BL1 = router_logits(x_BLD, self.shared_gate_D[..., None])
        return (jax.nn.sigmoid(score_BL1) * y_BLD).astype(y_BLD.dtype)

    def _dispatch(
        self, x_BLD: Array, x_GTD: Array, output: GateOutput, context: GateContext
    ) -> tuple[Array, Array, Routing, dict[str, Array]]:
        """Output, pairs that found room, the routing after rerouting, and the means of that."""
        config = self.config
        transport = config.transport if context.train else config.eval_transport
        rules, capacity = transport.slot_rules, 0
        routing, moved = output.routing, {}
        score_GT = priority_score(routing, context, rules)
        tokens, columns = x_GTD.shape[1], routing.expert_GTK.shape[-1]
        if rules is not None:
            factor = rules.capacity_factor
            capacity = self.gate.capacity(tokens, config.num_experts, factor)
            if rules.reroute:
                routing, moved = _rerouted(output, score_GT, capacity, rules, context.valid_GT)
        sent = routing
        if self.options.weigh_input:
            # The weight of the one pair; 1 then marks it as active.
            weight_GTK = routing.weight_GTK
            x_GTD = (x_GTD * weight_GTK).astype(x_GTD.dtype)
            x_BLD = x_GTD.reshape(x_BLD.shape)
            sent = Routing(routing.expert_GTK, (weight_GTK > 0).astype(weight_GTK.dtype))
        routed = sent
        if rules is None:
            # Groups matter to slots alone: without, sequences spread over the mesh more finely.
            shape = x_BLD.shape[:2]
            x_GTD, score_GT = x_BLD, score_GT.reshape(shape)
            sent = jax.tree.map(lambda a: a.reshape(*shape, columns), sent)
        y, kept = dispatch(
            x_GTD,
            sent,
            score_GT,
            self.expert_weights(),
            transport=transport,
            activation=self.options.activation,
            capacity=capacity,
        )
        y_GTD, kept_GTK = y.reshape(-1, tokens, x_BLD.shape[-1]), kept.reshape(-1, tokens, columns)
        if self.options.expert_bias:
            y_GTD += self._output_biases(routed, kept_GTK).astype(y_GTD.dtype)
        return y_GTD, kept_GTK, routing, moved

    def _output_biases(self, routing: Routing, kept_GTK: Array) -> Array:
        """The weighted sum of the output biases of each token's experts."""
        weight_GTK = jnp.where(kept_GTK, routing.weight_GTK, 0.0)
        picked_GTKE = jax.nn.one_hot(routing.expert_GTK, self.config.num_experts)
        weight_GTE = jnp.sum(picked_GTKE * weight_GTK[..., None], axis=-2)
        return weight_GTE @ self.down_bias_ED[...].astype(jnp.float32)


def _rerouted(
    output: GateOutput, score_GT: Array, capacity: int, rules: SlotRules, valid_GT: Array
) -> tuple[Routing, dict[str, Array]]:
    """The routing with overflowing pairs moved, and their number per token, by group."""
    before = output.routing
    move = functools.partial(
        reroute, capacity=capacity, priority=rules.priority, rounds=rules.reroute
    )
    after = Routing(
        *group_local(move)(before.expert_GTK, before.weight_GTK, output.stats.probs_GTE, score_GT)
    )
    moved_GT = jnp.sum(after.expert_GTK != before.expert_GTK, axis=-1).astype(jnp.float32)
    return after, {"rerouted": group_mean(moved_GT, valid_GT)}


def priority_score(routing: Routing, context: GateContext, rules: SlotRules | None) -> Array:
    """Higher is served earlier; used with slots and priorities "gate" and "random" only."""
    if rules is not None and rules.draws_score:
        return row_noise(jax.random.uniform, context, (), tag=PRIORITY_NOISE)
    return jax.lax.stop_gradient(jnp.max(routing.weight_GTK, axis=-1))


class MoE(MoELayer):
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
      transport: "cells" (fixed capacity), "dropless", "dropless_once" (a token is sent once to
        each device that has experts of it), "gather" or "all_experts", or a value with its own
        options, such as ``moejax.dispatch.Cells(capacity_factor=2.0)``, which replaces those that
        the gate's name sets. ``eval_transport`` is the same for evaluation. Gates that mix (Soft
        MoE) use no transport.
      capacity_factor: slots per expert over the mean number of pairs ("cells" only), in training;
        ``eval_capacity_factor`` in evaluation.
      priority: which pairs stay when an expert is full: "position", "choice", "gate" or "random".
      reroute: how often an overflowing pair tries its token's next-best expert ("cells" only).
      activation: of the experts, "swiglu", "gelu", "relu" or "clamped_swiglu".
      group: the tokens that share slots: "sequence", a whole number of sequences ("4"), or "batch".
      balance_scope: balance losses per "sequence", "group" or "batch".
      num_shared: experts that every token visits, computed as one FFN of width num_shared * d_ff.
      shared_gate: weigh the shared experts' output by sigmoid(x w), one weight per token (Qwen).
      residual: weigh routed and shared experts by the two values of softmax(x W + b) (DeepSpeed's
        residual MoE: Rajbhandari et al., arXiv 2201.05596) instead of adding them up.
      vocab_size: token ids, for gates that look them up.
      layer: number of the layer in its model, which some gates initialise by.
      num_tasks: the tasks of ``Context.task_B``, for gates with parameters per task. With more
        than one, statistics count pairs per task.
      entropy_floors: adds LIMoE's entropy losses, with a threshold for each task.
      dtype: type of the experts' computation and of the output, float32 or bfloat16; None: that of
        the input. The router computes in float32, on the input as given.
      param_dtype: type of the experts' parameters, shared ones too. The router's are float32.

    Raises:
      ValueError: a choice that cannot work, naming field, value and remedy.
      UserError: an unknown name of a gate.
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
        reroute: int | None = None,
        activation: str | None = None,
        num_shared: int | None = None,
        shared_gate: bool | None = None,
        residual: bool | None = None,
        balance_scope: str | None = None,
        vocab_size: int = MoEOptions.vocab_size,
        num_tasks: int = MoEOptions.num_tasks,
        entropy_floors: tuple[float, ...] = MoEOptions.entropy_floors,
        layer: int | Array = 0,
        dtype: Any = MoEOptions.dtype,
        param_dtype: Any = MoEOptions.param_dtype,
        rngs: nnx.Rngs,
    ):
        gate, preset = _gate_and_preset(gate)
        given = {
            "num_experts": num_experts,
            "transport": transport,
            "capacity_factor": capacity_factor,
            "eval_transport": eval_transport,
            "eval_capacity_factor": eval_capacity_factor,
            "priority": priority,
            "reroute": reroute,
            "group": None if group is None else str(group),
            "d_ff": d_ff,
            "activation": activation,
            "shared_experts": num_shared,
            "shared_gate": shared_gate,
            "residual": residual,
            "balance_scope": balance_scope,
        }

        def chosen(options: type[Options]) -> dict[str, Any]:
            """Each option as given, or as in the preset; those in neither have their defaults."""
            values = {**preset, **{name: v for name, v in given.items() if v is not None}}
            names = [field.name for field in option_fields(options)]
            return {name: values[name] for name in names if name in values}

        flat = {field.name for field in option_fields(DispatchOptions)} - {"num_experts", "group"}
        check_options({name: given.get(name) for name in flat})
        around, own = DispatchOptions(**chosen(DispatchOptions)), chosen(MoEOptions)
        shared = own.get("shared_experts", 0)
        check_sizes(1, d_model=d_model, d_ff=d_ff, num_experts=num_experts, num_tasks=num_tasks)
        check_sizes(0, num_shared=shared, reroute=around.reroute, vocab_size=vocab_size)
        check_rngs(rngs)
        try:
            options = MoEOptions(
                gate=gate,
                config=around.config,
                vocab_size=vocab_size,
                num_tasks=num_tasks,
                entropy_floors=entropy_floors,
                dtype=None if dtype is None else checked_dtype("dtype", dtype).name,
                param_dtype=checked_dtype("param_dtype", param_dtype).name,
                **own,
            )
            super().__init__(d_model, options, layer, rngs=rngs)
        except ValueError as error:
            text = renamed(str(error), {"shared_experts": "num_shared"})
            if text == str(error):
                raise  # with its traceback: it may be from a gate of the user's
            raise ValueError(text) from None


def _gate_and_preset(gate: Gate | str) -> tuple[Gate, dict[str, Any]]:
    """The gate, and the options that the published model under its name sets."""
    if isinstance(gate, str):
        return gating.make(gate), gating.preset_overrides(gate)
    if not isinstance(gate, Gate) or isinstance(gate, type):
        raise ValueError(
            f"gate={gate!r} is neither the name of a gate, such as 'mixtral', nor a gate, such as "
            "moejax.gating.make('mixtral', k=4)"
        )
    return gate, {}
