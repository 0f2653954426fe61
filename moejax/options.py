"""The options of a model's layers: their defaults, their meaning and the values they may have.

Each is stated here and nowhere else. Layers take these dataclasses as values. The config has a
field for every ``option`` (``moejax.config.table`` gives it its name), which ``docs/config.md``
lists. To add an option, add its line here and use it in the layer.

Checks are in the layer's words; the config repeats them in its own (``moejax.config.build``).
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from moejax.dispatch import TRANSPORTS, Cells, transports
from moejax.experts import ACTIVATIONS
from moejax.types import (
    PRIORITIES,
    Gate,
    GateTraits,
    MoEConfig,
    Transport,
    Visibility,
)

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Allowed values. ``low`` and ``high`` are allowed themselves, ``above`` and ``below`` not."""

    choices: Collection[str] = ()
    low: int | float | None = None
    above: int | float | None = None
    high: int | float | None = None
    below: int | float | None = None

    @property
    def range(self) -> str:
        """The allowed values in words; empty when every value of the type is."""
        if self.choices:
            return " | ".join(self.choices)
        low = f">= {_shown(self.low)}" if self.low is not None else ""
        low = f"> {_shown(self.above)}" if self.above is not None else low
        high = f"<= {_shown(self.high)}" if self.high is not None else ""
        high = f"< {_shown(self.below)}" if self.below is not None else high
        return " and ".join(part for part in (low, high) if part)

    def allows(self, value: Any) -> bool:
        """True if a value of the right type is a choice or within the range."""
        if self.choices:
            return value in self.choices
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def _shown(bound: int | float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def option(default: Any, comment: str, **allowed: Any) -> Any:
    """A dataclass field that is an option: its default, its meaning, and its ``Range``."""
    metadata = {"comment": comment, "allowed": Range(**allowed)}
    return dataclasses.field(default=default, metadata=metadata)


def option_fields(options: type[Any]) -> list[dataclasses.Field]:
    """The fields of a class that are options, in order."""
    return [field for field in dataclasses.fields(options) if "comment" in field.metadata]


class Options:
    """The base of the classes below, which are frozen dataclasses."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range; None switches an option off."""
        for field in option_fields(type(self)):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if value is None or allowed.allows(value):
                continue
            if allowed.choices:
                valid = ", ".join(allowed.choices)
                raise ValueError(f"{field.name}={value!r} is unknown; use one of {valid}")
            raise ValueError(f"{field.name}={value} must be {allowed.range}")


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A message about options with other names for them.

    A name counts where a value follows (``every=2``), or where it cannot be a word of the sentence
    (``num_heads``, ``depths.every``).
    """
    longest_first = sorted(names, key=len, reverse=True)
    parts = (re.escape(n) + (r"\b" if re.search(r"[_.]", n) else "(?==)") for n in longest_first)
    return re.sub(rf"(?<![\w.])(?:{'|'.join(parts)})", lambda match: names[match[0]], text)


def numbers(text: str) -> tuple[float, ...]:
    """``"1.0,1.5"`` as numbers.

    Raises:
      ValueError: something else is between the commas.
    """
    return tuple(float(number) for number in text.split(",") if number.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeOptions(Options):
    """Rotary positions, and how they are stretched beyond the length of training.

    ``theta``: None for no rotary positions. The scalings are described in
    `moejax.layers.rope.frequencies`.
    """

    theta: float | None = option(10000.0, "base of the rotary position angles", above=0.0)
    share: float = option(1.0, "share of a head's width that is rotated", above=0.0, high=1.0)
    interleaved: bool = option(False, "rotate neighbours (0, 1), (2, 3), ... instead of the halves")
    scaling: str = option(
        "none",
        "how rotary positions are scaled beyond the length of training",
        choices=("none", "linear", "llama3", "yarn", "longrope"),
    )
    factor: float = option(1.0, "rope_scaling: length of use / length of training", low=1.0)
    trained_length: int = option(
        8192, "rope_scaling llama3, yarn, longrope: length of training", low=1
    )
    low_turns: float = option(
        1.0, "rope_scaling llama3, yarn: pairs with fewer turns in that length are slowed by "
        "the whole factor", above=0.0,
    )  # fmt: skip
    high_turns: float = option(
        4.0,
        "rope_scaling llama3, yarn: pairs with more turns in that length are not slowed",
        above=0.0,
    )
    whole_pairs: bool = option(True, "rope_scaling yarn: round the two bounds to whole pairs")
    magnitude: float = option(
        0.0, "rope_scaling yarn, longrope: factor of rotated queries and keys (0: the paper's)",
        low=0.0,
    )  # fmt: skip
    short_factors: str = option(
        "", "rope_scaling longrope: divisors of the frequencies of the pairs, as '1.0,1.5'"
    )
    long_factors: str = option("", "rope_scaling longrope: the divisors with rope_long")
    long: bool = option(
        False, "rope_scaling longrope: sequences may be longer than the length of training"
    )
    long_magnitude: float = option(0.0, "rope_magnitude with rope_long (0: the same)", low=0.0)

    def check(self, width: int) -> None:
        """Raises ValueError unless heads of this width can be rotated so."""
        if self.theta is None:
            return
        rotated = self.rotated(width)
        if rotated % 2 or not rotated:
            raise ValueError(
                f"share={self.share:g} of heads of width {width} rotates {rotated} of their "
                "numbers, which are no pairs; use an even width (head_dim)"
            )
        if self.scaling == "longrope":
            self._check_factors("long_factors" if self.long else "short_factors", rotated // 2)
            if self.trained_length == 1:
                raise ValueError("trained_length=1 has no logarithm above 0; use 2 or more")
        if self.scaling in ("llama3", "yarn") and self.low_turns >= self.high_turns:
            raise ValueError(
                f"low_turns={self.low_turns:g} must be below high_turns={self.high_turns:g}; lower "
                "it or raise the other"
            )

    def _check_factors(self, name: str, pairs: int) -> None:
        given = getattr(self, name)
        try:
            factors = numbers(given)
        except ValueError:
            factors = ()
        if not factors or min(factors) <= 0:
            raise ValueError(
                f"{name}={given!r} must be {pairs} numbers above 0, one per rotated pair, as "
                "'1.0,1.5'"
            )
        if len(factors) != pairs:
            raise ValueError(
                f"{name} has {len(factors)} numbers, but a head has {pairs} rotated pairs; use one "
                "number per pair"
            )

    @property
    def factors(self) -> tuple[float, ...]:
        """The divisors of the frequencies under longrope."""
        return numbers(self.long_factors if self.long else self.short_factors)

    def rotated(self, width: int) -> int:
        """The rotated part of a head's width."""
        return int(width * self.share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """Self-attention."""

    num_heads: int = option(4, "query heads", low=1)
    num_kv_heads: int = option(4, "key/value heads; fewer than num_heads: grouped queries", low=1)
    head_dim: int = option(0, "width of one head (0: d_model / num_heads)", low=0)
    rope: RopeOptions = RopeOptions()
    bias: str = option(
        "none", "biases of queries, keys and values, or of the output too",
        choices=("none", "qkv", "all"),
    )  # fmt: skip
    qk_norm: str = option(
        "none",
        "RMSNorm of queries and keys: per head, over all heads, or per head after rotation and "
        "without weights",
        choices=("none", "head", "projection", "unit"),
    )
    qk_norm_eps: float = option(
        1e-6, "added to the mean square in qk_norm and in latent attention", above=0.0
    )
    scale: float = option(0.0, "factor of attention scores (0: 1 / sqrt(head width))", low=0.0)
    score_cap: float = option(
        0.0, "attention scores s become cap tanh(s / cap) (0: no cap)", low=0.0
    )
    sinks: bool = option(False, "add a learned logit without a value to the softmax of each head")
    window: int = option(0, "tokens that a query sees, itself included (0: all)", low=0)
    window_kind: str = option(
        "sliding",
        "window: the last tokens, or those of the same chunk of positions",
        choices=("sliding", "chunk"),
    )
    temperature: float = option(
        0.0,
        "layers without rotary positions: growth of queries with ln(position) (0: none)",
        low=0.0,
    )
    temperature_length: int = option(
        8192, "temperature: number of positions that share a factor", low=1
    )
    implementation: str = option(
        "auto", "implementation of attention", choices=("auto", "xla", "cudnn")
    )
    causal: bool = True
    """A token attends to itself and earlier tokens; otherwise to all tokens."""

    @property
    def is_fused(self) -> bool:
        """True if `jax.nn.dot_product_attention` computes these scores."""
        chunked = self.window > 0 and self.window_kind == "chunk"
        return not (self.sinks or self.score_cap or chunked)

    def width(self, d_model: int) -> int:
        """The width of one head."""
        return self.head_dim or d_model // self.num_heads

    def check_without(self, names: tuple[str, ...], kind: str, remedy: str) -> None:
        """Raises ValueError if one of these options is set, which ``kind`` does not have."""
        defaults = {field.name: field.default for field in option_fields(AttentionOptions)}
        for name in names:
            value, none = getattr(self, name), defaults[name]
            if value != none:
                raise ValueError(
                    f"{name}={value} is not part of {kind}; use {name}={none}, or {remedy}"
                )

    def check(self, d_model: int, dtype: str) -> None:
        """Raises ValueError unless the heads fit ``d_model`` and the implementation."""
        if not self.head_dim and d_model % self.num_heads:
            raise ValueError(
                f"d_model={d_model} is not a multiple of num_heads={self.num_heads}; change one "
                "of them or set head_dim"
            )
        width = self.width(d_model)
        self.rope.check(width)
        if self.implementation == "cudnn" and (dtype != "bfloat16" or width % 8):
            raise ValueError(
                "implementation=cudnn needs bfloat16 and heads whose width is a multiple of 8, but "
                f"dtype={dtype} and the width is {width}; use implementation=auto"
            )
        if self.implementation == "cudnn" and not self.is_fused:
            raise ValueError(
                "implementation=cudnn has no sinks, no score_cap and no window_kind=chunk; use "
                "implementation=auto"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads="
                f"{self.num_kv_heads}; each key/value head serves the same number of query heads"
            )


@dataclasses.dataclass(frozen=True)
class LatentOptions(Options):
    """Multi-head latent attention."""

    kv_rank: int = option(
        0, "latent attention: width of what is remembered of a token (0: ordinary attention)", low=0
    )
    query_rank: int = option(0, "latent attention: rank of the queries (0: full)", low=0)
    plain_width: int = option(128, "latent attention: a head's width without positions", low=1)
    rope_width: int = option(64, "latent attention: a head's width with rotary positions", low=2)
    value_width: int = option(128, "latent attention: width of a head's values", low=1)

    def check(self, attention: AttentionOptions) -> None:
        """Raises ValueError for options of attention that latent attention does not have."""
        if attention.rope.theta is None:
            raise ValueError(
                f"kv_rank={self.kv_rank} needs rotary positions in every layer; use kv_rank=0, or "
                "global_rope=True"
            )
        attention.rope.check(self.rope_width)
        attention.check_without(
            ("qk_norm", "sinks", "temperature"),
            "latent attention", f"kv_rank=0 instead of kv_rank={self.kv_rank}",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HeadsOptions(Options):
    """Mixture of Attention heads."""

    experts: int = option(
        0, "Mixture of Attention heads: heads to choose from (0: ordinary attention)", low=0
    )
    k: int = option(2, "Mixture of Attention heads: heads per token", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and self.k > self.experts:
            raise ValueError(
                f"k={self.k} must be at most experts={self.experts}; lower it or add heads"
            )

    def check(self, attention: AttentionOptions, latent: LatentOptions) -> None:
        """Raises ValueError for options of attention that a mixture of heads does not have."""
        remedy = f"heads.experts=0 instead of heads.experts={self.experts}"
        attention.check_without(
            ("bias", "qk_norm", "sinks", "temperature"), "a mixture of attention heads", remedy
        )
        if latent.kv_rank:
            raise ValueError(
                f"kv_rank={latent.kv_rank} is not part of a mixture of attention heads; use "
                f"kv_rank=0, or {remedy}"
            )


@dataclasses.dataclass(frozen=True)
class DepthsOptions(Options):
    """Mixture-of-Depths: blocks that only some tokens pass through."""

    capacity: float = option(
        0.0, "Mixture-of-Depths: share of tokens a routed block computes (0: off)",
        low=0.0, high=1.0,
    )  # fmt: skip
    every: int = option(2, "Mixture-of-Depths: every n-th block is routed", low=1)
    predictor: str = option(
        "mlp", "Mixture-of-Depths: what decides in evaluation", choices=("mlp", "router")
    )

    def routes(self, block: int) -> bool:
        """True if the block at this position of a period, from 0, is routed."""
        return self.capacity > 0 and (block + 1) % self.every == 0

    def chosen(self, length: int) -> int:
        """ceil(capacity n): how many of a sequence's n = ``length`` tokens a routed block takes."""
        # The subtraction keeps 0.1 * 30 at 3 although the product is 3.0000000000000004.
        return max(1, min(math.ceil(self.capacity * length - 1e-9), length))

    @property
    def visibility(self) -> Visibility:
        """The best C tokens of a sequence depend on later tokens; a prediction does not."""
        return Visibility(train_future=0.0 < self.capacity < 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """The ends of a language model: its embedding and its logits."""

    tie_embeddings: bool = option(True, "output matrix = embedding")
    embed_scale: float = option(0.0, "factor of embeddings (0: sqrt(d_model))", low=0.0)
    head_bias: bool = option(False, "add a learned bias to the logits")
    logit_scale: float = option(1.0, "factor of the logits", above=0.0)
    logit_cap: float = option(0.0, "logits z become cap tanh(z / cap) (0: no cap)", low=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNOptions(Options):
    """The dense feed-forward network."""

    d_ff: int = option(512, "hidden width of a dense FFN", low=1)
    activation: str = option("swiglu", "activation of a dense FFN", choices=ACTIVATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchOptions(Options):
    """The choices around a gate by name, as a config and ``moejax.MoE`` take them."""

    num_experts: int = option(8, "experts per MoE layer", low=1)
    transport: Transport | str = option(
        "cells", "how tokens travel in training", choices=TRANSPORTS
    )
    capacity_factor: float = option(
        Cells.capacity_factor, "cells: slots per expert / mean load, in training", above=0.0
    )
    eval_transport: Transport | str = option(
        "dropless", "how tokens travel in evaluation", choices=TRANSPORTS
    )
    eval_capacity_factor: float = option(
        Cells.capacity_factor,
        "cells: slots per expert / mean load, in evaluation",
        above=0.0,
    )
    priority: str = option(
        Cells.priority, "which pairs keep a slot when an expert is full", choices=PRIORITIES
    )
    reroute: int = option(
        Cells.reroute,
        "cells: times an overflowing pair tries its next-best expert (0: dropped)",
        low=0,
    )
    group: str = option(
        MoEConfig.group,
        "tokens routed together: sequence, a number of sequences (as '4'), or batch",
    )

    def __post_init__(self) -> None:
        """``config`` checks these, with a message for values of any type."""

    @property
    def config(self) -> MoEConfig:
        """The same choices with transports as values, as the layer and the gates take them.

        Raises:
          ValueError: a choice that does not exist.
        """
        return MoEConfig(self.num_experts, *transports(vars(self)), self.group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOptions(Options):
    """The mixture-of-experts layer."""

    gate: Gate
    config: MoEConfig
    """The choices around the gate that decide what a token's output may depend on."""
    d_ff: int = option(256, "hidden width of one expert", low=1)
    shared_experts: int = option(0, "experts of width moe.d_ff that every token visits", low=0)
    shared_d_ff: int = option(
        0, "hidden width of all shared experts (0: shared_experts * d_ff)", low=0
    )
    shared_gate: bool = option(False, "weigh the shared experts by a sigmoid of the token")
    residual: bool = option(
        False,
        "weigh routed and shared experts by a softmax of the token (DeepSpeed's residual MoE)",
    )
    activation: str = option("swiglu", "activation of an expert", choices=ACTIVATIONS)
    expert_bias: bool = option(False, "give the layers of routed experts biases")
    weigh_input: bool = option(
        False, "multiply an expert's input by the gate's weight, instead of its output"
    )
    balance_scope: str = option(
        "sequence",
        "tokens over which balance losses take their means",
        choices=("sequence", "group", "batch"),
    )
    vocab_size: int = 0
    """Token ids that gates may look up."""
    num_tasks: int = 1
    """Tasks that ``Context.task_B`` tells apart. With several, pairs are counted per task too."""
    num_sources: int = 1
    """Sources that ``Context.source_B`` tells apart. With several, pairs are counted per source; no
    gate knows them."""
    entropy_floors: tuple[float, ...] = ()
    """Thresholds of LIMoE's entropy losses, one per task; none: without these losses."""
    dtype: str | None = None
    """Type of the experts' computation and of the output; None: that of the input."""
    param_dtype: str = "float32"

    def check(self) -> None:
        """Raises ValueError for options that do not fit each other."""
        if self.shared_gate and not self.shared_experts:
            raise ValueError(
                "shared_gate=True weighs the shared experts, but shared_experts=0; use "
                "shared_experts=1 or more, or shared_gate=False"
            )
        if self.shared_d_ff and not self.shared_experts:
            raise ValueError(
                f"shared_d_ff={self.shared_d_ff} is the width of shared experts, but "
                "shared_experts=0; use shared_experts=1, or shared_d_ff=0"
            )
        mixes = GateTraits.of(self.gate).mixes is not None
        if mixes and (self.expert_bias or self.weigh_input):
            raise ValueError(
                f"expert_bias={self.expert_bias} and weigh_input={self.weigh_input}, but gate "
                f"{type(self.gate).__name__} mixes tokens or experts; use expert_bias=False and "
                "weigh_input=False"
            )
        if self.weigh_input and getattr(self.gate, "k", None) != 1:
            raise ValueError(
                "weigh_input=True scales a token by the weight of its one expert, but gate "
                f"{type(self.gate).__name__} has k={getattr(self.gate, 'k', None)}; use gate.k=1 "
                "or weigh_input=False"
            )
        if self.residual and (self.shared_gate or not self.shared_experts):
            raise ValueError(
                "residual=True weighs routed against shared experts, but shared_experts="
                f"{self.shared_experts} and shared_gate={self.shared_gate}; use at least one "
                "shared expert without its own gate, or residual=False"
            )
        if self.entropy_floors and len(self.entropy_floors) != self.num_tasks:
            raise ValueError(
                f"entropy_floors={self.entropy_floors} must have one number for each of num_tasks="
                f"{self.num_tasks} tasks, or none"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOptions(Options):
    """A model's layers. The first ``first_dense`` have ordinary attention and a dense FFN.

    Raises:
      ValueError: options that do not fit each other, naming field, value and remedy.
    """

    d_model: int = option(192, "model width", low=1)
    num_layers: int = option(4, "attention + FFN layers", low=1)
    norm: str = option("rms", "RMSNorm, or LayerNorm with a bias", choices=("rms", "layer"))
    norm_eps: float = option(1e-6, "added to the mean square (variance) in norms", above=0.0)
    norm_place: str = option(
        "before", "where attention and FFN have norms: on their input, output or both",
        choices=("before", "after", "both"),
    )  # fmt: skip
    residual_scale: float = option(
        1.0, "factor of what attention and FFN add to the residual stream", above=0.0
    )
    global_every: int = option(0, "every n-th layer has no window (0: none)", low=0)
    global_rope: bool = option(True, "the layers of global_every have rotary positions")
    dtype: str = option(
        "float32", "type of activations and matmuls; weights and router are float32", choices=DTYPES
    )
    remat: str = option(
        "none",
        "what the backward pass recomputes: nothing, cheap parts, experts too, exchanges too, all",
        choices=("none", "experts", "exchange", "dots", "full"),
    )
    every: int = option(1, "every n-th layer is an MoE layer (0: none, a dense model)", low=0)
    first_dense: int = option(0, "layers at the bottom that stay dense", low=0)
    dense_layers: str = option(
        "", "numbers of further layers that stay dense, counted from 0, as '3,7'"
    )
    attention: AttentionOptions = AttentionOptions()
    latent: LatentOptions = LatentOptions()
    heads: HeadsOptions = HeadsOptions()
    depths: DepthsOptions = DepthsOptions()
    ffn: FFNOptions = FFNOptions()
    experts: MoEOptions
    """Unused when ``every`` is 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads.experts:
            self.heads.check(self.attention, self.latent)
        if self.latent.kv_rank:
            for layer in range(self.num_layers):
                self.latent.check(self.attention_of(layer))
        else:
            self.attention.check(self.d_model, self.dtype)
        repeated = self.num_layers - self.first_dense
        if repeated < 1:
            raise ValueError(
                f"first_dense={self.first_dense} must be below num_layers={self.num_layers}; for a "
                "dense model use every=0"
            )
        self._check_dense_layers()
        if self.every:
            if not self.dense_layers:
                self._check_period(repeated, "every", self.every)
            self.experts.check()
        if self.global_every and not self.dense_layers:
            self._check_period(repeated, "global_every", self.global_every)
        if self.depths.capacity:
            self._check_depths(repeated)

    def _check_period(self, repeated: int, name: str, size: int) -> None:
        if repeated % size:
            raise ValueError(
                f"num_layers={self.num_layers} - first_dense={self.first_dense} = {repeated} "
                f"layers are not a multiple of {name}={size}; use num_layers="
                f"{self.first_dense + math.ceil(repeated / size) * size}"
            )

    def _check_dense_layers(self) -> None:
        try:
            listed = self.listed_dense
        except ValueError:
            raise ValueError(
                f"dense_layers={self.dense_layers!r} must be numbers of layers, as '3,7'"
            ) from None
        wrong = [n for n in listed if not self.first_dense <= n < self.num_layers]
        if wrong:
            raise ValueError(
                f"dense_layers={self.dense_layers!r} names layer {wrong[0]}, but layers after the "
                f"first_dense={self.first_dense} are {self.first_dense} to {self.num_layers - 1}"
            )
        if self.every and not self.num_moe_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers!r} leaves no layer with experts; use every=0"
            )

    def _check_depths(self, repeated: int) -> None:
        """All blocks with experts are routed or none is, so that all count the same tokens."""
        depths, gate = self.depths, self.experts.gate
        if self.every % depths.every:
            raise ValueError(
                f"depths.every={depths.every} must divide every={self.every}, so that all blocks "
                f"with experts are routed; use depths.every={self.every} or every={depths.every}"
            )
        self._check_period(repeated, "depths.every", depths.every)
        if self.attention.window and depths.capacity < 1:
            raise ValueError(
                f"window={self.attention.window} counts tokens, of which depths.capacity="
                f"{depths.capacity:g} leaves out some in training and others in evaluation; use "
                "window=0 or depths.capacity=0"
            )
        if self.every and (
            gate.trained_by == "policy" or GateTraits.of(gate).check_data is not None
        ):
            raise ValueError(
                f"gate {type(gate).__name__} needs every token of a sequence in training, but "
                f"depths.capacity={depths.capacity:g} leaves some out; use depths.capacity=0"
            )

    def with_experts(self, **changes: Any) -> "StackOptions":
        """The same layers with other options of the MoE layers."""
        return dataclasses.replace(self, experts=dataclasses.replace(self.experts, **changes))

    @property
    def gate(self) -> Gate:
        return self.experts.gate

    @property
    def moe(self) -> MoEConfig:
        return self.experts.config

    @property
    def vocab_size(self) -> int:
        return self.experts.vocab_size

    @property
    def period(self) -> int:
        """Layers in one repeating period: the least number that all patterns divide."""
        if self.dense_layers:
            return self.num_layers - self.first_dense
        depths = self.depths.every if self.depths.capacity else 1
        return math.lcm(self.every or 1, depths, self.global_every or 1)

    @property
    def num_periods(self) -> int:
        return (self.num_layers - self.first_dense) // self.period

    @property
    def sparse_places(self) -> tuple[int, ...]:
        """The places in a period whose layers have experts."""
        places = range(self.period)
        return tuple(i for i in places if self.is_sparse(self.first_dense + i))

    @property
    def num_moe_layers(self) -> int:
        return self.num_periods * len(self.sparse_places)

    def is_sparse(self, layer: int) -> bool:
        """True if this layer of the model, counted from 0, has experts."""
        place = layer - self.first_dense
        listed = layer in self.listed_dense
        return bool(self.every) and place >= 0 and (place + 1) % self.every == 0 and not listed

    @property
    def listed_dense(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.dense_layers.split(",") if number.strip())

    def attention_of(self, layer: int) -> AttentionOptions:
        """The attention of a layer, counted from 0: every ``global_every``-th has no window."""
        if not self.global_every or (layer + 1) % self.global_every:
            return self.attention
        rope = self.attention.rope
        if not self.global_rope:
            rope = dataclasses.replace(rope, theta=None)
        return dataclasses.replace(self.attention, window=0, rope=rope)
