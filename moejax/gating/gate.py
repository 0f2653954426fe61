"""Base classes of gates: state, router, columns, slots and visibility.

Each class implements a few methods of ``moejax.types.Gate`` in terms of fields that the gate
declares. A class here is abstract and a gate is final: no gate overrides an implemented method.
"""

import math
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.visibility import capacity_visibility, sparse_visibility
from moejax.types import (
    GateParams,
    GateSpec,
    GateState,
    MoEConfig,
    MoEStats,
    TrainedBy,
    Visibility,
)

InitScale = Annotated[float, "router init: std = sqrt(init_scale / d_model)"]
INIT_SCALE = 0.1
"""Scale of a router's initial values (Switch Transformer, table 3)."""
Renormalize = Annotated[bool, "softmax over the k kept logits instead of over all"]
MaxActive = Annotated[int, "most experts per token, the heaviest ones (0: all E)"]


class ConstantState:
    """A gate whose state never changes."""

    def update(self, state: GateState, stats: MoEStats) -> GateState:
        return state


class Stateless(ConstantState):
    """A gate without memory between steps."""

    def init_state(self, spec: GateSpec) -> GateState:
        return ()


class LinearRouter:
    """A gate of logits x W, whose router matrix W is its only parameter, or x W + b with ``bias``.

    b starts at 0. A gate with the field ``bias`` adds it to its logits.
    """

    init_scale: float
    bias: bool = False

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        router_DE = ops.init_router(key, spec, self.init_scale)
        if not self.bias:
            return {"router_DE": router_DE}
        return {"router_DE": router_DE, "bias_E": jnp.zeros(spec.num_experts, jnp.float32)}


class FixedK:
    """A gate whose tokens visit ``k`` experts each: k columns, and slots for k pairs per token."""

    k: int

    def columns(self, num_experts: int) -> int:
        return self.k

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return token_choice_capacity(num_tokens, num_experts, self.k, factor)


class TokenChoice(FixedK):
    """A gate whose tokens choose ``k`` experts by themselves: others matter only by capacity."""

    def visibility(self, moe: MoEConfig) -> Visibility:
        return capacity_visibility(self.k, moe)


class VariableK:
    """A gate whose tokens visit any number of experts, at most ``max_active`` (0: all E)."""

    max_active: int

    def columns(self, num_experts: int) -> int:
        return self.max_active or num_experts


class PositiveWeights(VariableK):
    """A gate whose tokens visit every expert of positive weight; slots are sized for ``k`` each."""

    k: int

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return token_choice_capacity(num_tokens, num_experts, self.k, factor)

    def visibility(self, moe: MoEConfig) -> Visibility:
        return sparse_visibility(moe, self.k, self.max_active)


class Unlearned(ConstantState):
    """A gate without parameters whose choice depends on no token, and so no token's slot does."""

    trained_by: ClassVar[TrainedBy] = "none"

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        return {}

    def init_state(self, spec: GateSpec) -> GateState:
        """The experts' ids, which never change: their number is E, which no parameter has."""
        return {"expert_E": jnp.arange(spec.num_experts, dtype=jnp.int32)}

    def visibility(self, moe: MoEConfig) -> Visibility:
        return Visibility()


class EveryExpert:
    """A gate whose tokens visit all experts: column e is expert e, with a slot for every token."""

    def columns(self, num_experts: int) -> int:
        return num_experts

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        return num_tokens


def token_choice_capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
    """C = ceil(T k / E * factor), at least 1 and at most T (a token visits an expert once)."""
    # The subtraction keeps 1.1 * 10 at 11 although the product is 11.000000000000002.
    wanted = math.ceil(num_tokens * k / num_experts * factor - 1e-9)
    return max(1, min(wanted, num_tokens))
