"""The ``moejax data`` command."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from moejax.errors import UserError

SMALL = 16 << 20
"""Bytes of input that are read so fast that nobody needs to watch."""


INSPECTED = """Keys of the JSON:
  path, kind             what was looked at; text, prepared shards or token arrays
  name, tokenizer        name of the data, and of the tokenizer that counts
  files, formats         files that are read, and their number by format
  documents              documents that are not empty; null where their ends are not known
  bytes, tokens          of their text, without separators; bytes are null where not known
  empty, bad, first_bad  empty documents, records that cannot be read, the first of these
  duplicates             documents that are exact copies of others
  not_utf8, binary       documents that do not look like text; also first_not_utf8, first_binary
  lengths                documents of n to 2n - 1 tokens, by n, a power of two
  shortest, longest      the document of the fewest and the most tokens: tokens, bytes, place
  first                  the beginnings of the first documents
  refused, ignored       files that cannot be read, with reasons; text beside files of records
  shards, split          of shards: their index; of tokens: both sides and the fingerprint"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="look at data, train a tokenizer or tokenise text",
        description="Prepares text for data.tokenizer and data.path. Both are optional: without a "
        "tokenizer\ntext is read as bytes, and without data.path the built-in corpus is used.",
        epilog="Examples:\n"
        "  moejax data inspect books/\n"
        "  moejax data tokenizer --path=books/ --vocab-size=8192 --out=bpe.json\n"
        "  moejax data prepare --path=books/ --tokenizer=bpe.json --out=shards/\n"
        "  moejax train --config=configs/lm.py --config.data.path=shards/ --workdir=runs/books",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect, tokenizer, prepare = (
        _add_inspect(actions),
        _add_tokenizer(actions),
        _add_prepare(actions),
    )
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
    parser.flags += inspect.flags


def _add_inspect(actions: Any) -> Any:
    inspect = actions.add_parser(
        "inspect",
        help="what is in text, shards or token arrays, and what would be refused",
        description="Reads everything once and describes it. Records and files that cannot be "
        "read do not end it;\nthey are counted, and the first ones are named.",
        epilog=INSPECTED,
    )
    inspect.add_argument(
        "path",
        nargs="?",
        default="",
        metavar="PATH",
        help="as data.path: files, folders or globs (default: built-in corpus)",
    )
    inspect.add_argument(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="count tokens of this tokenizer instead of bytes; for shards and token arrays, the "
        "one that made them",
    )
    _add_text_field(inspect)
    inspect.add_argument(
        "--first", type=int, default=3, metavar="N", help="documents to show (default 3)"
    )
    inspect.add_argument("--json", action="store_true", help="everything, as JSON on a line")
    inspect.set_defaults(run=_inspect, takes_overrides=False)
    return inspect


def _add_tokenizer(actions: Any) -> Any:
    tokenizer = actions.add_parser("tokenizer", help="train a byte-level BPE tokenizer")
    tokenizer.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens, at least 257"
    )
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    tokenizer.set_defaults(run=_tokenizer, takes_overrides=False)
    return tokenizer


def _add_prepare(actions: Any) -> Any:
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
        metavar="N",
        help="processes (default: one for each processor)",
    )
    prepare.add_argument(
        "--licence", default="", metavar="TEXT", help="a note on the licence, for index.json"
    )
    prepare.set_defaults(run=_prepare, takes_overrides=False)
    return prepare


def _add_text_field(action: Any) -> None:
    action.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field or column of a record that holds its text (default: text)",
    )


def _add_reading(action: Any) -> None:
    """The flags about documents: as the config's fields of the same names."""
    _add_text_field(action)
    action.add_argument(
        "--keep-duplicates",
        action="store_true",
        help="keep exact copies of documents, as data.duplicates=keep does",
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
        duplicates=_duplicates(args),
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
        workers=_processors() if args.workers is None else args.workers,
        licence=args.licence,
        progress=_Progress(),
        text_field=args.text_field,
        bos=args.bos,
        duplicates=_duplicates(args),
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


def _duplicates(args: argparse.Namespace) -> str:
    return "keep" if args.keep_duplicates else "drop"


def _processors() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _inspect(args: argparse.Namespace) -> int:
    from moejax.data.survey import survey
    from moejax.data.survey_text import survey_lines

    found = survey(args.path, args.tokenizer, args.text_field, args.first, _Progress())
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print("\n".join(survey_lines(found)))
    return 0


class _Progress:
    """Reports on the terminal, or a line for every tenth where there is none."""

    def __init__(self) -> None:
        self._start, self._told = time.monotonic(), 0
        self._before = -1  # bytes that an earlier preparation has done

    def __call__(self, done: int, total: int) -> None:
        if self._before < 0:
            self._before = done
        terminal = sys.stderr.isatty()
        tenth = 10 * done // max(total, 1)
        seconds = time.monotonic() - self._start
        if total < SMALL or not (terminal or tenth > self._told):
            return
        self._told = tenth
        rate = (done - self._before) / 2**20 / max(seconds, 1e-3)
        line = f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB read"
        if rate:
            left = (total - done) / 2**20 / rate
            line += f", {rate:.1f} MiB/s" + (f", {left:.0f} s left" if done < total else "")
        end = "\n" if not terminal or done == total else "\r"
        print(f"{line:<60}", end=end, file=sys.stderr, flush=True)


def _warn(line: str) -> None:
    if line:
        print(f"moejax: warning: {line}", file=sys.stderr)


def _check_out(args: argparse.Namespace) -> None:
    """Refuse an output inside a folder of texts, where it would count as text."""
    out = Path(os.path.expanduser(args.out)).resolve()
    for flag, name in (("--path", args.path), ("--eval-path", args.eval_path)):
        for part in [name, *name.split(",")]:
            path = Path(os.path.expanduser(part.strip())).resolve()
            if part.strip() and path.is_dir() and out.is_relative_to(path):
                raise UserError(f"--out={args.out} lies in {flag}={name}; write it somewhere else")
