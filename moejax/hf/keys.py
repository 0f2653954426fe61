"""Rules of a family's table: keys of a Hugging Face config beside fields of ours, both ways.

A rule reads fields from their config and writes keys of theirs. A family can express a model of
ours if what it writes reads back as the model's own fields.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from moejax.config import default as default_config
from moejax.config.tree import flatten
from moejax.errors import UserError

Fields = dict[str, Any]
"""Fields of our config by dotted name; the gate is ``moe.gate``, a dict with its ``name``."""

REQUIRED = object()


class Theirs:
    """A Hugging Face config, and the keys that were read.

    Raises:
      UserError: from its methods, naming the file, the key and the value.
    """

    def __init__(self, keys: Mapping[str, Any], path: str):
        self.keys, self.path = dict(keys), path
        self.read: set[str] = set()

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key; ``default`` where it is absent."""
        self.read.add(key)
        if key not in self.keys and default is REQUIRED:
            raise UserError(f"{self.path} lacks {key}; restore the model's own config.json")
        return self.keys.get(key, default)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key that is a number; ``default`` where it is absent or null."""
        value = self.get(key, default)
        value = default if value is None and default is not REQUIRED else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.path}: {key}={value!r} must be a number")
        return value

    def whole(self, key: str, default: Any = REQUIRED, least: int = 0) -> int:
        """The value of a key that counts something; ``default`` where it is absent or null."""
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise UserError(f"{self.path}: {key}={value!r} must be a whole number from {least} on")
        return int(value)

    def like(self, key: str, ours: str, default: Any = REQUIRED) -> Any:
        """The value of a key, which must be of the type of this field of ours."""
        value = self.get(key, default)
        kind = _kinds()[ours]
        known = {int: self.whole, float: self.number}.get(kind)
        if known is not None:
            return kind(known(key, default))
        if not isinstance(value, kind):
            words = "true or false" if kind is bool else "a text"
            raise UserError(f"{self.path}: {key}={value!r} must be {words}")
        return value

    def group(self, key: str) -> Mapping[str, Any]:
        """The value of a key that is an object; empty where it is absent or null."""
        value = self.get(key, None) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{self.path}: {key}={value!r} must be an object, or null")
        return value

    def refuse(self, key: str, value: Any, known: str) -> UserError:
        """An error for a value that no option of ours has."""
        self.read.add(key)
        return UserError(f"{self.path}: {key}={value!r} is not supported; moejax knows {known}")


@functools.cache
def _kinds() -> dict[str, type]:
    return {name: type(value) for name, value in flatten(default_config()).items()}


class Rule(Protocol):
    """A rule of a table."""

    def read(self, theirs: Theirs) -> Fields: ...

    def write(self, fields: Fields) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Key:
    """A key with the value of a field. ``also``: another name of the key."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    also: str = ""

    def read(self, theirs: Theirs) -> Fields:
        if self.theirs not in theirs.keys and self.also in theirs.keys:
            return {self.ours: theirs.like(self.also, self.ours)}
        return {self.ours: theirs.like(self.theirs, self.ours, self.default)}

    def write(self, fields: Fields) -> dict[str, Any]:
        return {self.theirs: fields[self.ours]}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Fields that every model of the family has."""

    fields: Mapping[str, Any]

    def read(self, theirs: Theirs) -> Fields:
        return dict(self.fields)

    def write(self, fields: Fields) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Only:
    """A key with one supported value, which is also its default."""

    theirs: str
    value: Any
    also: tuple[Any, ...] = ()
    """Further values that mean the same."""

    def read(self, theirs: Theirs) -> Fields:
        value = theirs.get(self.theirs, self.value)
        if value != self.value and value not in self.also:
            raise theirs.refuse(self.theirs, value, repr(self.value))
        return {}

    def write(self, fields: Fields) -> dict[str, Any]:
        return {self.theirs: self.value}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key whose values stand for values of a field: pairs (theirs, ours)."""

    theirs: str
    ours: str
    pairs: tuple[tuple[Any, Any], ...]
    default: Any = REQUIRED

    def read(self, theirs: Theirs) -> Fields:
        value = theirs.get(self.theirs, self.default)
        for known, ours in self.pairs:
            if value == known:
                return {self.ours: ours}
        raise theirs.refuse(self.theirs, value, " or ".join(repr(known) for known, _ in self.pairs))

    def write(self, fields: Fields) -> dict[str, Any]:
        for known, ours in self.pairs:
            if fields[self.ours] == ours:
                return {self.theirs: known}
        return {self.theirs: self.pairs[0][0]}


@dataclasses.dataclass(frozen=True)
class HeadWidth:
    """The heads, and their width where the family names it."""

    named: bool = True

    def read(self, theirs: Theirs) -> Fields:
        heads = theirs.whole("num_attention_heads", least=1)
        fields = {
            "model.num_heads": heads,
            "model.num_kv_heads": theirs.whole("num_key_value_heads", heads, least=1),
        }
        width = theirs.whole("head_dim", 0) if self.named else 0
        return {**fields, "model.head_dim": width or theirs.whole("hidden_size") // heads}

    def write(self, fields: Fields) -> dict[str, Any]:
        heads = fields["model.num_heads"]
        keys = {"num_attention_heads": heads, "num_key_value_heads": fields["model.num_kv_heads"]}
        return keys | ({"head_dim": fields["model.head_dim"]} if self.named else {})


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

    ``latent``: DeepSeek's, whose attention scores also have YaRN's factor.
    """

    interleaved: bool = False
    share: float = 1.0
    """The default of ``partial_rotary_factor``."""
    theta: float = 10000.0
    latent: bool = False

    def read(self, theirs: Theirs) -> Fields:
        given, older = theirs.group("rope_parameters"), theirs.group("rope_scaling")
        for key in ("rope_theta", "partial_rotary_factor"):
            given = {key: theirs.get(key), **given} if key in theirs.keys else given
        given = {**older, **given}
        if any(isinstance(value, dict) for value in given.values()):
            raise theirs.refuse("rope_parameters", given, "one set for all layers")
        given = _Given(given, theirs.path)
        kind = given.get("rope_type", given.get("type", "default")) or "default"
        names = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
        names["longrope"] = names["su"] = "longrope"
        if kind not in names:
            raise theirs.refuse("rope_type", kind, ", ".join(names))
        fields = {
            "model.rope_theta": given.number("rope_theta", self.theta),
            "model.rope_share": given.number("partial_rotary_factor", self.share),
            "model.rope_interleaved": self.interleaved,
            "model.rope_scaling": names[kind],
        }
        if kind == "default":
            return fields
        return fields | self._scaling(theirs, names[kind], given)

    def _scaling(self, theirs: Theirs, kind: str, given: "_Given") -> Fields:
        key = "original_max_position_embeddings"
        reach = theirs.whole("max_position_embeddings", 0)
        trained = given.number(key, 0.0) or theirs.whole(key, reach)
        factor = given.number("factor", reach / trained if reach and trained else 1.0)
        fields: Fields = {"model.rope_factor": factor}
        if kind != "linear":
            fields["model.rope_trained_length"] = int(trained)
        if kind == "llama3":
            fields["model.rope_low_turns"] = given.number("low_freq_factor")
            fields["model.rope_high_turns"] = given.number("high_freq_factor")
        if kind == "yarn":
            fields["model.rope_low_turns"] = given.number("beta_slow", 1.0)
            fields["model.rope_high_turns"] = given.number("beta_fast", 32.0)
            fields["model.rope_whole_pairs"] = bool(given.get("truncate", True))
            fields["model.rope_magnitude"] = _yarn_magnitude(given, factor)
            every = given.number("mscale_all_dim", 0.0)
            if self.latent and every:
                width = theirs.number("qk_nope_head_dim") + theirs.number("qk_rope_head_dim")
                fields["model.attention_scale"] = width**-0.5 * _grown(factor, every) ** 2
        if kind == "longrope":
            fields["model.rope_short_factors"] = given.listed("short_factor")
            fields["model.rope_long_factors"] = given.listed("long_factor")
            fields["model.rope_magnitude"] = given.number("short_mscale", 0.0)
            fields["model.rope_long_magnitude"] = given.number("long_mscale", 0.0)
        return fields

    def write(self, fields: Fields) -> dict[str, Any]:
        kind = fields["model.rope_scaling"]
        theta = fields["model.rope_theta"]
        keys: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind}
        if fields["model.rope_share"] != self.share or self.share != 1.0:
            keys["partial_rotary_factor"] = fields["model.rope_share"]
        if kind != "none":
            keys["factor"] = fields["model.rope_factor"]
        if kind in ("llama3", "yarn", "longrope"):
            keys["original_max_position_embeddings"] = fields["model.rope_trained_length"]
        if kind == "llama3":
            keys["low_freq_factor"] = fields["model.rope_low_turns"]
            keys["high_freq_factor"] = fields["model.rope_high_turns"]
        if kind == "yarn":
            keys["beta_slow"] = fields["model.rope_low_turns"]
            keys["beta_fast"] = fields["model.rope_high_turns"]
            keys["truncate"] = fields["model.rope_whole_pairs"]
            keys |= self._yarn_factors(fields)
        if kind == "longrope":
            keys["short_factor"] = _numbers(fields["model.rope_short_factors"])
            keys["long_factor"] = _numbers(fields["model.rope_long_factors"])
            keys["short_mscale"] = fields["model.rope_magnitude"]
            keys["long_mscale"] = fields["model.rope_long_magnitude"]
        older = {} if kind == "none" else {"rope_scaling": dict(keys)}
        return {"rope_theta": theta, "rope_parameters": {**keys, "rope_theta": theta}, **older}

    def _yarn_factors(self, fields: Fields) -> dict[str, Any]:
        factor, magnitude = fields["model.rope_factor"], fields["model.rope_magnitude"]
        keys: dict[str, Any] = {"attention_factor": magnitude}
        if self.latent:
            width = fields["model.mla_plain_width"] + fields["model.mla_rope_width"]
            grown = math.sqrt(fields["model.attention_scale"] * math.sqrt(width))
            if grown > 1 and factor > 1:
                keys["mscale_all_dim"] = (grown - 1) / (0.1 * math.log(factor))
                # Their reader takes the magnitude from the two numbers where both are there.
                keys["mscale"] = (magnitude * grown - 1) / (0.1 * math.log(factor))
        return keys


def _grown(factor: float, share: float = 1.0) -> float:
    """YaRN's factor of attention: 0.1 share ln(factor) + 1."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_magnitude(given: "_Given", factor: float) -> float:
    own, every = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    if given.get("attention_factor") is not None:
        return given.number("attention_factor")
    return _grown(factor, own) / _grown(factor, every) if own and every else _grown(factor)


def same_numbers(listed: str) -> str:
    """Numbers in one spelling."""
    return _listed(_numbers(listed))


def _listed(numbers: Iterable[float]) -> str:
    return ",".join(repr(float(number)) for number in numbers)


class _Given(dict[str, Any]):
    """The keys of rotary positions, which lie in ``rope_parameters`` or ``rope_scaling``."""

    def __init__(self, keys: Mapping[str, Any], path: str):
        super().__init__(keys)
        self._theirs = Theirs(keys, f"{path}: rope_scaling")

    def number(self, key: str, default: Any = REQUIRED) -> float:
        return float(self._theirs.number(key, default))

    def listed(self, key: str) -> str:
        value = self._theirs.get(key)
        if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
            raise UserError(f"{self._theirs.path}: {key}={value!r} must be a list of numbers")
        return _listed(value)


def _numbers(listed: str) -> list[float]:
    return [float(number) for number in listed.split(",")]


@dataclasses.dataclass(frozen=True)
class Window:
    """A sliding window of all layers. ``switch``: a key that turns it on."""

    switch: str = ""

    def read(self, theirs: Theirs) -> Fields:
        window = theirs.whole("sliding_window", 0)
        if self.switch and not theirs.get(self.switch, False):
            return {"model.window": 0}
        types = theirs.get("layer_types", None)
        if window and self.switch:
            depth = theirs.get("max_window_layers", None)
            if (types and len(set(types)) > 1) or (depth and not types):
                raise theirs.refuse(self.switch, True, "false, or a window of all layers")
        if types and set(types) == {"full_attention"}:
            window = 0
        return {"model.window": window}

    def write(self, fields: Fields) -> dict[str, Any]:
        window = fields["model.window"]
        keys: dict[str, Any] = {"sliding_window": window or None}
        if self.switch:
            types = ["sliding_attention" if window else "full_attention"]
            keys |= {self.switch: bool(window), "max_window_layers": 0}
            keys["layer_types"] = types * fields["model.num_layers"]
        return keys


@dataclasses.dataclass(frozen=True)
class WindowPattern:
    """A window in all layers but every n-th (GPT-OSS), where `layer_types` says so.

    ``key``: of the window's size; ``kind``: the name of its layers there.
    """

    key: str = "sliding_window"
    kind: str = "sliding_attention"
    window_kind: str = "sliding"
    default: int = 0
    """n where there are no `layer_types`."""

    def read(self, theirs: Theirs) -> Fields:
        window = theirs.whole(self.key, 0)
        layers = theirs.whole("num_hidden_layers")
        types = theirs.get("layer_types", None)
        every = self.default
        if types:
            full = [i + 1 for i, kind in enumerate(types) if kind == "full_attention"]
            every = full[0] if full else 0
            if full != list(range(every, layers + 1, every)) if every else full:
                raise theirs.refuse("layer_types", types, "a window in all layers but every n-th")
        window = 0 if every == 1 else window
        return {
            "model.window": window,
            "model.window_kind": self.window_kind,
            "model.global_every": every if every > 1 else 0,
        }

    def write(self, fields: Fields) -> dict[str, Any]:
        every, window = fields["model.global_every"], fields["model.window"]
        layers = range(1, fields["model.num_layers"] + 1)
        full = [not window or bool(every and layer % every == 0) for layer in layers]
        types = ["full_attention" if whole else self.kind for whole in full]
        return {self.key: window or None, "layer_types": types}


@dataclasses.dataclass(frozen=True)
class FirstDense:
    """The number of dense layers at the bottom."""

    theirs: str = "first_k_dense_replace"

    def read(self, theirs: Theirs) -> Fields:
        first, step = theirs.whole(self.theirs, 0), theirs.get("moe_layer_freq", 1)
        if step != 1:
            raise theirs.refuse("moe_layer_freq", step, "1")
        sparse = tuple(range(first, theirs.whole("num_hidden_layers")))
        return sparse_layers(sparse, theirs.whole("num_hidden_layers"))

    def write(self, fields: Fields) -> dict[str, Any]:
        return {self.theirs: min(sparse_of(fields), default=fields["model.num_layers"])}


@dataclasses.dataclass(frozen=True)
class DenseLayers:
    """Every n-th layer has experts, but those of a list (Qwen)."""

    def read(self, theirs: Theirs) -> Fields:
        layers, step = (
            theirs.whole("num_hidden_layers"),
            theirs.whole("decoder_sparse_step", 1, least=1),
        )
        dense = theirs.get("mlp_only_layers", None) or []
        sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
        return sparse_layers(sparse, layers)

    def write(self, fields: Fields) -> dict[str, Any]:
        sparse = sparse_of(fields)
        dense = [i for i in range(fields["model.num_layers"]) if i not in sparse]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


@dataclasses.dataclass(frozen=True)
class ListedSparse:
    """A list of the layers with experts, or every n-th (Llama 4)."""

    def read(self, theirs: Theirs) -> Fields:
        layers, step = (
            theirs.whole("num_hidden_layers"),
            theirs.whole("interleave_moe_layer_step", 1, least=1),
        )
        sparse = theirs.get("moe_layers", None)
        return sparse_layers(sparse or list(range(step - 1, layers, step)), layers)

    def write(self, fields: Fields) -> dict[str, Any]:
        sparse = sparse_of(fields)
        return {"moe_layers": list(sparse), "interleave_moe_layer_step": 1}


def sparse_layers(sparse: Sequence[int], layers: int) -> Fields:
    """The fields for a model in which these layers have experts, in the shortest period."""
    if not sparse:
        return {"moe.every": 0, "moe.first_dense": 0, "moe.dense_layers": ""}
    wanted = list(sparse)
    for first in range(min(sparse) + 1):
        for every in range(1, layers - first + 1):
            whole = not (layers - first) % every
            if whole and wanted == list(range(first + every - 1, layers, every)):
                return {"moe.every": every, "moe.first_dense": first, "moe.dense_layers": ""}
    dense = [i for i in range(min(sparse), layers) if i not in sparse]
    listed = ",".join(map(str, dense))
    return {"moe.every": 1, "moe.first_dense": min(sparse), "moe.dense_layers": listed}


def sparse_of(fields: Fields) -> tuple[int, ...]:
    """The layers with experts, of a model with these fields."""
    every, first = fields["moe.every"], fields["moe.first_dense"]
    dense = [int(number) for number in fields["moe.dense_layers"].split(",") if number.strip()]
    places = range(first, fields["model.num_layers"])
    return tuple(i for i in places if every and (i - first + 1) % every == 0 and i not in dense)


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate: its name, fixed fields, and keys of the others.

    ``keys``: (theirs, field, default). A key that is absent or null has the default.
    """

    name: str
    keys: tuple[tuple[str, str, Any], ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, theirs: Theirs) -> Fields:
        fields = {"name": self.name, **self.fixed}
        for key, field, default in self.keys:
            value = theirs.get(key, default)
            value = default if value is None and default is not REQUIRED else value
            if value is None:
                raise UserError(f"{theirs.path} lacks {key}; restore the model's own config.json")
            if default is None:  # a count that every config has
                value = theirs.whole(key, least=1)
            elif isinstance(default, bool):
                if not isinstance(value, bool):
                    raise UserError(f"{theirs.path}: {key}={value!r} must be true or false")
            else:
                value = type(default)(theirs.number(key, default))
            fields[field] = value
        return {"moe.gate": fields}

    def write(self, fields: Fields) -> dict[str, Any]:
        gate = fields["moe.gate"]
        return {key: gate.get(field, default) for key, field, default in self.keys}
