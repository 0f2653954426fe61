"""Task-level gating: a sequence's experts depend on its task alone."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.gating import ops
from moejax.gating.gate import INIT_SCALE, FixedK, InitScale, Renormalize, Stateless
from moejax.gating.visibility import capacity_visibility
from moejax.types import (
    GateContext,
    GateOutput,
    GateParams,
    GateSpec,
    GateTraits,
    MoEConfig,
    TrainedBy,
    Visibility,
)


@dataclasses.dataclass(frozen=True)
class Task(Stateless, FixedK):
    r"""Every token of a sequence visits the experts of the sequence's task.

    .. math::
       h = W^\top u_{task}, \quad S = \operatorname{top}_k(h), \quad
       y = \sum_{e \in S} \operatorname{softmax}(h)_e f_e(x)

    u is a learned embedding of the task; the softmax is over the k kept logits (``renormalize``) or
    over all. ``Context.task_B`` has the tasks, and ``num_tasks`` of the layer is their number; with
    one task (a language model on one corpus) all tokens visit the same experts. Inference needs
    only the experts of the tasks in use.

    A sequence loads k experts with all its tokens, and slots sized for balanced sequences would
    drop most of them. The preset therefore uses ``dropless``, and balance losses over the batch.

    Visibility: a token's experts depend on no token at all; through capacity it sees the tasks of
    other sequences in its group, but neither their tokens nor the future.

    Reference: Kudugunta et al., "Beyond Distillation: Task-level Mixture-of-Experts for Efficient
    Inference", arXiv 2110.03742.
    """

    k: Annotated[int, "experts per task"] = 2
    renormalize: Renormalize = True
    init_scale: InitScale = INIT_SCALE

    trained_by: ClassVar[TrainedBy] = "task"

    def check(self, num_experts: int, train: bool) -> None:
        ops.check_k(self.k, num_experts)
        ops.check_positive("init_scale", self.init_scale)
        ops.check_trains(self.k, self.renormalize, num_experts, train)

    def traits(self) -> GateTraits:
        return GateTraits(reads=("task",))

    def init(self, key: Array, spec: GateSpec) -> GateParams:
        router_key, task_key = jax.random.split(key)
        return {
            "router_DE": ops.init_router(router_key, spec, self.init_scale),
            "task_MD": jax.random.normal(task_key, (spec.num_tasks, spec.d_model), jnp.float32),
        }

    def __call__(
        self, params: GateParams, state: tuple, x_GTD: Array, context: GateContext
    ) -> GateOutput:
        task_GRD = jnp.take(params["task_MD"], context.task_GR, axis=0, mode="clip")
        logits_GRE = ops.router_logits(task_GRD, params["router_DE"])
        length = context.valid_GT.shape[1] // context.row_GR.shape[1]
        logits_GTE = jnp.repeat(logits_GRE, length, axis=1)
        expert_GTK, weight_GTK = ops.local_top_k(logits_GTE, self.k, self.renormalize)
        routing = ops.masked(expert_GTK, weight_GTK, context.valid_GT)
        return GateOutput(routing, ops.softmax_stats(logits_GTE))

    def visibility(self, moe: MoEConfig) -> Visibility:
        # Drops depend on tasks and noise only, whatever the priority.
        by_capacity = capacity_visibility(self.k, moe)
        return by_capacity._replace(train_future=False, eval_future=False)
