"""``moejax report RUN --openmoe``: evaluates, says what appears, writes the numbers."""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.analysis.page import Page
from moejax.errors import UserError

NUMBERS = "openmoe.json"
"""Written next to the report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the report's command that belong to ``--openmoe``."""
    parser.add_argument(
        "--openmoe",
        action="store_true",
        help="also evaluate the run's checkpoint for OpenMoE's three findings (minutes)",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="with --openmoe: sequences of each text (default 256)"
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


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses flags that would have no effect.

    Raises:
      UserError: one of them without ``--openmoe``.
    """
    for flag in ("rows", "data", "step"):
        value = getattr(args, flag)
        if value not in (None, []) and not args.openmoe:
            raise UserError(f"--{flag} has no effect without --openmoe")


def pages(
    workdir: str, args: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> list[Page]:
    """The page of the findings; prints their verdicts and writes `NUMBERS` into ``folder``.

    Raises:
      UserError: what cannot be evaluated (see ``measure.measure``), or written.
    """
    from moejax.analysis.openmoe import measure, verdict  # JAX, only where it is needed
    from moejax.analysis.openmoe.page import page

    options = measure.Options(data=tuple(args.data), step=args.step)
    if args.rows is not None:
        options = dataclasses.replace(options, rows=args.rows)
    found = measure.measure(workdir, options, say)
    verdicts = [
        verdict.specialisation_verdict(found.specialisation),
        verdict.early_verdict(found.early),
        verdict.drops_verdict(found.drops),
    ]
    path = folder / NUMBERS
    try:
        path.write_text(json.dumps(numbers(found, verdicts), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    for line in verdicts:
        print(line)
    return [page(found, verdicts)]


def numbers(found: Any, verdicts: Sequence[Any]) -> dict[str, Any]:
    """What is measured, as JSON's types; what is undefined is null."""
    about = {name: getattr(found, name) for name in ("run", "step", "steps", "num_experts")}
    findings = {
        name: dataclasses.asdict(getattr(found, name)) for name in ("specialisation", "early")
    }
    drops = [dataclasses.asdict(item) | {"arm": item.arm.name} for item in found.drops]
    said = [line._asdict() for line in verdicts]
    return _plain({**about, "verdicts": said, **findings, "drops": drops})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
