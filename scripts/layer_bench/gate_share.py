"""The time of every gate in `moejax.gating.names()` relative to that of its layer's experts.

Gate: its call on groups of one sequence in training, with all that it returns; backward, gradients
of its parameters and of the tokens from gradients of the weights it gives. Parameters are those of
a fresh layer. Experts: the FFN that ``dropless`` calls, on rows already packed, as many as the gate
has active pairs (or slots), with the loads that this gate gives. Neither has the packing (or the
mixing) or the losses.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax import experts, gating
from moejax.types import Context, ExpertWeights, Gate, GateContext, GateOutput, GateSpec, Slots
from scripts.layer_bench import gate_table, timing
from scripts.layer_bench.problems import Problem, Shape, make_problem

DECIDED = 1e4
"""Multiplies the first parameters of DSelect-k's codes, so that nearly all bits are decided."""


VOCAB = 256
"""Token ids, for gates that look at them, are drawn evenly."""


class Variant(NamedTuple):
    """A gate to be timed: its name in the table of gates, fields, and a factor of its codes.

    The visits of a DSelect-k gate fall from E per token at the start to at most k, so it is timed
    at both ends.
    """

    name: str
    fields: dict[str, Any]
    scale: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.name} (decided)" if self.scale != 1.0 else self.name


def variants(shape: Shape) -> list[Variant]:
    """Every gate at the shape's k where it has one; at k = 1 too where that is its own choice."""
    found = []
    for name in gating.names():
        fields = gating.fields(name)
        if "k" not in fields:
            found.append(Variant(name, {}))
            continue
        own = fields["k"][0]
        for k in dict.fromkeys((own, shape.k) if own == 1 else (shape.k,)):
            found.append(Variant(name, {"k": k}))
            if name == "dselect_k":
                found.append(Variant(name, {"k": k}, DECIDED))
    return found


class GateCall:
    """A gate on a problem: its output, and its two compiled programs."""

    def __init__(self, variant: Variant, shape: Shape, problem: Problem):
        gate = gating.make(variant.name, **variant.fields)
        gate.check(shape.E, train=True)
        spec = GateSpec(shape.D, shape.E, VOCAB, token_counts=lambda: np.ones(VOCAB, np.int64))
        params = gate.init(jax.random.key(1), spec)
        if variant.scale != 1.0:
            params = {
                n: p * variant.scale if n.startswith("code") else p for n, p in params.items()
            }
        state, context = gate.init_state(spec), train_context(shape)
        x_GTD = problem.x_TD.reshape(-1, shape.group, shape.D)
        args = (params, state, x_GTD, context)
        self.forward = jax.jit(gate.__call__).lower(*args).compile()
        self.output: GateOutput = self.forward(*args)
        weights = weights_of(self.output)
        keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(weights)))
        d_weights = jax.tree.map(
            lambda w, key: jax.random.normal(key, w.shape),
            weights,
            jax.tree.unflatten(jax.tree.structure(weights), list(keys)),
        )
        self.both = jax.jit(with_gradients(gate)).lower(d_weights, *args).compile()
        self.gradients = self.both(d_weights, *args)[1:]
        self.run_forward: timing.Run = lambda: self.forward(*args)
        self.run_both: timing.Run = lambda: self.both(d_weights, *args)


def train_context(shape: Shape) -> GateContext:
    size = (shape.T // shape.group, shape.group)
    token_BL = jax.random.randint(jax.random.key(4), size, 0, VOCAB)
    context = Context.of(*size, token_BL=token_BL, key=jax.random.key(0))
    return context.grouped(rows=1, train=True)


def weights_of(output: GateOutput) -> tuple:
    """The differentiable part of a gate's output."""
    if output.mixing is not None:
        return (output.mixing,)
    identity_GT = output.identity_weight_GT
    return (output.routing.weight_GTK, *(() if identity_GT is None else (identity_GT,)))


def with_gradients(gate: Gate):
    """(d_weights, params, state, x_GTD, context) -> output, gradients of params and tokens."""

    def both(d_weights, params, state, x_GTD, context):
        def run(params, x_GTD):
            output = gate(params, state, x_GTD, context)
            return weights_of(output), output

        _, vjp, output = jax.vjp(run, params, x_GTD, has_aux=True)
        return output, *vjp(d_weights)

    return both


def loads(output: GateOutput, num_experts: int) -> np.ndarray:
    """Rows of each expert: active pairs, or its slots of all groups."""
    if isinstance(output.mixing, Slots):
        groups, _, slots = output.mixing.combine_GTX.shape
        return np.full(num_experts, groups * slots // num_experts)
    active_GTK = np.asarray(output.routing.weight_GTK) > 0
    expert_GTK = np.asarray(output.routing.expert_GTK)
    return np.bincount(expert_GTK[active_GTK], minlength=num_experts)


def check(call: GateCall, variant: Variant, shape: Shape) -> None:
    """That the timed programs did what the gate is for.

    Raises:
      ArithmeticError: a number is not finite, a token visits nobody although the gate has no say
        in how many it visits, or BASE is not balanced.
    """
    floats = [np.asarray(a) for a in jax.tree.leaves((weights_of(call.output), call.gradients))]
    if not all(np.isfinite(a).all() for a in floats):
        raise ArithmeticError(f"{variant.label}, shape {shape.name}: not every number is finite")
    active_GTK = np.asarray(call.output.routing.weight_GTK) > 0
    varies = active_GTK.shape[-1] == shape.E > shape.k
    if not (active_GTK.any() if varies else active_GTK.any(axis=-1).all()):
        raise ArithmeticError(f"{variant.label}, shape {shape.name}: a token visits no expert")
    if variant.name == "base":
        for expert_T in np.asarray(call.output.routing.expert_GTK)[..., 0]:
            if np.ptp(np.bincount(expert_T, minlength=shape.E)) > 1:
                raise ArithmeticError(f"base, shape {shape.name}: loads are not balanced")


def timed_part(size_E: np.ndarray, most: int) -> np.ndarray:
    """The loads of the first experts, as many as have ``most`` rows together (at least one).

    A gate that visits all experts has E / k times the rows of the others. Where loads are equal, as
    they are then, its experts' time is that of a part times the share of rows.
    """
    if size_E.sum() <= most:
        return size_E
    return size_E[: max(int(np.searchsorted(np.cumsum(size_E), most, side="right")), 1)]


def experts_runs(problem: Problem, size_E: np.ndarray) -> tuple[timing.Run, timing.Run]:
    """The experts' FFN on packed rows, forward, and forward and backward."""
    rows = int(size_E.sum())
    own = len(size_E)
    names = ("gate_EDF", "up_EDF", "down_EFD")
    weights = ExpertWeights(*(problem.params[name][:own] for name in names))
    token_N = jnp.arange(rows) % problem.x_TD.shape[0]
    x_ND, dy_ND = problem.x_TD[token_N], problem.dy_TD[token_N]

    def ffn(weights, x_ND, size_E):
        return experts.ffn_sorted(weights, x_ND, size_E, "swiglu")

    def both(dy_ND, weights, x_ND, size_E):
        y_ND, vjp = jax.vjp(lambda w, x: ffn(w, x, size_E), weights, x_ND)
        return y_ND, *vjp(dy_ND)

    args = (weights, x_ND, jnp.asarray(size_E, jnp.int32))
    run_forward = jax.jit(ffn).lower(*args).compile()
    run_both = jax.jit(both).lower(dy_ND, *args).compile()
    return lambda: run_forward(*args), lambda: run_both(dy_ND, *args)


def rows(shape: Shape, rounds: int) -> Iterator[dict]:
    """One row per gate: its time over that of its experts, paired."""
    problem = make_problem(shape)
    for variant in variants(shape):
        row: dict[str, Any] = {
            "kind": "gates",
            "shape": shape.name,
            "impl": variant.label,
            "gate": variant.name,
            "k": variant.fields.get("k"),
        }
        try:
            call = GateCall(variant, shape, problem)
        except ValueError as error:  # the gate does not work with these experts, or needs a file
            yield {**row, "not_run": str(error)}
            continue
        check(call, variant, shape)
        size_E = loads(call.output, shape.E)
        part_E = timed_part(size_E, 2 * shape.T * shape.k)
        times = float(size_E.sum() / part_E.sum())
        row["pairs_per_token"] = float(size_E.sum() / shape.T)
        row["experts_timed"] = len(part_E)
        runs = (call.run_forward, call.run_both)
        for field, run, base in zip(
            ("fwd", "fwdbwd"), runs, experts_runs(problem, part_E), strict=True
        ):
            found, base_ms = timing.paired(base, {"gate": run}, rounds)
            t = found["gate"]
            row[f"{field}_ratio"] = t.ratio / times
            row[f"{field}_spread"] = [t.low / times, t.high / times]
            row[f"{field}_ms"] = t.ms
            row[f"experts_{field}_ms"] = base_ms * times
        row["target"] = gate_table.target(variant.name)
        row["met"] = row["fwdbwd_ratio"] <= row["target"]
        yield row
