"""The flags of ``moejax report RUN --openmoe``. Imports nothing slow."""

import argparse

from moejax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the report's command that belong to ``--openmoe``."""
    parser.add_argument(
        "--openmoe",
        action="store_true",
        help="of a run: also evaluate a checkpoint for OpenMoE's three findings (takes minutes)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="with --openmoe: sequences of each text (default 256)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="with --openmoe: another text, out of domain; may be given again",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --openmoe: checkpoint (default: the newest)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect.

    Raises:
      UserError: one of them without ``--openmoe``.
    """
    for flag in ("rows", "data", "step"):
        if getattr(args, flag) not in (None, []) and not args.openmoe:
            raise UserError(f"--{flag} has no effect without --openmoe")
