"""Tokens to the attention heads they chose, and back: one matrix per head, k heads per token.

Heads are few and small: every device multiplies its own tokens by all heads' matrices, which are
gathered where they are stored in shards. Nothing is dropped and no token travels.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moejax import mesh as meshes
from moejax.dispatch import pack
from moejax.kernels import grouped_matmul, kernels_pass_check_vma
from moejax.kernels.support import forward_mode_refused, match_varying
from moejax.types import Routing

ORDINARY = "ordinary attention"
"""Instead of heads that are chosen, where forward mode is wanted."""


def to_heads(
    x_BLD: Float[Array, "B L D"], routing: Routing, query_EDI: Float[Array, "E D I"]
) -> Float[Array, "B L K I"]:
    """Each token times the matrix of each of its K heads; zeros where a column is inactive."""
    with forward_mode_refused(ORDINARY):
        return head_queries(x_BLD, routing, query_EDI, mesh=meshes.ambient())


def from_heads(
    mixed_BLKI: Float[Array, "B L K I"], routing: Routing, out_EID: Float[Array, "E I D"]
) -> Float[Array, "B L D"]:
    """y_t = sum over k of weight_tk mixed_tk @ out[expert_tk], accumulated in float32."""
    with forward_mode_refused(ORDINARY):
        return head_outputs(mixed_BLKI, routing, out_EID, mesh=meshes.ambient())


@partial(jax.jit, static_argnames="mesh")
def head_queries(
    x_BLD: Array, routing: Routing, query_EDI: Array, *, mesh: AbstractMesh | None
) -> Array:
    def run(tokens: tuple[Array, Routing], query_EDI: Array) -> Array:
        x_bLD, routing = tokens
        plan, by_pair, size_E = _plans(routing, len(query_EDI))
        rows_ND = pack.gather_rows(x_bLD.reshape(-1, x_bLD.shape[-1]), plan)
        query_NI = grouped_matmul(rows_ND, query_EDI.astype(rows_ND.dtype), size_E)
        query_NI = pack.sum_rows(query_NI, by_pair)
        return query_NI.reshape(*routing.expert_GTK.shape, -1)

    return checkpoint_name(_by_token(run, mesh)((x_BLD, routing), query_EDI), "attention")


@partial(jax.jit, static_argnames="mesh")
def head_outputs(
    mixed_BLKI: Array, routing: Routing, out_EID: Array, *, mesh: AbstractMesh | None
) -> Array:
    def run(tokens: tuple[Array, Routing], out_EID: Array) -> Array:
        mixed_bLKI, routing = tokens
        batch, length, columns, width = mixed_bLKI.shape
        plan, by_pair, size_E = _plans(routing, len(out_EID))
        rows_NI = pack.gather_rows(mixed_bLKI.reshape(-1, width), by_pair)
        out_ND = grouped_matmul(rows_NI, out_EID.astype(rows_NI.dtype), size_E)
        out_ND = checkpoint_name(out_ND, "experts")
        out_ND, weight_tK = match_varying(out_ND, routing.weight_GTK.reshape(-1, columns))
        return pack.combine_rows(out_ND, weight_tK, plan).reshape(batch, length, -1)

    return _by_token(run, mesh)((mixed_BLKI, routing), out_EID)


# The annotation of jax.jit hides the name that the wrapped function keeps.
FIXED_ROWS = (
    head_queries.__name__,  # pyright: ignore[reportAttributeAccessIssue]
    head_outputs.__name__,  # pyright: ignore[reportAttributeAccessIssue]
)
"""Names from which a count of FLOPs infers that the grouped matmuls inside do not depend on the
routing: a token has k heads, whichever they are."""


def _by_token(run, mesh: AbstractMesh | None):
    """``run((tokens, routing), weights)`` on every device for its own sequences."""
    if mesh is None:
        return run
    return meshes.on_batch_shards(run, mesh, (P(),), check_vma=kernels_pass_check_vma())


def _plans(routing: Routing, num_experts: int) -> tuple[pack.Plan, pack.Plan, Array]:
    """Rows sorted by head: as pairs of tokens, as pairs on their own, and how many a head has."""
    columns = routing.expert_GTK.shape[-1]
    expert_tK = routing.expert_GTK.reshape(-1, columns)
    weight_tK = routing.weight_GTK.reshape(-1, columns)
    plan, size_E = pack.plan_sorted(
        expert_tK, weight_tK, num_experts=num_experts, rows=expert_tK.size
    )
    by_pair = pack.Plan(plan.pair_M, plan.row_tK.reshape(-1, 1), plan.kept_tK.reshape(-1, 1))
    return plan, by_pair, size_E
