"""The ``moejax sweep`` command."""

import argparse
from typing import Any


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="run an experiment: many runs, one table",
        description="Trains every variant of an experiment with every seed, one after the other, "
        "each in a\nprocess of its own; then prints a table and writes results.csv and sweep.png. "
        "The same\ncommand again runs what is missing or unfinished. Exit status: 0 all trials are "
        "finished,\n1 some failed, 2 a mistake (nothing was started), 75 stopped by a signal after "
        "saving.",
        epilog="Examples:\n"
        "  moejax sweep --experiment=experiments/gating_smoke.py --workdir=runs/gating\n"
        "  moejax sweep --experiment=experiments/gating_smoke.py:seeds=3,steps=500 "
        "--workdir=runs/b\n\n"
        "An experiment is a config page with a function sweep(): see docs/sweeps.md.",
    )
    parser.add_argument(
        "--experiment",
        required=True,
        metavar="SOURCE",
        help="path.py[:arg] or package.module[:arg]; arg is key=value,key=value",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the sweep's folder, new or to go on with"
    )
    parser.set_defaults(run=_sweep, takes_overrides=False)


def _sweep(args: argparse.Namespace) -> int:
    from pathlib import Path

    from moejax.sweep.definition import expand

    sweep, folder = expand(args.experiment), Path(args.workdir)

    from moejax.sweep import runner

    return runner.run(sweep, folder)
