"""The ``moejax sweep`` command."""

import argparse
from typing import Any

from moejax.config.flags import workdir
from moejax.errors import UserError

STATUS = "status"


def add_command(commands: Any) -> None:
    from moejax.sweep.launch import LAUNCHERS

    parser = commands.add_parser(
        "sweep",
        help="run an experiment: many runs, one table",
        usage="moejax sweep --experiment=SOURCE --workdir=DIR [options]\n"
        "       moejax sweep status --workdir=DIR",
        description="Trains every variant of an experiment with every seed, each in its own "
        "process,\nthen prints a table and writes results.csv and sweep.png. Run the same command "
        "again\nto resume: it runs what is missing or unfinished. Exit status: 0 all chosen "
        "trials are\nfinished, 1 some failed, 2 a mistake (nothing was started), 75 stopped by a "
        "signal after\nsaving.\n"
        "\n`moejax sweep status` prints the state of every trial, even while the sweep runs.",
        epilog="Examples:\n"
        "  moejax sweep --experiment=experiments/gating --workdir=runs/gating\n"
        "  moejax sweep --experiment=experiments/gating_smoke.py:seeds=3,steps=500 "
        "--workdir=runs/b\n"
        "  moejax sweep --experiment=experiments/gating_smoke.py --workdir=runs/gating "
        "--filter='*-seed0'\n"
        "  moejax sweep status --workdir=runs/gating\n\n"
        "An experiment is a config page with a function sweep(): see docs/sweeps.md.",
    )
    parser.add_argument(
        "action", nargs="?", choices=(STATUS,), metavar=STATUS, help="show the state of every trial"
    )
    parser.add_argument(
        "--experiment",
        metavar="SOURCE",
        help="path.py[:arg], a folder with a sweep.py, or package.module[:arg]; arg is "
        "key=value,key=value",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="the sweep's folder, new or to resume"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="trials at once (default: 1; on a cluster, as many as it has room for)",
    )
    parser.add_argument(
        "--filter",
        metavar="GLOB[,GLOB]",
        help="only trials whose name (VARIANT-seedN) matches",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would run and create nothing"
    )
    parser.add_argument(
        "--launcher",
        choices=tuple(LAUNCHERS),
        help=f"where trials run: {', '.join(LAUNCHERS)} (default: local)",
    )
    parser.add_argument(
        "--launcher-option",
        action="append",
        metavar="KEY=VALUE",
        help="a setting of the launcher; may be repeated",
    )
    parser.set_defaults(run=_sweep, takes_overrides=False)


def _sweep(args: argparse.Namespace) -> int:
    from pathlib import Path

    folder = Path(workdir(args.workdir))
    if args.action == STATUS:
        _check_alone(args)
        from moejax.sweep import status

        status.show(folder)
        return 0
    if not args.experiment:
        raise UserError("the sweep needs --experiment=SOURCE (see `moejax sweep --help`)")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    options = _options(args.launcher_option or [])

    from moejax.sweep.definition import expand

    sweep = expand(args.experiment)

    from moejax.sweep import runner

    execution = runner.Execution(args.jobs, args.filter or "", args.launcher or "local", options)
    if args.dry_run:
        runner.dry_run(sweep, folder, execution)
        return 0
    return runner.run(sweep, folder, execution)


def _check_alone(args: argparse.Namespace) -> None:
    """Raise UserError for options of a sweep that `status` would ignore."""
    for name in ("experiment", "jobs", "filter", "dry_run", "launcher", "launcher_option"):
        if getattr(args, name) not in (None, False):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"`moejax sweep status` takes --workdir only; remove {flag}")


def _options(words: list[str]) -> dict[str, str]:
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"--launcher-option={word} must be KEY=VALUE")
        if key in options:
            raise UserError(f"--launcher-option={word}: {key} is given twice")
        options[key] = value
    return options
