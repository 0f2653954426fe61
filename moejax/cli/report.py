"""The ``moejax report`` command."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from moejax.contrib.openmoe import flags as openmoe
from moejax.errors import UserError

FAILED = 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="a run or a sweep as an HTML page, or several compared",
        description="Writes one HTML file about a run or a sweep: curves, load and drops of "
        "experts, cost,\nwarnings, and the comparison of a sweep's variants. With several runs, or "
        "several sweeps, the\nfile compares them: curves, final values, costs, and differences of "
        "their configs.\nThe file needs no network. Runs that are running, were killed or failed "
        "are shown as far as\nthey got.",
        epilog="Examples:\n"
        "  moejax report runs/switch\n"
        "  moejax report runs/gating -o gating.html\n"
        "  moejax report runs/switch runs/mixtral -o both.html\n"
        "  moejax report runs/ec --measure-leak=32\n"
        "  moejax report runs/a --openmoe --data=other/text\n\n"
        "docs/report.md explains every page.",
    )
    parser.add_argument(
        "folders",
        metavar="RUN_OR_SWEEP",
        nargs="+",
        help="a run's workdir, or a sweep's; several to compare them",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="default: report.html in the folder; compare-NAME.html in the first of several",
    )
    parser.add_argument(
        "--measure-leak",
        nargs="?",
        type=int,
        const=8,
        metavar="N",
        help="for a run: also evaluate its newest checkpoint with and without later tokens, on N "
        "sequences (default 8; takes seq_len forward passes)",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the rows as TensorBoard events, to tensorboard/ in each workdir",
    )
    openmoe.add_flags(parser)
    parser.set_defaults(run=_report, takes_overrides=False)


def _report(args: argparse.Namespace) -> int:
    from moejax.analysis import report, tensorboard
    from moejax.contrib.openmoe import report as findings
    from moejax.train.metrics.rows import Divergence

    folder, *others = (Path(os.path.expanduser(name)) for name in args.folders)
    if others:
        return _compare([folder, *others], args)
    target = Path(os.path.expanduser(args.output)) if args.output else folder / "report.html"
    if args.measure_leak is not None and args.measure_leak < 1:
        raise UserError(f"--measure-leak={args.measure_leak} must be a number of sequences")
    openmoe.check(args)
    data = report.read(folder)
    check_target(target)
    if args.measure_leak:
        try:
            data = report.with_leak(data, args.measure_leak)
        except Divergence as problem:
            print(f"moejax: the evaluation is not finite at {problem}", file=sys.stderr)
            return FAILED
    lines = tensorboard.export(data) if args.tensorboard else []
    more = findings.pages(data, args, target.parent, print)
    size = report.write(data, target, more)
    print("\n".join([f"{target}  {size / 1e6:.1f} MB", *lines]))
    return 0


def _compare(folders: list[Path], args: argparse.Namespace) -> int:
    from moejax.analysis import report
    from moejax.analysis.several import beside

    for flag, value in (
        ("--measure-leak", args.measure_leak),
        ("--tensorboard", args.tensorboard),
        ("--openmoe", args.openmoe),
    ):
        if value:
            raise UserError(f"{flag} works on one folder, and {len(folders)} are named; remove it")
    openmoe.check(args)
    several = beside([report.read(folder) for folder in folders])
    name = f"compare-{'-'.join(folder.resolve().name for folder in folders[1:])}.html"
    target = Path(args.output).expanduser() if args.output else folders[0] / name
    check_target(target)
    size = report.write(several, target)
    print(f"{target}  {size / 1e6:.1f} MB")
    return 0


def check_target(target: Path) -> None:
    """Refuse an output that cannot be written, before anything is computed.

    Raises:
      UserError: it is a folder, or its own cannot be written to.
    """
    parent = target.absolute().parent
    if target.is_dir():
        raise UserError(f"--output={target} is a folder; name a file, such as {target}/report.html")
    if not parent.is_dir():
        what = "is no folder" if parent.exists() else "does not exist"
        raise UserError(f"--output={target}: {parent} {what}; name another file with -o")
    if not os.access(target if target.exists() else parent, os.W_OK):
        raise UserError(f"--output={target} cannot be written to; name another file with -o")
