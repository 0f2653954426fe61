"""Top-k token choice: softmax router, the k best experts. Switch, Mixtral and OLMoE are presets."""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import (
    INIT_SCALE,
    InitScale,
    LinearRouter,
    Renormalize,
    Stateless,
    TokenChoice,
)
from moejax.types import GateContext, GateOutput, GateParams, GateState, GateTraits, TrainedBy


@dataclasses.dataclass(frozen=True)
class TopK(Stateless, LinearRouter, TokenChoice):
    r"""Each token visits the k experts with the largest router logits.

    .. math::
       h = x W + b, \quad S = \operatorname{top}_k(h), \quad
       g_e = \frac{e^{h_e}}{\sum_{j \in J} e^{h_j}} \; (e \in S), \quad
       y = \sum_{e \in S} g_e f_e(x)

    With ``renormalize``, J = S (Mixtral: softmax after top-k); otherwise J = all experts (Switch,
    OLMoE: softmax before). With k = 1 and ``renormalize`` every weight is the constant 1 and the
    router would get no gradient from the task, which is refused in training.

    b is 0 without ``bias`` and starts at 0 with it. ``jitter`` e multiplies the router's input by
    U(1-e, 1+e) per element, in training only. Routers start as a truncated normal with std
    sqrt(init_scale / d_model) (Switch, table 3: 0.1).

    Visibility: a token sees neither later tokens nor other sequences, except through capacity.

    References: Shazeer et al., arXiv 1701.06538; Fedus, Zoph, Shazeer (Switch), arXiv 2101.03961;
    Jiang et al. (Mixtral), arXiv 2401.04088.
    """

    k: Annotated[int, "experts per token"] = 2
    renormalize: Renormalize = True
    jitter: Annotated[float, "router input noise U(1-e, 1+e) in training"] = 0.0
    init_scale: InitScale = INIT_SCALE
    bias: Annotated[bool, "add a learned bias to the logits"] = False

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"gate.jitter={self.jitter} must lie in [0, 1)")
        ops.check_positive("init_scale", self.init_scale)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def traits(self) -> GateTraits:
        return GateTraits(follows=True)

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        logits_GTE = self.logits(params, x_GTD, context)
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, self.k, self.renormalize)
        wrong_GT = None
        if context.expert_GTK is not None:
            expert_GTK, wrong_GT = ops.followed(expert_GTK, context, logits_GTE.shape[-1])
            weight_GTK = ops.softmax_weights(logits_GTE, expert_GTK, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE), identity_weight_GT=wrong_GT)

    def logits(self, params: GateParams, x_GTD: Array, context: GateContext) -> Array:
        """The router's logits [G, T, E]; in training with ``jitter``, those of jittered tokens."""
        x_GTD = x_GTD.astype(jnp.float32)
        if self.jitter and context.train:
            low, high = 1.0 - self.jitter, 1.0 + self.jitter

            def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
                return jax.random.uniform(key, shape, dtype, low, high)

            x_GTD = x_GTD * ops.row_noise(draw, context, x_GTD.shape[-1:])
        logits_GTE = ops.router_logits(x_GTD, params["router_DE"])
        return logits_GTE + params["bias_E"] if self.bias else logits_GTE
