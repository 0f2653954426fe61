"""The ``moejax train`` command."""

import argparse
from typing import Any

from moejax.config.flags import CONFIG_HELP, OVERRIDES, WORKDIR
from moejax.train.signals import stopping


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model or resume a run",
        description="Trains the model that a config describes. Run the same command again in the "
        "same\nworkdir to resume from the last checkpoint; a finished run is left alone.",
        epilog="Examples:\n"
        "  moejax train --config=configs/lm.py:gate=switch --workdir=runs/switch\n"
        "  moejax train --config=configs/lm.py:size=debug --config.train.steps=20 --workdir=runs/a"
        f"\n\n{OVERRIDES}",
    )
    parser.add_argument("--config", required=True, metavar="SOURCE", help=CONFIG_HELP)
    parser.add_argument(
        "--workdir", required=True, **WORKDIR, help="where checkpoints and metrics are written"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start again at step 0 if checkpoints of the run were lost",
    )
    parser.set_defaults(run=_train, takes_overrides=True)


def _train(args: argparse.Namespace) -> int:
    with stopping():  # the imports and reads below take seconds
        from moejax.config import load, validate

        loaded = load(args.config, args.overrides)
        validate(loaded.config)

        from moejax.train import loop

        return loop.run(
            loaded.config, args.workdir, loaded.source, loaded.overrides, restart=args.restart
        )
