"""The main table: every implementation on one shape, against the fastest dense FFN."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from scripts.layer_bench import checks, memory, timing, torch_layers
from scripts.layer_bench.layers import IMPLS, dense_2d, dense_3d
from scripts.layer_bench.problems import Problem, Shape, make_problem

DENSE, DENSE_3D = "dense", "dense-3d"
TORCH_DENSE = "torch-dense"
HF = tuple(f"hf-mixtral-{kind}" for kind in torch_layers.KINDS)


class Candidate:
    """A layer's two compiled programs and what they need."""

    def __init__(self, layer: Callable, problem: Problem, params: dict):
        args = (problem.x_TD, params)
        self.forward = jax.jit(layer).lower(*args).compile()
        both = jax.jit(checks.value_and_gradients(layer))
        self.both = both.lower(problem.dy_TD, *args).compile()
        self.temp_bytes = memory.temp_bytes(self.both)
        self.run_forward: timing.Run = lambda: self.forward(*args)
        self.run_both: timing.Run = lambda: self.both(problem.dy_TD, *args)


def rows(
    shape: Shape, names: list[str], *, rounds: int, limit_gb: float, check_tokens: int
) -> Iterator[dict]:
    """Checks, then times; what cannot run is a row that says why."""
    balanced, zipf = make_problem(shape), make_problem(shape, zipf=True)
    candidates = {
        DENSE: Candidate(dense_2d, balanced, balanced.dense),
        DENSE_3D: Candidate(dense_3d(shape), balanced, balanced.dense),
    }
    common: dict[str, dict[str, Any]] = {DENSE: {}, DENSE_3D: {}}
    wanted: dict = {}
    for name in names:
        if name not in IMPLS:
            continue
        impl, problem = IMPLS[name], zipf if IMPLS[name].zipf else balanced
        layer = impl.build(shape)
        candidate = Candidate(layer, problem, problem.params)
        if candidate.temp_bytes > limit_gb * 1e9:
            yield skipped(shape, name, f"needs {candidate.temp_bytes / 1e9:.1f} GB of temporaries")
            continue
        candidates[name] = candidate
        common[name] = {
            "max_error": checks.check(impl, shape, check_tokens, wanted),
            "saved_bytes_per_token": memory.saved_per_token(layer, problem),
            "exchange_bytes": memory.exchange_buffers(shape, impl.capacity_factor),
        }
    forward = measure({n: c.run_forward for n, c in candidates.items()}, rounds)
    both = measure({n: c.run_both for n, c in candidates.items()}, rounds)
    for name, candidate in candidates.items():
        yield {
            **row(shape, name, forward[name], both[name]),
            "temp_bytes": candidate.temp_bytes,
            "temp_over_dense": candidate.temp_bytes / candidates[DENSE].temp_bytes,
            "saved_floor": memory.saved_floor(shape),
            **common[name],
        }
    yield from torch_rows(shape, names, balanced, rounds, check_tokens)


def measure(runs: dict[str, timing.Run], rounds: int) -> dict[str, timing.Timing]:
    """Ratios over the faster of the two forms of the dense FFN; the first run is the 2-D one."""
    base = runs[DENSE]
    found, _ = timing.paired(base, runs, rounds)
    return timing.over_fastest(found, DENSE_3D) if DENSE_3D in runs else found


def row(shape: Shape, name: str, forward: timing.Timing, both: timing.Timing) -> dict:
    return {
        "kind": "layer",
        "shape": shape.name,
        "impl": name,
        "fwd_ratio": forward.ratio,
        "fwd_spread": [forward.low, forward.high],
        "fwd_ms": forward.ms,
        "fwdbwd_ratio": both.ratio,
        "fwdbwd_spread": [both.low, both.high],
        "fwdbwd_ms": both.ms,
    }


def skipped(shape: Shape, name: str, why: str) -> dict:
    return {"kind": "layer", "shape": shape.name, "impl": name, "not_run": why}


def torch_rows(
    shape: Shape, names: list[str], problem: Problem, rounds: int, check_tokens: int
) -> Iterator[dict]:
    """The block of transformers over torch's own dense FFN, in a run of their own."""
    kinds = [kind for kind in torch_layers.KINDS if f"hf-mixtral-{kind}" in names]
    why = torch_layers.missing()
    if why is not None or not kinds:
        yield from (skipped(shape, f"hf-mixtral-{kind}", why or "") for kind in kinds)
        return
    small = checks.shrunk(shape, check_tokens)
    small_problem = make_problem(small)
    wanted = checks.expected(small_problem, small, None)
    found = {DENSE: torch_layers.runs(*torch_layers.dense(problem.dense), problem)}
    errors: dict[str, float] = {}
    for kind in kinds:
        block = torch_layers.mixtral(kind, shape, problem.params)
        found[f"hf-mixtral-{kind}"] = torch_layers.runs(*block, problem)
        errors[f"hf-mixtral-{kind}"] = torch_layers.check(kind, small, small_problem, wanted)
    forward, both = (
        measure({name: pair[i] for name, pair in found.items()}, rounds) for i in (0, 1)
    )
    for name in found:
        shown = TORCH_DENSE if name == DENSE else name
        fields = {"over": TORCH_DENSE, "max_error": errors.get(name)}
        yield {**row(shape, shown, forward[name], both[name]), **fields}


@functools.cache
def all_names() -> tuple[str, ...]:
    """Every implementation that can be asked for."""
    return (*IMPLS, *HF)
