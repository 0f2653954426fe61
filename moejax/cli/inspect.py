"""The ``moejax inspect`` command."""

import argparse
import json
from pathlib import Path
from typing import Any

from moejax.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="describe the parameters of a model",
        description="Describes the newest checkpoint of a workdir: parameters in all and per "
        "token, by part,\ntypes, norms of the routers' rows and similarity of experts (cosines of "
        "their weights),\nby layer. Nothing is loaded whole: weights are read in blocks.",
        epilog="Examples:\n"
        "  moejax inspect runs/switch\n"
        "  moejax inspect runs/switch --arrays --no-weights\n"
        "  moejax inspect runs/switch --json | jq .parameters",
    )
    parser.add_argument("path", metavar="PATH", help="a run's workdir")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument("--arrays", action="store_true", help="list every array with its shape")
    parser.add_argument(
        "--no-weights", action="store_true", help="read no weights: no norms, no similarity"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON on a line")
    parser.set_defaults(run=_inspect, takes_overrides=False)


def _inspect(args: argparse.Namespace) -> int:
    from moejax.inspection.report import describe
    from moejax.inspection.workdir import open_workdir
    from moejax.job.launch import use_host_only

    use_host_only()
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{args.path} is not a folder; name the workdir of a run")
    if args.step is not None and args.step < 0:
        raise UserError(f"--step={args.step} must be the number of a checkpoint, 0 or more")
    found = describe(open_workdir(folder, args.step), weights_too=not args.no_weights)
    print(json.dumps(found.json()) if args.json else "\n".join(found.lines(args.arrays)))
    return 0
