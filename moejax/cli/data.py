"""The ``moejax data`` command."""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

from moejax.errors import UserError

SMALL = 16 << 20
"""Bytes of input that are read so fast that nobody needs to watch."""


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
    prepare.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes (default: one for each processor)",
    )
    prepare.add_argument(
        "--licence", default="", metavar="TEXT", help="a note on the licence, for index.json"
    )
    prepare.add_argument(
        "--keep-duplicates", action="store_true", help="keep exact copies of documents"
    )
    prepare.set_defaults(run=_prepare, takes_overrides=False)
    for action in (tokenizer, prepare):
        action.add_argument(
            "--path",
            default="",
            metavar="PATH",
            help="files, folders or globs, with commas between (default: built-in corpus)",
        )
        _add_reading(action)
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


def _add_reading(action: Any) -> None:
    """The flags about records: as the config's fields of the same names."""
    action.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field or column of a record that holds its text (default: text)",
    )
    action.add_argument(
        "--on-error",
        default="fail",
        choices=("fail", "skip"),
        help="what to do about a record that cannot be read (default: fail)",
    )


def _tokenizer(args: argparse.Namespace) -> int:
    from moejax.data.census import Census
    from moejax.data.tokenizers.bpe import train_bpe

    _check_out(args)
    census = Census()
    size = train_bpe(
        args.path,
        args.vocab_size,
        args.out,
        eval_fraction=args.eval_fraction,
        eval_path=args.eval_path,
        census=census,
        text_field=args.text_field,
        on_error=args.on_error,
    )
    _warn(census.warning())
    print(f"{args.out}: {size} tokens; use it with --config.data.tokenizer={args.out}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from moejax.data.corpus import Facts
    from moejax.data.prepare import prepare
    from moejax.tasks.language.remarks import FEW, few_held_out, reading_warnings

    _check_out(args)
    index = prepare(
        args.path,
        args.tokenizer,
        args.out,
        args.eval_fraction,
        args.eval_path,
        workers=args.workers or os.cpu_count() or 1,
        licence=args.licence,
        progress=_Progress(),
        text_field=args.text_field,
        bos=args.bos,
        duplicates="keep" if args.keep_duplicates else "drop",
        on_error=args.on_error,
    )
    for field, value in dataclasses.asdict(index).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, part in parts:
            print(f"{f'{field}.{name}' if name else field:<24} {part}")
    for line in reading_warnings(Facts(**index.facts)):
        _warn(line)
    if index.heldout_tokens < FEW:
        _warn(few_held_out(index.heldout_tokens))
    print(f"use it with --config.data.path={args.out}")
    return 0


class _Progress:
    """Reports on the terminal, or a line for every tenth where there is none."""

    def __init__(self) -> None:
        self._start, self._told = time.monotonic(), 0

    def __call__(self, done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        tenth = 10 * done // max(total, 1)
        seconds = time.monotonic() - self._start
        if total < SMALL or not (terminal or tenth > self._told):
            return
        self._told = tenth
        line = (
            f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB read, "
            f"{done / 2**20 / max(seconds, 1e-3):.0f} MiB/s"
        )
        end = "\n" if not terminal or done == total else "\r"
        print(f"{line:<60}", end=end, file=sys.stderr, flush=True)


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
