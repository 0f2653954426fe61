"""The ``moejax config`` command."""

import argparse
import os
from typing import Any

from moejax.config.flags import CONFIG_HELP, OVERRIDES, WORKDIR


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "config",
        help="show a resolved config",
        description="Prints every field with value, type and meaning, marks differences from the "
        "page and\nthe defaults, and checks the config. Without a config it prints the defaults.",
        epilog="Examples:\n"
        "  moejax config\n"
        "  moejax config --config=configs/lm.py:gate=switch --config.train.steps=500 --diff\n"
        "  moejax config --workdir=runs/switch\n\n"
        f"{OVERRIDES}",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="SOURCE", help=CONFIG_HELP)
    source.add_argument("--workdir", **WORKDIR, help="the config of a run")
    parser.add_argument(
        "--diff", action="store_true", help="only fields that are not at their defaults"
    )
    parser.flags += ["--config", "--workdir"]
    parser.set_defaults(run=_config, takes_overrides=True)


def _config(args: argparse.Namespace) -> int:
    from moejax import config as configs
    from moejax.cli.show import config_diff, config_tree
    from moejax.config.overrides import apply_overrides

    source = args.config
    if args.workdir:
        source = os.path.join(args.workdir, "config.json")
    if source:
        loaded = configs.load(source, args.overrides)
    else:
        resolved = configs.default()
        apply_overrides(resolved, args.overrides)
        loaded = configs.Loaded(resolved, configs.default(), "", tuple(args.overrides))
    print(config_diff(loaded) if args.diff else config_tree(loaded))
    mark = configs.validate(loaded.config).mark
    if mark:
        print(f"\nA token may see more than its past: {mark}")
    return 0
