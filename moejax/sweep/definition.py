"""The definition of a sweep: an experiment file expanded to trials, all checked before any runs.

An experiment is a config page with one more function::

    def sweep(arg=None):
        yield {"name": "switch", "moe.gate.name": "switch", "seeds": 2}
        yield {"name": "top_4", "moe.gate.name": "top_k", "moe.gate.k": 4, "seeds": 2}

Each variant overrides fields of ``get_config``'s config. ``seeds`` is a number of seeds, from 0 on,
or a list of them; without it the page's own ``train.seed`` is the only one. A width may be given as
"match", to be solved for (see match.py).
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moejax.config import load, to_dict, validate
from moejax.config.overrides import PREFIX
from moejax.config.sources import Page, open_page, split_source
from moejax.errors import UserError
from moejax.sweep.match import Comparison, Solved, comparison_of, solve

Variant = dict[str, Any]

PAGE = "sweep.py"
"""The file that makes a folder an experiment."""

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_HOW_NOT_WHAT = ("distributed", "report")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of one variant with one seed; ``config`` is the resolved config from ``to_dict``."""

    variant: str
    seed: int
    overrides: tuple[str, ...]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def id(self) -> str:
        return config_id(self.config)

    @property
    def steps(self) -> int:
        return self.config["train"]["steps"]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """An experiment's trials, variant by variant in the order of the file.

    ``solved`` has the widths found for variants that asked for a match.
    """

    source: str
    trials: tuple[Trial, ...]
    comparison: Comparison = Comparison()
    solved: tuple[Solved, ...] = ()

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(trial.variant for trial in self.trials))


def config_id(config: dict[str, Any]) -> str:
    """A hash of a resolved config: the same for the same run, whatever file it came from."""
    text = json.dumps(computed(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def computed(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of a resolved config that determine what a run computes."""
    return {name: part for name, part in config.items() if name not in _HOW_NOT_WHAT}


def expand(source: str) -> Sweep:
    """The trials of ``path.py[:arg]`` or ``package.module[:arg]``, every config validated.

    A folder stands for the file ``sweep.py`` in it.

    Raises:
      UserError: no such file, no ``sweep()`` in it, or a variant that cannot run.
    """
    path, arg = split_source(source)
    if (Path(path) / PAGE).is_file():
        source = f"{Path(path) / PAGE}:{arg}" if arg else str(Path(path) / PAGE)
    page = open_page(source)
    if page is None:
        raise UserError(
            f"experiment {source!r} is neither a file 'path.py[:arg]' nor a folder with a {PAGE} "
            "nor a module 'package.module[:arg]'"
        )
    read = [
        _read(f"experiment {source!r}, variant {number}", variant)
        for number, variant in enumerate(_variants(page), 1)
    ]
    comparison = comparison_of(page, [variant.name for variant in read])
    trials, solved = _solve_and_expand(source, read, comparison)
    _check_distinct(source, trials)
    return Sweep(source, trials, comparison, solved)


def select(sweep: Sweep, patterns: str) -> list[Trial]:
    """The trials whose name matches one of the patterns, in the sweep's order.

    Args:
      patterns: shell patterns (``top_*,*-seed0``) separated by commas; empty for all trials.

    Raises:
      UserError: a pattern matches no trial.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(trial.name, pattern) for trial in sweep.trials):
            names = ", ".join(trial.name for trial in sweep.trials)
            raise UserError(f"--filter={patterns}: no trial matches {pattern!r}; trials: {names}")
    return [
        trial
        for trial in sweep.trials
        if not wanted or any(fnmatchcase(trial.name, pattern) for pattern in wanted)
    ]


def changed(sweep: Sweep, trial: Trial) -> str:
    """The reason why a trial can no longer run as it was expanded; "" if it can.

    The trial's process reads the experiment's file again, perhaps hours later.
    """
    try:
        config = to_dict(load(sweep.source, trial.overrides).config)
    except UserError as error:
        return str(error)
    same = config_id(config) == trial.id
    return "" if same else f"{sweep.source} has been changed since the sweep began"


def _variants(page: Page) -> Sequence[Any]:
    sweep = getattr(page.module, "sweep", None)
    if not callable(sweep):
        raise UserError(
            f"experiment {page.path!r} defines no function sweep(): it is a config page; "
            "yield one dict of overrides per variant from sweep(), or use `moejax train`"
        )
    variants = page.call(sweep)
    if not isinstance(variants, Sequence) or isinstance(variants, str) or not variants:
        raise UserError(f"experiment {page.path!r}: sweep() gives no variants; yield dicts from it")
    return variants


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A variant as its page gives it; ``where`` is the prefix of error messages about it."""

    where: str
    name: str
    seeds: list[int]
    fields: Variant


def _read(where: str, variant: Any) -> _Variant:
    if not isinstance(variant, dict) or not isinstance(variant.get("name"), str):
        raise UserError(f"{where}: {variant!r} is not a dict with a 'name'")
    fields = dict(variant)
    name, seeds = fields.pop("name"), _seeds(where, fields)
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: name={name!r} becomes a folder; use letters, digits and . _ + -")
    if seeds and "train.seed" in fields:
        raise UserError(f"{where} ({name}): give train.seed or seeds, not both")
    return _Variant(where, name, seeds, fields)


def _solve_and_expand(
    source: str, variants: Sequence[_Variant], comparison: Comparison
) -> tuple[tuple[Trial, ...], tuple[Solved, ...]]:
    """The trials, with matched widths replaced by numbers, and these widths."""
    by_name = {variant.name: variant for variant in variants}

    def config_of(name: str, fields: Variant) -> dict[str, Any]:
        return _trial(source, dataclasses.replace(by_name[name], fields=fields), None).config

    given = {name: variant.fields for name, variant in by_name.items()}
    solved = solve(f"experiment {source!r}", comparison, given, config_of)
    trials = []
    for variant in variants:
        match = solved.get(variant.name)
        fields = {**variant.fields, match.field: match.width} if match else variant.fields
        own = dataclasses.replace(variant, fields=fields)
        trials += [_trial(source, own, seed) for seed in variant.seeds or [None]]
    return tuple(trials), tuple(solved.values())


def _trial(source: str, variant: _Variant, seed: int | None) -> Trial:
    """One trial; without a seed it has the page's."""
    overrides = [f"{PREFIX}{field}={_text(value)}" for field, value in variant.fields.items()]
    if seed is not None:
        overrides.append(f"{PREFIX}train.seed={seed}")
    try:
        config = load(source, overrides).config
        validate(config)
    except UserError as error:
        raise UserError(f"{variant.where} ({variant.name}): {error}") from error
    return Trial(variant.name, config.train.seed, tuple(overrides), to_dict(config))


def _seeds(where: str, fields: Variant) -> list[int]:
    """Pop the seeds from a variant's fields; empty if it has none."""
    if "seeds" not in fields:
        return []
    seeds = fields.pop("seeds")
    if type(seeds) is int and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, Sequence) and seeds and all(type(seed) is int for seed in seeds):
        return list(seeds)
    raise UserError(f"{where}: seeds={seeds!r} must be a number of seeds, or a list of them")


def _text(value: Any) -> str:
    """The text of a value in an override, to be parsed with the type of the field's default."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_distinct(source: str, trials: Sequence[Trial]) -> None:
    """Raise for two trials with one name, and for one run with two names."""
    for name, count in Counter(trial.name for trial in trials).items():
        if count > 1:
            raise UserError(
                f"experiment {source!r}: {count} trials are called {name!r}; give each variant its "
                "own name, and each of its seeds once"
            )
    names: dict[str, str] = {}
    for trial in trials:
        other = names.setdefault(trial.id, trial.name)
        if other != trial.name:
            raise UserError(
                f"experiment {source!r}: trials {other!r} and {trial.name!r} are the same run; "
                "remove one of them"
            )
