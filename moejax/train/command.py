"""The ``moejax eval`` command."""

import argparse
import json
import os
import sys
from typing import Any

from moejax.errors import UserError
from moejax.flags import OVERRIDES, WORKDIR

FAILED = 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description="Evaluates a checkpoint of a run on its held-out text and prints the result as "
        "one\nJSON object. Writes nothing. --measure-leak adds the loss of some sequences, "
        "evaluated\nwhole (leak/with_future) and token by token with the rest masked "
        "(leak/without_future),\nand the difference, leak/nats_per_token: 0 up to rounding for a "
        "causal gate.",
        epilog="Examples:\n"
        "  moejax eval --workdir=runs/switch\n"
        "  moejax eval --workdir=runs/switch --step=200 --config.moe.eval_transport=cells\n"
        "  moejax eval --workdir=runs/ec --measure-leak=32\n\n"
        f"{OVERRIDES}",
    )
    parser.add_argument("--workdir", required=True, **WORKDIR, help="the run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
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
        help="also write which experts every token visited, for moe.gate.name=replay",
    )
    parser.add_argument(
        "--record-steps",
        type=int,
        default=0,
        metavar="N",
        help="with --record-routing: the training batches of the first N steps too, at most "
        "train.steps",
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
    loaded = load(os.path.join(args.workdir, "config.json"), args.overrides)
    validate(loaded.config)

    from moejax.train import evaluate, rows

    try:
        row = evaluate.evaluate(
            loaded.config,
            args.workdir,
            args.step,
            args.record_routing or "",
            args.record_steps,
            args.measure_leak or 0,
        )
    except rows.Divergence as problem:
        print(f"moejax: the evaluation is not finite at {problem}", file=sys.stderr)
        return FAILED
    print(json.dumps(row))
    return 0
