"""The ``moejax data`` command."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from moejax.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="train a tokenizer or tokenise text",
        description="Prepares text for data.tokenizer and data.path. Both are optional: without a "
        "tokenizer\ntext is read as bytes, and without data.path the built-in corpus is used.",
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
        "--tokenizer",
        default="",
        metavar="PATH",
        help="a tokenizer.json, a folder with one, or a SentencePiece file (default: bytes)",
    )
    prepare.add_argument(
        "--bos",
        default="auto",
        choices=("auto", "none"),
        help="auto: documents begin with the token that the tokenizer puts before a text",
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="the new folder of shards")
    prepare.set_defaults(run=_prepare, takes_overrides=False)
    for action in (tokenizer, prepare):
        action.add_argument(
            "--path", default="", metavar="PATH", help="file or folder (default: built-in corpus)"
        )
        action.add_argument(
            "--eval-fraction",
            default=0.05,
            type=float,
            metavar="X",
            help="share of the bytes held out (default 0.05)",
        )
        action.add_argument(
            "--eval-path", default="", metavar="PATH", help="a separate held-out text"
        )
        parser.flags += action.flags


def _tokenizer(args: argparse.Namespace) -> int:
    from moejax.data.census import Census
    from moejax.data.tokenizer import train_bpe

    _check_out(args)
    census = Census()
    size = train_bpe(
        args.path,
        args.vocab_size,
        args.out,
        eval_fraction=args.eval_fraction,
        eval_path=args.eval_path,
        census=census,
    )
    _warn(census.warning())
    print(f"{args.out}: {size} tokens; use it with --config.data.tokenizer={args.out}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from moejax.data.prepare import prepare
    from moejax.tasks.language.source import FEW, few_held_out

    _check_out(args)
    index = prepare(
        args.path, args.tokenizer, args.out, args.eval_fraction, args.eval_path, args.bos
    )
    for field, value in dataclasses.asdict(index).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in parts:
            print(f"{f'{field}.{name}' if name else field:<24} {part}")
    _warn(index.facts["warning"])
    if index.heldout_tokens < FEW:
        _warn(few_held_out(index.heldout_tokens))
    print(f"use it with --config.data.path={args.out}")
    return 0


def _warn(line: str) -> None:
    if line:
        print(f"moejax: warning: {line}", file=sys.stderr)


def _check_out(args: argparse.Namespace) -> None:
    """Refuse an output inside the folder of texts, where it would count as text."""
    out = Path(os.path.expanduser(args.out)).resolve()
    for flag, name in (("--path", args.path), ("--eval-path", args.eval_path)):
        path = Path(os.path.expanduser(name)).resolve()
        if name and path.is_dir() and out.is_relative_to(path):
            raise UserError(f"--out={args.out} lies in {flag}={name}; write it somewhere else")
