"""The ``moejax convert`` command."""

import argparse
import json
from typing import Any

from moejax.config.flags import OVERRIDES, WORKDIR
from moejax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="bring in a Hugging Face model, or write one",
        description="Makes a workdir from the folder of a Hugging Face model (--from-hf), or "
        "writes a run's\ncheckpoint as such a folder (--to-hf), which transformers loads. Neither "
        "needs torch.\nTokenizer files come along. docs/convert.md lists the families.",
        epilog="Examples:\n"
        "  moejax convert --from-hf=OLMoE-1B-7B --workdir=runs/olmoe\n"
        "  moejax generate --workdir=runs/olmoe --prompt='Bitcoin is'\n"
        "  moejax train --config=runs/olmoe --config.train.init_from=runs/olmoe \\\n"
        "    --config.optim.name=adamw --config.train.steps=50 --workdir=runs/tuned\n"
        "  moejax convert --to-hf=runs/tuned --out=tuned-hf --dtype=bfloat16\n\n"
        f"{OVERRIDES}",
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from-hf", metavar="FOLDER", help="a Hugging Face model: the folder")
    way.add_argument("--to-hf", metavar="WORKDIR", help="a run to write as a Hugging Face model")
    parser.flags += ["--from-hf", "--to-hf"]
    parser.add_argument("--workdir", **WORKDIR, help="with --from-hf: the new run's folder")
    parser.add_argument("--out", metavar="FOLDER", help="with --to-hf: the new folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype", default="", choices=DTYPES, help="with --to-hf: type of the weights"
    )
    parser.add_argument("--json", action="store_true", help="the summary as JSON on a line")
    parser.set_defaults(run=_convert, takes_overrides=True)


def _convert(args: argparse.Namespace) -> int:
    for flag, value in (("--from-hf", args.from_hf), ("--to-hf", args.to_hf)):
        if value == "":
            raise UserError(f"{flag}= is empty; name a folder")
    if args.from_hf is not None:
        summary = _import(args)
    else:
        summary = _export(args)
    if args.json:
        print(json.dumps(summary))
    return 0


def _import(args: argparse.Namespace) -> dict[str, Any]:
    for flag, value in (("--out", args.out), ("--step", args.step), ("--dtype", args.dtype)):
        if value not in (None, ""):
            raise UserError(f"{flag}={value} belongs to --to-hf; leave it out with --from-hf")
    if not args.workdir:
        raise UserError("--from-hf needs --workdir=FOLDER, the new run's folder")

    from moejax.hf.imported import import_model

    summary = import_model(args.from_hf, args.workdir, args.overrides)
    if not args.json:
        counts = summary["parameters"]
        print(
            f"{args.workdir}: {summary['family']}, {counts['total']:,} parameters "
            f"({counts['active']:,} active per token)"
        )
    return summary


def _export(args: argparse.Namespace) -> dict[str, Any]:
    if args.workdir:
        raise UserError(f"--workdir={args.workdir} belongs to --from-hf; --to-hf names the workdir")
    if not args.out:
        raise UserError("--to-hf needs --out=FOLDER, the folder to write")
    if args.overrides:
        raise UserError(f"--to-hf takes the run's own config, so {args.overrides[0]} has no effect")

    from moejax.hf.exported import export_model

    summary = export_model(args.to_hf, args.out, args.step, args.dtype)
    if not args.json:
        print(f"{args.out}: {summary['family']}, {summary['dtype']}, step {summary['step']}")
    return summary
