"""Command-line flags: argparse with one-line errors and nearest names."""

import argparse
import difflib
import os
import stat
from typing import Any, NoReturn

from moejax.config.overrides import PREFIX, known_as
from moejax.config.table import FIELDS
from moejax.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations; a mistake is a UserError that names the nearest flag."""

    def __init__(self, **options: object) -> None:
        self.flags: list[str] = []
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def add_argument(self, *names: str, **options: object) -> argparse.Action:  # pyright: ignore[reportIncompatibleMethodOverride]
        action = super().add_argument(*names, **options)  # pyright: ignore[reportArgumentType]
        self.flags += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def check_flag(word: str, command: Parser) -> None:
    """Raise UserError with the nearest flag unless ``--name[=value]`` belongs to the command."""
    name, equals, value = word.partition("=")
    if name in command.flags:
        return
    field = known_as(name.removeprefix("--"), FIELDS)
    if field and not difflib.get_close_matches(name, command.flags, n=1, cutoff=0.75):
        hint = f"did you mean {PREFIX}{field}{equals}{value}?"
    else:
        flags = [*command.flags, *(PREFIX + field for field in FIELDS)]
        near = difflib.get_close_matches(name, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(command.flags)}"
    raise UserError(f"unknown flag {name}; {hint} (see `{command.prog} --help`)")


def workdir(text: str) -> str:
    """The folder that ``--workdir`` names, new or existing. ``~`` is the home folder.

    Raises:
      UserError: it is empty, a file or below one, too long, not UTF-8, or inaccessible.
    """
    path, problem = os.path.expanduser(text), "" if text else "is empty"
    problem = problem or not_text(path)
    try:
        if not problem and not stat.S_ISDIR(os.stat(path).st_mode):
            problem = "is a file"
    except FileNotFoundError:
        pass  # new
    except OSError as error:
        problem = f"cannot be a folder ({error.strerror})"
    if problem:
        raise UserError(f"--workdir={text} {problem}; name a folder, new or of a run")
    return path


def not_text(path: str) -> str:
    """The problem with a path that is not UTF-8; empty if it is.

    Such names exist on disks written under Latin-1. Checkpoints cannot be written to them.
    """
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8 (with the folders it is in)"
    return ""


WORKDIR: dict[str, Any] = {"type": workdir, "metavar": "DIR"}
OVERRIDES = """\
Every config field can be overridden, before or after the other flags, with
  --config.SECTION.FIELD=VALUE        such as --config.train.steps=500
The value is read as the type of the field's default. --config.moe.gate.name=NAME
also brings the gate's own fields, which can be set in the same command.
`moejax config` lists all fields."""

CONFIG_HELP = (
    "a built-in page (lm, vit, multitask, multimodal), path.py, package.module or the workdir of a "
    "run; :key=value,key=value after a page is its argument"
)
