"""The layer's time as a function of the number of experts and of tokens."""

from collections.abc import Callable, Iterator

import jax

from scripts.layer_bench import timing
from scripts.layer_bench.checks import value_and_gradients
from scripts.layer_bench.layers import IMPLS, dense_2d
from scripts.layer_bench.problems import Shape, make_problem

EXPERTS = (8, 16, 32, 64, 128, 256)
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
QUICK_EXPERTS, QUICK_TOKENS = (4, 8), (512, 1024)


def step_of(layer: Callable, shape: Shape, dense: bool = False) -> timing.Run:
    """Forward and backward on a problem of the shape, compiled."""
    problem = make_problem(shape)
    params = problem.dense if dense else problem.params
    args = (problem.dy_TD, problem.x_TD, params)
    compiled = jax.jit(value_and_gradients(layer)).lower(*args).compile()
    return lambda: compiled(*args)


def over_experts(names: list[str], rounds: int, quick: bool) -> Iterator[dict]:
    """E changes, the FLOPs per token do not: every time over one dense FFN's, in one run."""
    counts = QUICK_EXPERTS if quick else EXPERTS
    tokens, width, hidden = (512, 8, 16) if quick else (32768, 256, 256)
    for name in names:
        shapes = [Shape(f"E={E}", tokens, width, hidden, E, 2) for E in counts]
        runs = {s.name: step_of(IMPLS[name].build(s), s) for s in shapes}
        found, _ = timing.paired(step_of(dense_2d, shapes[0], dense=True), runs, rounds)
        for shape in shapes:
            yield {
                "kind": "experts",
                "impl": name,
                "shape": f"T={tokens} D={width} F={hidden} E={shape.E} k=2",
                "E": shape.E,
                **fwdbwd(found[shape.name]),
                "over_least_E": found[shape.name].ratio / found[shapes[0].name].ratio,
            }


def over_tokens(names: list[str], rounds: int, quick: bool) -> Iterator[dict]:
    """T changes: time per token over that of the middle T, in one run."""
    counts = QUICK_TOKENS if quick else TOKENS
    width, hidden, experts = (8, 16, 4) if quick else (256, 256, 8)
    for name in names:
        shapes = {T: Shape(f"T={T}", T, width, hidden, experts, 2) for T in counts}
        middle = counts[len(counts) // 2]
        runs = {str(T): step_of(IMPLS[name].build(s), s) for T, s in shapes.items()}
        found, _ = timing.paired(runs[str(middle)], runs, rounds)
        for T in counts:
            t, by = found[str(T)], T / middle
            yield {
                "kind": "tokens",
                "impl": name,
                "shape": f"T={T} D={width} F={hidden} E={experts} k=2",
                "T": T,
                "us_per_token": t.ms * 1e3 / T,
                "per_token_ratio": t.ratio / by,
                "per_token_spread": [t.low / by, t.high / by],
            }


def fwdbwd(t: timing.Timing) -> dict:
    """A timing as fields of a row."""
    return {"fwdbwd_ratio": t.ratio, "fwdbwd_spread": [t.low, t.high], "fwdbwd_ms": t.ms}
