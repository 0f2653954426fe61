"""The ``moejax profile`` command."""

import argparse
from typing import Any

from moejax.config.flags import CONFIG_HELP, OVERRIDES
from moejax.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="profile the time of a training step",
        description="Trains a few steps under the profiler. Prints a table of the parts of a step "
        "and\nwrites a trace for Perfetto and TensorBoard.",
        epilog="Example:\n"
        "  moejax profile --config=configs/lm.py:gate=switch --steps=5 --out=runs/profile\n\n"
        f"docs/profile.md explains the table.\n\n{OVERRIDES}",
    )
    parser.add_argument("--config", required=True, metavar="SOURCE", help=CONFIG_HELP)
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="number of traced steps (default 5)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the trace")
    parser.set_defaults(run=_profile, takes_overrides=True)


def _profile(args: argparse.Namespace) -> int:
    from moejax.config import load, validate

    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be at least 1")
    loaded = load(args.config, args.overrides)
    validate(loaded.config)

    from moejax.train.profile import trace

    return trace.run(loaded.config, args.steps, args.out)
