"""The ``moejax generate`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.config.flags import OVERRIDES, WORKDIR
from moejax.errors import UserError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MOST_SEED = 2**32 - 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue prompts with a trained language model",
        description="Continues prompts with a checkpoint of a language model. The continuation of "
        "a single prompt\nappears while it is generated. Speed, and anything else that is no text, "
        "goes to stderr.",
        epilog="Examples:\n"
        '  moejax generate --workdir=runs/switch --prompt "The king"\n'
        '  moejax generate --workdir=runs/switch --prompt "The king" --temperature=0.8\n'
        "  moejax generate --workdir=runs/switch --prompts=prompts.txt --json > texts.jsonl\n"
        '  moejax generate --workdir=runs/switch --prompt "The king" --show-routing\n\n'
        f"{OVERRIDES}",
    )
    parser.add_argument("--workdir", required=True, **WORKDIR, help="the run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt per line, or per line of a .jsonl file an object with a prompt; - is stdin",
    )
    parser.flags += ["--prompt", "--prompts"]
    for flag, kind, default, meaning in (
        ("--max-tokens", int, 128, "most tokens of a continuation"),
        ("--temperature", float, 0.0, "divides the logits; 0 takes the most likely token"),
        ("--top-k", int, 0, "draw among the K most likely tokens (0: all)"),
        ("--top-p", float, 1.0, "draw among the most likely tokens of this probability together"),
        ("--min-p", float, 0.0, "leave out tokens less likely than this share of the likeliest"),
        ("--repetition-penalty", float, 1.0, "above 1: tokens that the text has become unlikely"),
        ("--seed", int, 0, "of the draws; a prompt's text does not depend on its batch"),
        ("--batch-size", int, 8, "prompts that are continued at the same time"),
    ):
        parser.add_argument(
            flag,
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
            help=f"{meaning} (default {default})",
        )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this string; may be given several times",
    )
    parser.add_argument(
        "--json", action="store_true", help="an object per line: prompt, text, tokens, finish, ..."
    )
    parser.add_argument(
        "--show-routing", action="store_true", help="show the experts that each token visited"
    )
    parser.add_argument(
        "--record-routing",
        action="store_true",
        help="write them to the workdir, for `moejax report`",
    )
    parser.set_defaults(run=_generate, takes_overrides=True)


def _generate(args: argparse.Namespace) -> int:
    from moejax.config import load
    from moejax.generate.sampling import Sampling

    for flag, least in (("max_tokens", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"{_flag(flag)}={getattr(args, flag)} must be {least} or more")
    if args.seed > MOST_SEED:
        raise UserError(f"--seed={args.seed} must be at most {MOST_SEED}")
    if args.step is not None and args.step < 0:
        raise UserError(f"--step={args.step} must be the number of a checkpoint, 0 or more")
    if "" in args.stop:
        raise UserError("--stop= is empty; give the text to end before")
    try:
        sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING})
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        raise UserError(f"{_flag(name)}={rest}") from error
    prompts = _prompts(args)
    loaded = load(os.path.join(args.workdir, "config.json"), args.overrides)

    from moejax.generate import load as loading
    from moejax.generate import run
    from moejax.generate.show import Shown, recorded

    request = run.Request(
        sampling,
        args.max_tokens,
        tuple(args.stop),
        args.seed,
        args.batch_size,
        args.show_routing or args.record_routing,
    )
    with loading.open_speaker(loaded.config, args.workdir, args.step) as speaker:
        if request.with_visits and not speaker.task.model.num_moe_layers:
            raise UserError(
                f"--workdir={args.workdir} holds a model without experts, which has no routing; "
                "leave out --show-routing and --record-routing"
            )
        given = [(text, run.encoded(speaker.tokenizer, text, name)) for name, text in prompts]
        _warn_of_length(speaker, given, args.max_tokens, loaded.config.train.seq_len)
        speed, shown = run.Speed(), Shown(speaker.tokenizer, args.json, args.show_routing)
        streams = len(given) == 1 and not args.json
        if streams:
            shown.begin(given[0][0])
        on_text = shown.stream if streams else None
        texts = []
        for text in run.generate(speaker, given, request, speed, on_text):
            shown.end(text, streamed=streams)
            texts.append(text)
        if args.record_routing:
            path = recorded(speaker, texts).write(Path(args.workdir))
            print(f"moejax: wrote {path}", file=sys.stderr)
    print(
        f"moejax: prompt {speed.prompt_tokens} tokens, {speed.of_prompt:.0f} tokens/s; text "
        f"{speed.tokens} tokens, {speed.of_text:.0f} tokens/s; compiling "
        f"{speed.compile_seconds:.1f} s; checkpoint {speaker.step}",
        file=sys.stderr,
    )
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Each prompt, with the words that name it in a message."""
    if args.prompt is not None:
        if not args.prompt:
            raise UserError("--prompt= is empty; give the text to continue")
        return [("--prompt", args.prompt)]
    path = args.prompts
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            text = Path(os.path.expanduser(path)).read_text("utf-8")
    except OSError as error:
        raise UserError(f"--prompts={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={path} is not UTF-8 ({error.reason}); convert it") from error
    lines = text.splitlines()
    if path.endswith(".jsonl"):
        lines = [_of_json(line, path, number) for number, line in enumerate(lines, 1)]
    if not lines:
        raise UserError(f"--prompts={path} has no line; write a prompt on each")
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"--prompts={path}: line {number} is empty; give the text to continue")
    return [(f"--prompts={path}: line {number}", line) for number, line in enumerate(lines, 1)]


def _of_json(line: str, path: str, number: int) -> str:
    from moejax.record.files import parsed

    try:
        prompt = parsed(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(
            f"--prompts={path}: line {number} is no JSON object with a text as its prompt"
        )
    return prompt


def _warn_of_length(
    speaker: Any, prompts: Sequence[tuple[str, Any]], max_tokens: int, trained: int
) -> None:
    longest = max(len(tokens) for _, tokens in prompts)
    if longest + max_tokens > trained:
        print(
            f"moejax: a prompt of {longest} tokens and --max-tokens={max_tokens} exceed "
            f"train.seq_len={trained}: the model has not learned later positions",
            file=sys.stderr,
        )
