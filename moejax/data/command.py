"""The ``moejax data`` command."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from moejax.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="train a tokenizer, tokenise text once",
        description="Prepares text for data.tokenizer and data.path. Neither is needed: without "
        "them\ntext is read as bytes, and without data.path the built-in corpus is used.",
        epilog="Examples:\n"
        "  moejax data tokenizer --path=books/ --vocab-size=8192 --out=bpe.json\n"
        "  moejax data prepare --path=books/ --tokenizer=bpe.json --out=shards/\n"
        "  moejax train --config=configs/lm.py --config.data.path=shards/ --workdir=runs/books",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    tokenizer = actions.add_parser("tokenizer", help="train a byte-level BPE tokenizer")
    tokenizer.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens, at least 257"
    )
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    tokenizer.set_defaults(run=_tokenizer, takes_overrides=False)
    prepare = actions.add_parser("prepare", help="tokenise text into shards, once")
    prepare.add_argument(
        "--tokenizer", default="", metavar="FILE", help="a tokenizer JSON file (default: bytes)"
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="the new folder of shards")
    prepare.set_defaults(run=_prepare, takes_overrides=False)
    for action in (tokenizer, prepare):
        action.add_argument(
            "--path", default="", metavar="PATH", help="file or folder (default: built-in corpus)"
        )
        action.add_argument(
            "--eval-fraction", default=0.05, type=float, metavar="X", help="held out (default 0.05)"
        )
        parser.flags += action.flags


def _tokenizer(args: argparse.Namespace) -> int:
    from moejax.data.tokenizer import train_bpe

    _check_out(args)
    size = train_bpe(args.path, args.vocab_size, args.out, eval_fraction=args.eval_fraction)
    print(f"{args.out}: {size} tokens; use it with --config.data.tokenizer={args.out}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from moejax.data.prepare import prepare

    _check_out(args)
    index = prepare(args.path, args.tokenizer, args.out, args.eval_fraction)
    for field, value in dataclasses.asdict(index).items():
        print(f"{field:<24} {value}")
    print(f"use it with --config.data.path={args.out}")
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """What is written into the folder of texts would be text itself from then on."""
    path, out = (Path(os.path.expanduser(name)).resolve() for name in (args.path, args.out))
    if args.path and path.is_dir() and out.is_relative_to(path):
        raise UserError(f"--out={args.out} lies in --path={args.path}; write it somewhere else")
