"""The ``moejax eval`` command."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from moejax.config import to_dict
from moejax.config.flags import OVERRIDES, WORKDIR
from moejax.config.saved import read_config
from moejax.errors import UserError
from moejax.train.cost import units

FAILED = 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description="Evaluates a checkpoint of a run on its held-out text. On a terminal, or with "
        "--summary,\nit prints a short summary; otherwise, or with --json, every number as one "
        "JSON object\non a line. It writes no files but those of --record-routing and "
        "--record-probe. --measure-leak adds\nthe loss of some sequences, evaluated whole "
        "(leak/with_future) and token by token with the rest\nmasked (leak/without_future), and "
        "the difference, leak/nats_per_token: 0 up to rounding for a\ncausal gate.",
        epilog="Examples:\n"
        "  moejax eval --workdir=runs/switch\n"
        "  moejax eval --workdir=runs/switch --json | jq .loss\n"
        "  moejax eval --workdir=runs/switch --step=200 --config.moe.eval_transport=cells\n"
        "  moejax eval --workdir=runs/ec --measure-leak=32\n"
        "  moejax eval --workdir=runs/switch --text=book.txt --stride=64\n"
        "  moejax eval --workdir=runs/olmoe --record-probe && moejax report runs/olmoe\n\n"
        f"{OVERRIDES}",
    )
    parser.add_argument("--workdir", required=True, **WORKDIR, help="the run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--summary", action="store_true", help="a short summary (default on a terminal)"
    )
    form.add_argument(
        "--json", action="store_true", help="every number, as JSON on a line (default otherwise)"
    )
    parser.flags += ["--summary", "--json"]
    parser.add_argument(
        "--measure-leak",
        nargs="?",
        type=int,
        const=8,
        metavar="N",
        help="loss with and without the future, on N sequences (default 8; seq_len forward passes)",
    )
    parser.add_argument(
        "--record-routing",
        metavar="FILE",
        help="also record the experts of every token, for moe.gate.name=replay",
    )
    parser.add_argument(
        "--record-steps",
        type=int,
        default=0,
        metavar="N",
        help="with --record-routing: also the training batches of the first N steps, at most "
        "train.steps",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="perplexity and bits per byte of this text file"
    )
    parser.add_argument(
        "--window", type=int, metavar="N",
        help="with --text: tokens the model sees at once (default: train.seq_len)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="with --text: tokens between two windows (default: half a window)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="FILE",
        help="with --text: the tokenizer.json of a run whose data.path has prepared shards",
    )  # fmt: skip
    parser.add_argument(
        "--record-probe",
        action="store_true",
        help="also write to the workdir what its report shows of the checkpoint: how the probe's "
        "sequences are routed, and the held-out row where there is none (for a converted model)",
    )
    parser.set_defaults(run=_eval, takes_overrides=True)


def _eval(args: argparse.Namespace) -> int:
    from moejax.config import load, validate

    if args.step is not None and args.step < 0:
        raise UserError(f"--step={args.step} must be the number of a checkpoint, 0 or more")
    if args.measure_leak is not None and args.measure_leak < 1:
        raise UserError(
            f"--measure-leak={args.measure_leak} must be a number of sequences, or none"
        )
    if args.record_routing == "":
        raise UserError("--record-routing= must name a file to write")
    if args.record_steps < 0 or (args.record_steps and not args.record_routing):
        raise UserError(
            f"--record-steps={args.record_steps} must be 0 or more, and needs --record-routing"
        )
    _check_text_flags(args)
    loaded = load(os.path.join(args.workdir, "config.json"), args.overrides)
    validate(loaded.config)
    if args.text is not None:
        return _eval_text(args, loaded.config)

    from moejax.train import evaluate
    from moejax.train.metrics import rows

    try:
        row = evaluate.evaluate(
            loaded.config,
            args.workdir,
            args.step,
            args.record_routing or "",
            args.record_steps,
            args.measure_leak or 0,
            args.record_probe,
        )
    except rows.Divergence as problem:
        print(f"moejax: the evaluation is not finite at {problem}", file=sys.stderr)
        return FAILED
    short = args.summary or (sys.stdout.isatty() and not args.json)
    print("\n".join(_lines(row, args.workdir, loaded.config)) if short else json.dumps(row))
    return 0


def _check_text_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that --text needs, or that do not go with it."""
    if args.text == "":
        raise UserError("--text= must name a file to evaluate")
    for name in ("window", "stride", "tokenizer"):
        value = getattr(args, name)
        if value is not None and args.text is None:
            raise UserError(f"--{name}={value} is about a text file; name it with --text=FILE")
        if name != "tokenizer" and value is not None and value < 1:
            raise UserError(f"--{name}={value} must be a number of tokens, at least 1")
    others = {"--measure-leak": args.measure_leak, "--record-routing": args.record_routing}
    for name, value in others.items():
        if args.text is not None and value is not None:
            raise UserError(
                f"{name}={value} is about the run's held-out text; leave it out, or --text"
            )


def _eval_text(args: argparse.Namespace, config: Any) -> int:
    from moejax.train import perplexity
    from moejax.train.metrics import rows

    text = perplexity.Sliding(args.text, args.window or 0, args.stride or 0, args.tokenizer or "")
    try:
        row = perplexity.perplexity(config, args.workdir, args.step, text)
    except rows.Divergence as problem:
        print(f"moejax: the evaluation is not finite at {problem}", file=sys.stderr)
        return FAILED
    short = args.summary or (sys.stdout.isatty() and not args.json)
    print("\n".join(_text_lines(row)) if short else json.dumps(row))
    return 0


def _text_lines(row: dict[str, Any]) -> list[str]:
    """A summary of a text's row."""
    lines = [
        ("text", f"{row['text']}  {row['tokens']} tokens, {row['bytes']} bytes"),
        ("loss", f"{row['loss']:.4f} nats/token  {row['bits_per_byte']:.4f} bits/byte"),
        ("perplexity", f"{row['perplexity']:.4f} at step {row['step']}"),
        ("accuracy", f"{row['accuracy']:.2%}"),
        ("windows", f"{row['window']} tokens, one every {row['stride']}"),
    ]
    if row["leak"]:
        lines.append(("leaks", row["leak"]))
    return [f"{name:<14}  {text}" for name, text in lines]


def _lines(row: dict[str, Any], workdir: str, config: Any) -> list[str]:
    """A summary of a held-out row; without baselines for text other than the run's."""
    saved = read_config(Path(workdir))
    unit, loss = units.loss_unit(saved), row["loss"]
    bits = [f"{row['bits_per_byte']:.4f} bits/byte"] if "bits_per_byte" in row else []
    rows = [("held-out loss", "  ".join([f"{loss:.4f} {unit}", *bits, f"at step {row['step']}"]))]
    own_data = to_dict(config)["data"] == saved["config"]["data"]
    for name, value in saved.get("baselines", {}).items() if own_data else ():
        side = "above" if value > loss else "below"
        rows.append(
            (f"  {name}", f"{value:.4f} {unit}  {abs(value - loss):.4f} {side} the model's")
        )
    if "accuracy" in row:
        rows.append(("accuracy", f"{row['accuracy']:.2%}"))
    if "moe/drop_rate" in row:
        transport = config.moe.get("eval_transport", "")
        rows += [
            ("drops", f"{row['moe/drop_rate']:.2%} of pairs in this evaluation ({transport})"),
            ("balance", f"busiest expert at {1 + row['moe/max_vio']:.2f}x the mean load"),
        ]
    if row.get("leak"):
        rows.append(("leaks", row["leak"]))
    if "leak/nats_per_token" in row:
        rows.append(("measured leak", f"{row['leak/nats_per_token']:.4f} {unit}"))
    rows.append(("more", "--json prints every number"))
    return [f"{name:<14}  {text}" for name, text in rows]
