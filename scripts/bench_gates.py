"""Time and quality of balanced routing: our solver, scipy, a jitted auction, Sinkhorn.

    python scripts/bench_gates.py --out gates.json [--plot gates.png] [--quick]

Every implementation solves the same scores in the same run, in turn; a ratio is the median of the
ratios of neighbouring runs. ``gap`` is what the best assignment would gain, per token and as a
share of the scores' range: measured against scipy where scipy ran, else the solver's own
certificate. ``imbalance`` is max load / mean load - 1. Below 0 a gap means that an unbalanced
routing beats every balanced one. Machines differ and are noisy: quote ratios.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import linear_sum_assignment

from moejax.gating import sinkhorn_bias
from moejax.gating.solvers import assignment

SHAPES = [(512, 8), (512, 64), (2048, 16), (4096, 8), (4096, 64), (4096, 256), (16384, 8),
          (16384, 256)]  # fmt: skip
QUICK_SHAPES = [(64, 4)]
KINDS = ("normal", "skewed", "clustered", "low_rank", "integer", "duplicates", "constant")
SCIPY_TOKENS = 4096
"""scipy needs a dense T x T matrix: 2 GB and minutes at 16384 tokens."""
SLOW_SECONDS = 5.0
"""Seconds above which a candidate runs once: long times vary little relative to their length."""
AUCTION_SCORES = 4096 * 256
"""Above this many scores a round of the auction takes most of a second, and it takes a hundred."""
AUCTION_ROUNDS = 2000
"""The reference auction has no bound of its own."""


class Solved(NamedTuple):
    expert_T: Any
    rounds: int
    gap: float


def make_scores(kind: str, tokens: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Scores as routers make them (skewed, clustered, low rank) and as solvers dread them."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(tokens, num_experts))
    share = 1 / np.arange(1, 65)
    rows = rng.normal(size=(64, num_experts))[rng.choice(64, size=tokens, p=share / share.sum())]
    centres = rng.normal(size=(32, 16))[rng.integers(0, 32, tokens)]
    made = {
        "normal": lambda: normal,
        "skewed": lambda: normal + np.linspace(0, 3, num_experts),
        "clustered": lambda: (
            (centres + 0.1 * rng.normal(size=(tokens, 16))) @ rng.normal(size=(16, num_experts))
        ),
        "low_rank": lambda: rng.normal(size=(tokens, 4)) @ rng.normal(size=(4, num_experts)),
        "integer": lambda: rng.integers(0, 10, normal.shape),
        "duplicates": lambda: rows,  # byte embeddings at the first layer
        "constant": lambda: np.ones_like(normal),
    }
    return made[kind]().astype(np.float32)


def by_scipy(scores: np.ndarray) -> Solved:
    """Jonker-Volgenant on the matrix with each expert's column repeated T / E times."""
    tokens, num_experts = scores.shape
    slots = np.repeat(scores.astype(np.float64), tokens // num_experts, axis=1)
    _, column = linear_sum_assignment(slots, maximize=True)
    return Solved(column // (tokens // num_experts), 0, 0.0)


@jax.jit
def _auction(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The auction of the authors' code, as it is described, with a bound on its rounds.

    Each expert bids on the T/E tokens it values most, by how much it values them above the next
    one, plus epsilon; each token goes to its highest bidder, who keeps it at the top of its list.
    """
    tokens, num_experts = scores.shape
    share = tokens // num_experts
    epsilon = jnp.maximum((scores.max() - scores.min()) / 50, 1e-4)
    best = scores.max()
    expert_E = jnp.arange(num_experts)[:, None]

    def one_round(carry: Any) -> Any:
        value_ET, cost_T, held_ET, turn, _, _ = carry
        top_EK, token_EK = lax.top_k(value_ET, share + 1)
        bid_EK = top_EK[:, :share] - top_EK[:, share:] + epsilon
        bids_ET = jnp.zeros_like(value_ET).at[expert_E, token_EK[:, :share]].set(bid_EK)
        floor = (turn > 0) & (turn < 100)
        bids_ET = jnp.where(held_ET & floor, jnp.maximum(bids_ET, epsilon), bids_ET)
        high_T, winner_T = bids_ET.max(0), bids_ET.argmax(0)
        held_ET = (winner_T == expert_E) & (high_T > 0)
        cost_T = cost_T + high_T
        value_ET = jnp.where(held_ET & (turn < 100), best, scores.T - cost_T)
        chosen_T = jnp.full(tokens, -1).at[token_EK[:, :share]].set(expert_E)
        return value_ET, cost_T, held_ET, turn + 1, (high_T > 0).all(), chosen_T

    start = (scores.T, jnp.zeros(tokens), jnp.zeros((num_experts, tokens), bool), jnp.int32(0),
             jnp.bool_(False), jnp.full(tokens, -1))  # fmt: skip
    end = lax.while_loop(lambda c: ~c[4] & (c[3] < AUCTION_ROUNDS), one_round, start)
    return end[5], end[3]


@jax.jit
def _ours(scores: jax.Array) -> Any:
    return assignment.solve(scores)


@functools.partial(jax.jit, static_argnames=("epsilon", "num_iters"))
def _sinkhorn(scores: jax.Array, epsilon: float, num_iters: int) -> jax.Array:
    bias = sinkhorn_bias(scores, epsilon=epsilon, num_iters=num_iters)
    return jnp.argmax(scores + bias, axis=1)


def by_ours(scores: np.ndarray) -> Solved:
    result, rounds = jax.block_until_ready(_ours(jnp.asarray(scores)))
    return Solved(np.asarray(result.expert_T), int(rounds), float(result.gap))


def by_auction(scores: np.ndarray) -> Solved:
    expert, rounds = jax.block_until_ready(_auction(jnp.asarray(scores)))
    return Solved(np.asarray(expert), int(rounds), float("nan"))


def by_sinkhorn(epsilon: float, num_iters: int) -> Callable[[np.ndarray], Solved]:
    def run(scores: np.ndarray) -> Solved:
        expert = jax.block_until_ready(_sinkhorn(jnp.asarray(scores), epsilon, num_iters))
        return Solved(np.asarray(expert), num_iters, float("nan"))

    return run


def timed(run: Callable[[np.ndarray], Solved], scores: np.ndarray) -> tuple[float, Solved]:
    start = time.perf_counter()
    solved = run(scores)
    return time.perf_counter() - start, solved


def measure(kind: str, tokens: int, num_experts: int, repeats: int) -> list[dict[str, Any]]:
    """One row per implementation on the same scores."""
    scores = make_scores(kind, tokens, num_experts)
    others: dict[str, Callable[[np.ndarray], Solved]] = {
        "sinkhorn eps=1 x50": by_sinkhorn(1.0, 50),
        "sinkhorn eps=0.1 x50": by_sinkhorn(0.1, 50),
    }
    if scores.size <= AUCTION_SCORES:
        others = {"auction": by_auction, **others}
    if tokens <= SCIPY_TOKENS:
        others = {"scipy": by_scipy, **others}
    ours = by_ours(scores)  # compiles
    optimum: float | None = None
    rows, our_times = [], []
    for impl, run in others.items():
        solved = run(scores)
        if impl == "scipy":
            optimum = _total(scores, solved.expert_T)
        ratios, times = [], []
        for _ in range(repeats):
            our_seconds, _ = timed(by_ours, scores)
            seconds, _ = timed(run, scores)
            our_times.append(our_seconds)
            times.append(seconds)
            ratios.append(seconds / our_seconds)
            if seconds > SLOW_SECONDS:
                break
        rows.append(_row(kind, scores, impl, solved, times, ratios, optimum))
    first = _row(kind, scores, "moejax", ours, our_times, [1.0], optimum)
    return [first, *rows]


def _total(scores: np.ndarray, expert_T: np.ndarray) -> float:
    return float(scores[np.arange(len(scores)), expert_T].astype(np.float64).sum())


def _row(
    kind: str,
    scores: np.ndarray,
    impl: str,
    solved: Solved,
    times: list[float],
    ratios: list[float],
    optimum: float | None,
) -> dict[str, Any]:
    tokens, num_experts = scores.shape
    complete = bool((solved.expert_T >= 0).all())
    load = np.bincount(solved.expert_T[solved.expert_T >= 0], minlength=num_experts)
    unit = tokens * max(float(np.ptp(scores)), 1e-9)
    gap = solved.gap / unit
    if optimum is not None and complete:
        gap = (optimum - _total(scores, solved.expert_T)) / unit
    stopped = impl == "auction" and solved.rounds >= AUCTION_ROUNDS
    return {
        "shape": f"{tokens}x{num_experts}",
        "tokens": tokens,
        "experts": num_experts,
        "kind": kind,
        "impl": impl,
        "seconds": statistics.median(times),
        "over_moejax": statistics.median(ratios),
        "rounds": solved.rounds,
        "gap": None if np.isnan(gap) else gap,
        "imbalance": float(load.max() / (tokens / num_experts) - 1),
        "note": "stopped at the bound on rounds" if stopped else "",
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'shape':>9} {'scores':>10} {'implementation':<20} {'ms':>9} {'/ ours':>8} "
    lines = [head + f"{'rounds':>6} {'gap':>9} {'imbalance':>9}"]
    for row in rows:
        gap = "" if row["gap"] is None else f"{row['gap']:.1e}"
        lines.append(
            f"{row['shape']:>9} {row['kind']:>10} {row['impl']:<20} {1e3 * row['seconds']:>9.1f} "
            f"{row['over_moejax']:>8.2f} {row['rounds']:>6} {gap:>9} {row['imbalance']:>9.3f}"
            f"  {row['note']}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Time over ours, by shape, one panel per kind of scores."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(2.6 * len(kinds) + 1, 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, kind in zip(axes[0], kinds, strict=True):
        for impl, marker in (("scipy", "s"), ("auction", "^"), ("sinkhorn eps=1 x50", "o")):
            points = [r for r in rows if r["kind"] == kind and r["impl"] == impl]
            place = [shapes.index(r["shape"]) for r in points]
            axis.plot(place, [r["over_moejax"] for r in points], marker=marker, label=impl)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=kind, yscale="log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=60)
    axes[0, 0].set_ylabel("time / moejax's solver, ratio")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(min(low, 0.5), max(high, 2.0))  # a factor 2 both ways, whatever was timed
    for axis in axes[0]:
        axis.set_xlabel("tokens x experts")
    axes[0, -1].legend(fontsize="small")
    figure.suptitle("Balanced assignment of T tokens to E experts (TxE): time over moejax's")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shapes(text: str) -> list[tuple[int, int]]:
    pairs = [shape.split("x") for shape in text.split(",")]
    return [(int(tokens), int(num_experts)) for tokens, num_experts in pairs]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--plot", metavar="FILE", help="also a picture")
    parser.add_argument("--shapes", type=_shapes, metavar="TxE,TxE", help="instead of the default")
    parser.add_argument("--kinds", metavar="A,B", help=f"some of {','.join(KINDS)}")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="one tiny shape: is the script alive")
    args = parser.parse_args(argv)
    shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    kinds = args.kinds.split(",") if args.kinds else KINDS
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds: {unknown[0]!r} is unknown; use some of {', '.join(KINDS)}")
    machine = {"cpu": platform.processor() or platform.machine(), "jax": jax.__version__}
    rows: list[dict[str, Any]] = []
    for tokens, num_experts in shapes:
        for kind in kinds:
            new = measure(kind, tokens, num_experts, args.repeats)
            print(table(new), flush=True)
            rows += new
            # After each kind, since the whole takes half an hour and may be stopped.
            Path(args.out).write_text(
                json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
            )
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
