"""Text to typed values: ``--config.path.to.field=value`` flags and ``key=value`` config arguments.

A value's type is that of the field's default, never guessed from the text.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from moejax import gating
from moejax.errors import UserError, suggest
from moejax.field import Field
from moejax.fields import FIELDS
from moejax.schema import Config, set_field, set_gate, table_of

PREFIX = "--config."
GATE_NAME = "moe.gate.name"
TASK_NAME = "task.name"
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_EXPECTED = {
    bool: "true or false (bool)",
    int: "a whole number (int)",
    float: "a number (float)",
    tuple: "numbers separated by commas (tuple)",
}


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into its overrides, each as ``--config.field=value``, and the rest.

    ``--config.field value`` in two words is joined.

    Raises:
      UserError: an override without a value.
    """
    overrides, rest, words = [], [], iter(argv)
    for word in words:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        if "=" not in word:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
            word = f"{word}={value}"
        overrides.append(word)
    return overrides, rest


def apply_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Sets the fields that overrides name, in order; ``moe.gate.name`` comes before all others.

    A new gate brings its own fields and its preset; what else is overridden is set afterwards and
    wins. Naming the gate that the config already has changes nothing.

    Raises:
      UserError: an unknown field, a section, or a value of the wrong type.
    """
    pairs = [_split(override) for override in overrides]
    for name, text in pairs:
        if name == TASK_NAME and text != config.task.name:
            raise UserError(
                f"{TASK_NAME}={text} is chosen by the config page, and this one's is "
                f"{config.task.name!r}; name another page, such as configs/vit.py"
            )
    for name, text in pairs:
        if name == GATE_NAME and text != config.moe.gate.name:
            set_gate(config, text)
    table = table_of(config)
    for name, text in pairs:
        if name == GATE_NAME:
            continue
        if name not in table:
            raise UserError(unknown_field(name, table, config))
        set_field(config, name, parse_value(name, text, table[name].default))


def _split(override: str) -> tuple[str, str]:
    name, *text = re.split(r"[=\s]", override.removeprefix(PREFIX), maxsplit=1)
    if not text:
        raise UserError(f"override {override!r} needs a value: {PREFIX}{name}=VALUE")
    return name, text[0]


def parse_value(name: str, text: str, default: Any) -> Any:
    """``text`` as a value of the type of ``default``.

    Raises:
      UserError: naming the field, the text and the type expected.
    """
    try:
        return _typed(text, default)
    except ValueError:
        expected = _EXPECTED[type(default)]
        raise UserError(f"{name}={text!r} must be {expected}, such as {_show(default)}") from None


def _typed(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.strip().lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.strip().lower()]
    if isinstance(default, tuple):
        kind = default[0] if default else 0
        parts = text.strip().strip("()[]").split(",")
        return tuple(_typed(part, kind) for part in parts if part.strip())
    if isinstance(default, float):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    return type(default)(text)


def _show(value: Any) -> str:
    return ",".join(map(str, value)) or "1,2" if isinstance(value, tuple) else str(value).lower()


def unknown_field(name: str, table: Mapping[str, Field], config: Config) -> str:
    """The message about a dotted name that is not a field: the nearest name, or what exists."""
    gate, task = config.moe.gate.name, config.task.name
    if name in FIELDS:
        return f"{name} means nothing to task {task!r}, which does not use it; leave it out"
    below = [field for field in table if field.startswith(f"{name}.")]
    if below:
        return (
            f"{name} is a section, not a field; set one of its fields, such as "
            f"{PREFIX}{below[0]}={_show(table[below[0]].default)}"
        )
    section, _, leaf = name.rpartition(".")
    if section == "moe.gate":
        own = {field.rpartition(".")[2] for field in table if field.startswith("moe.gate.")}
        others = [other for other in gating.names() if leaf in gating.fields(other)]
        has_it = f" (a field of gate {', '.join(others)})" if others else ""
        return f"{name}: gate {gate!r} has no field {leaf!r}{has_it}; {suggest(leaf, own)}"
    close = _nearest(name, table)
    if close:
        return f"{name} is not a config field; did you mean {close!r}?"
    siblings = [field for field in table if field.rpartition(".")[0] == section]
    if section and siblings:
        return f"{name} is not a config field; fields of {section}: {', '.join(siblings)}"
    top = sorted({field.partition(".")[0] for field in table})
    return f"{name} is not a config field; sections: {', '.join(top)} (see `moejax config`)"


def _nearest(name: str, table: Mapping[str, Field]) -> str:
    """The field most like ``name``: by its own last part in any section, else by the whole."""
    leaf = name.rpartition(".")[2]
    for field in table:
        if field.rpartition(".")[2] == leaf:
            return field
    return next(iter(difflib.get_close_matches(name, table, n=1)), "")


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """A config argument ``key=value,key=value`` as an object with an attribute for every key.

    ``options = parse_arg(arg, gate="mixtral", experts=8, debug=False)`` in ``get_config(arg)``
    gives ``options.gate``, ``options.experts`` and ``options.debug``, each of its default's type. A
    key on its own sets a bool to True: ``page.py:debug,experts=16``.

    Raises:
      UserError: an unknown key, one given twice, one without a value, or a value of another type.
    """
    values, given = dict(defaults), set()
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            hint = suggest(key, defaults)
            raise UserError(f"config argument {arg!r}: unknown key {key!r}; {hint}")
        if key in given:
            raise UserError(f"config argument {arg!r}: {key!r} is given twice; keep one")
        given.add(key)
        if equals:
            values[key] = parse_value(f"config argument {key}", text, defaults[key])
        elif isinstance(defaults[key], bool):
            values[key] = True
        else:
            raise UserError(f"config argument {arg!r}: {key!r} needs a value: {key}=VALUE")
    return SimpleNamespace(**values)


def choose(name: str, value: str, options: Mapping[str, Any]) -> Any:
    """``options[value]``, for a config page's own choices (a size, a data set).

    Raises:
      UserError: an unknown value; the message lists the valid ones.
    """
    if value not in options:
        raise UserError(f"{name}={value!r} is unknown; {suggest(value, options)}")
    return options[value]


def check_fields(config: Config, flat: Mapping[str, Any], origin: str, remedy: str) -> None:
    """Checks that a config has every field of the table, no other, and values of their types.

    Raises:
      UserError: naming ``origin`` and the first field that is wrong, with ``remedy`` if missing.
    """
    table = table_of(config)
    for name in flat:
        if name not in table:
            raise UserError(f"{origin}: {unknown_field(name, table, config)}")
    for name, field in table.items():
        if name not in flat:
            raise UserError(f"{origin}: {name} is missing; {remedy}")
        if type(flat[name]) is not field.type:
            expected = _EXPECTED.get(field.type, "text (str)")
            raise UserError(f"{origin}: {name}={flat[name]!r} must be {expected}")
