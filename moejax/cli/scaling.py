"""The ``moejax scaling`` command."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.record.files import replaced


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "scaling",
        help="fit the routed scaling law to a sweep or to published curves",
        description="Fits the law of Clark et al. (2022) for the loss of routed models to the runs "
        "of each\nrouter. Prints coefficients with intervals, errors on held-out runs, and the "
        "order of\nthe routers.",
        epilog="Examples:\n"
        "  moejax scaling runs/experts --out=scaling.json\n"
        "  moejax scaling curves.csv.gz --router=S-Base+Hash --figure=law.png\n"
        "  moejax scaling runs/experts --beside=curves.csv.gz --figure=both.png\n\n"
        "docs/scaling.md describes the fit and the rows of a table that it uses.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a sweep's folder, or a table of curves (.csv, .csv.gz)"
    )
    parser.add_argument("--router", metavar="NAME[+NAME]", help="only these routers (default: all)")
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap draws (default 1000)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw runs and laws (.png)")
    parser.add_argument(
        "--beside", metavar="SOURCE", help="another source to draw next to it with --figure"
    )
    parser.set_defaults(run=_scaling, takes_overrides=False)


def _scaling(args: argparse.Namespace) -> int:
    from moejax.contrib.scaling import table
    from moejax.contrib.scaling.runs import read_source
    from moejax.contrib.scaling.study import as_json, make_study

    if args.resamples < 40:
        raise UserError(
            f"--resamples={args.resamples} must be at least 40, for the ends of a 95 % interval"
        )
    if args.beside and not args.figure:
        raise UserError(f"--beside={args.beside} has no effect without --figure=FILE.png")
    out, picture = _new_file("--out", args.out), _new_file("--figure", args.figure)
    if picture and picture.suffix != ".png":
        raise UserError(f"--figure={args.figure} must end in .png")
    beside = read_source(args.beside) if args.beside else None
    routers = args.router.split("+") if args.router else ()
    study = make_study(read_source(args.source), routers, args.resamples)
    drawn = None
    if picture:
        from moejax.contrib.scaling import figure

        drawn = figure.beside(study, beside) if beside else figure.figure(study)
    print(table.render(study))
    if out:
        content = json.dumps(as_json(study), indent=1, allow_nan=False)
        _replace(out, lambda path: path.write_text(content + "\n"))
    if picture and drawn:
        _replace(picture, lambda path: drawn.savefig(path, format="png"))
    return 0


def _new_file(flag: str, text: str | None) -> Path | None:
    """The file that a flag names, checked before the work: its folder must exist."""
    if text is None:
        return None
    path = Path(os.path.expanduser(text))
    if not text or path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag}={text} must name a file in a folder that exists")
    return path


def _replace(path: Path, write: Any) -> None:
    """Writes a file atomically."""
    with replaced(path) as temporary:
        write(temporary)
