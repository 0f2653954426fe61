"""DSelect-k against other gates: protocols P1 to P5, inspired by Hazimeh et al., arXiv 2106.03760.

    python -m experiments.dselect_k.run --out runs/dselect_k.json [--only p1,p4] [--quick]

Prints a table per protocol; the JSON has every seed's numbers. README.md in this folder says what
the protocols are and what came out.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.dselect_k import learned, picture, recovery, smoothness, tasks
from experiments.dselect_k.rows import Row, head, line, ratio, tuned
from moejax.errors import UserError


class Size(NamedTuple):
    seeds: int
    epochs: int
    less: Mapping[str, Any] = MappingProxyType({})
    """Arguments that leave out gates or problems."""


FULL = {
    "p1": Size(20, 100), "p2": Size(3, 30), "p3": Size(3, 30), "p4": Size(20, 0),
    "p5": Size(20, 100),
}  # fmt: skip
QUICK = {
    "p1": Size(8, 1, {"gammas": (1.0,)}),
    "p2": Size(2, 1, {"gammas": (1.0,)}),
    "p3": Size(2, 1, {"num_tasks": (4,), "gammas": (1.0,)}),
    "p4": Size(2, 0, {"points": (201, 401)}),
    "p5": Size(2, 1, {"sizes": (5,)}),
}


class Protocol(NamedTuple):
    rows: Callable[..., Iterator[Row]]
    title: str
    columns: tuple[str, ...]


GATE = ("gate", "start", "gamma", "lambda", "lr")
PATH = ("test_mse", "total_variation", "support_changes", "nonzero", "visible")
PROTOCOLS = {
    "p1": Protocol(
        recovery.p1, "recovery, experts frozen at the truth",
        (*GATE, "exact", "jaccard", *PATH, "steps_to_final"),
    ),
    "p2": Protocol(learned.p2, "experts learned too", (*GATE, *PATH)),
    "p3": Protocol(
        tasks.p3, "many tasks in two halves",
        ("tasks", "gate", "gamma", "lambda", "test_mse", "jaccard_within", "jaccard_across",
         "nonzero", "visible", "total_variation"),
    ),
    "p4": Protocol(
        smoothness.p4, "largest jumps along random lines",
        ("gate", "gamma", "points", "jump_of_loss", "jump_of_slope"),
    ),
    "p5": Protocol(
        recovery.p5, "E is no power of two",
        ("E", "penalty", "lr", "missing_mass", "nonzero", "exact", "test_mse", "total_variation"),
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--plot", metavar="FILE", help="also a picture of weights over steps")
    parser.add_argument("--only", metavar="P1,P4", help=f"some of {','.join(PROTOCOLS)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="instead of a protocol's own number")
    parser.add_argument(
        "--quick", action="store_true", help="little of everything: is the script alive"
    )
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(_complain(parser, error))


def _complain(parser: argparse.ArgumentParser, error: UserError) -> int:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> None:
    """Writes after every protocol, since the whole takes long and may be stopped."""
    names, sizes, out = _checked(args)
    found: dict[str, Any] = {}
    for name in names:
        protocol, size = PROTOCOLS[name], sizes[name]
        title = f"{name.upper()}: {protocol.title}; {size.seeds} seeds, {size.epochs} epochs"
        rows = protocol.rows(size.seeds, size.epochs, **size.less)
        part = {"seeds": size.seeds, "epochs": size.epochs}
        found[name] = {**part, "rows": _printed(title, rows, protocol.columns)}
        if name == "p1":
            found[name] |= _compared(found[name]["rows"])
        out.write_text(json.dumps(found) + "\n")
    if args.plot:
        picture.draw(args.plot, sizes["p1"].epochs)


def _printed(title: str, rows: Iterable[Row], columns: Sequence[str]) -> list[Row]:
    print(f"\n{title}\n{head(columns)}", flush=True)
    found = []
    for row in rows:
        print(line(row, columns), flush=True)
        found.append(row)
    return found


def _checked(args: argparse.Namespace) -> tuple[list[str], dict[str, Size], Path]:
    names = args.only.lower().split(",") if args.only else list(PROTOCOLS)
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"--only={name} is unknown; use some of {','.join(PROTOCOLS)}")
    if args.seeds is not None and args.seeds < 8:
        raise UserError(f"--seeds={args.seeds} must be at least 8: of few there are no halves")
    for field, path in (("out", args.out), ("plot", args.plot)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{field}={path}: make its folder first")
    sizes = QUICK if args.quick else FULL
    if args.seeds is not None:
        sizes = {name: size._replace(seeds=args.seeds) for name, size in sizes.items()}
    return names, sizes, Path(args.out)


def _compared(rows: list[Row]) -> dict[str, list[Row]]:
    """Settings chosen on even seeds, judged on odd ones; how much calmer than top-k, by rate."""
    trained = [row for row in rows if "lr" in row]
    return {
        "tuned": _printed(
            "Each gate's best setting of the even seeds, on the odd ones",
            tuned(trained), PROTOCOLS["p1"].columns,
        ),
        "calmer": _printed(
            "Total variation of top-k over that of DSelect-k with lambda 0",
            _calmer(trained), ("start", "gamma", "lr", "ratio"),
        ),
    }  # fmt: skip


def _calmer(trained: list[Row]) -> Iterator[Row]:
    for top in (row for row in trained if row["gate"] == "top_k"):
        for row in trained:
            if row["gate"] == "dselect_k" and row["lambda"] == 0 and row["lr"] == top["lr"]:
                labels = {"start": top["start"], "gamma": row["gamma"], "lr": row["lr"]}
                yield {**labels, "ratio": ratio(top, row, "total_variation")}


if __name__ == "__main__":
    main()
