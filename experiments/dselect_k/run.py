"""DSelect-k against other gates: protocols P1 to P5, inspired by Hazimeh et al., arXiv 2106.03760.

    python -m experiments.dselect_k.run --out runs/dselect_k.json [--only p1,p4] [--quick]

Prints a table per protocol; the JSON has every seed's numbers. README.md in this folder says what
the protocols are and what came out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments.dselect_k import learned, picture, recovery, smoothness, tasks
from experiments.dselect_k.rows import Row, ratio, table, tuned
from moejax.errors import UserError


class Size(NamedTuple):
    seeds: int
    epochs: int
    """0 where nothing is trained; then seeds are lines."""


FULL = {"p1": Size(20, 100), "p2": Size(5, 40), "p3": Size(3, 30), "p4": Size(20, 0),
        "p5": Size(20, 100)}  # fmt: skip
QUICK = {"p1": Size(2, 1), "p2": Size(2, 1), "p3": Size(2, 1), "p4": Size(2, 0), "p5": Size(2, 1)}

PROTOCOLS = {
    "p1": (recovery.p1, "recovery, experts frozen at the truth", (
        "exact", "jaccard", "test_mse", "total_variation", "support_changes", "nonzero", "visible",
        "steps_to_final")),
    "p2": (learned.p2, "experts learned too", (
        "test_mse", "total_variation", "support_changes", "nonzero", "visible")),
    "p3": (tasks.p3, "many tasks in two halves", (
        "test_mse", "jaccard_within", "jaccard_across", "nonzero", "visible", "total_variation")),
    "p4": (lambda lines, _: smoothness.p4(lines), "largest jumps along random lines", (
        "jump_of_loss", "jump_of_slope")),
    "p5": (recovery.p5, "E is no power of two", (
        "missing_mass", "nonzero", "exact", "test_mse", "total_variation")),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--plot", metavar="FILE", help="also a picture of weights over steps")
    parser.add_argument("--only", metavar="P1,P4", help=f"some of {','.join(PROTOCOLS)}")
    parser.add_argument("--seeds", type=int, metavar="N", help="instead of a protocol's own number")
    parser.add_argument("--quick", action="store_true", help="one epoch: is the script alive")
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
        function, title, measures = PROTOCOLS[name]
        size = sizes[name]
        print(f"\n{name.upper()}: {title}; {size.seeds} seeds, {size.epochs} epochs", flush=True)
        rows = list(function(*size))
        print(table(rows, measures), flush=True)
        found[name] = {"seeds": size.seeds, "epochs": size.epochs, "rows": rows}
        if name == "p1":
            found[name] |= _compared(rows, measures)
        out.write_text(json.dumps(found) + "\n")
    if args.plot:
        picture.draw(args.plot, sizes["p1"].epochs)


def _checked(args: argparse.Namespace) -> tuple[list[str], dict[str, Size], Path]:
    names = args.only.lower().split(",") if args.only else list(PROTOCOLS)
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"--only={name} is unknown; use some of {','.join(PROTOCOLS)}")
    if args.seeds is not None and args.seeds < 4:
        raise UserError(f"--seeds={args.seeds} must be at least 4: two choose settings, two judge")
    for field, path in (("out", args.out), ("plot", args.plot)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{field}={path}: make its folder first")
    sizes = QUICK if args.quick else FULL
    if args.seeds is not None:
        sizes = {name: size._replace(seeds=args.seeds) for name, size in sizes.items()}
    return names, sizes, Path(args.out)


def _compared(rows: list[Row], measures: tuple[str, ...]) -> dict[str, Any]:
    """Settings chosen on even seeds, judged on odd ones; how much calmer than top-k, by rate."""
    trained = [row for row in rows if "lr" in row]
    found: dict[str, Any] = {"tuned": tuned(trained), "calmer": []}
    print("\nEach gate's best setting of the even seeds, on the odd ones")
    print(table(found["tuned"], measures))
    print("\nTotal variation of top-k over that of DSelect-k with lambda 0")
    for top in (row for row in trained if row["gate"] == "top_k"):
        for row in trained:
            if row["gate"] == "dselect_k" and row["lambda"] == 0 and row["lr"] == top["lr"]:
                labels = {"start": top["start"], "gamma": row["gamma"], "lr": row["lr"]}
                found["calmer"].append({**labels, "ratio": ratio(top, row, "total_variation")})
    print(table(found["calmer"], ("ratio",)), flush=True)
    return found


if __name__ == "__main__":
    main()
