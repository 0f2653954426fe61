"""The types that all of moejax shares. Imports jax and ``context`` only.

Axis legend. Letters after the last ``_`` of a name are its axes; lower case is this device's share.

====  =================================   ====  ==========================================
B     batch (sequences)                   E     experts
L     length (positions in a sequence)    K     columns of a routing (choices per token)
G     routing groups                      C     capacity: slots per expert and group
T     tokens per group                    S     shards of the ``expert`` mesh axis
R     sequences (rows) per group          N     rows of a matmul, pairs of a group
D     model width                         F     hidden width of one expert
====  =================================   ====  ==========================================

Router mathematics (logits, probabilities, weights, statistics, gate state) is float32 everywhere.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

# Shared types too, in a file of their own.
from moejax.context import Context as Context
from moejax.context import GateContext as GateContext
from moejax.context import Order as Order
from moejax.context import are_whole as are_whole
from moejax.context import valid_before as valid_before

GateParams = PyTree
"""Trainable arrays of a gate: a dict of float32 arrays, ``{}`` when it has none."""
GateState = PyTree
"""A gate's memory between steps: float32/int32 arrays, ``()`` when it has none."""

TrainedBy = Literal["task", "aux", "policy", "none"]

Priority = str
"""The order in which pairs get the slots of an expert: one of ``PRIORITIES``."""
PRIORITIES: tuple[str, ...] = ("position", "choice", "gate", "random")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts that each token visits, with their weights: one type for every sparse gate.

    A column whose weight is exactly 0 is inactive: it is not sent, not computed and not counted.
    Expert ids lie in [0, E); among a token's active columns they are distinct.
    """

    expert_GTK: Int[Array, "G T K"]
    weight_GTK: Float[Array, "G T K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """The router's intermediate results, which the auxiliary losses are functions of.

    ``probs_GTE`` sums to 1 over E; ``logits_GTE`` are the clean logits, before noise and bias.
    ``load_GTE`` is a differentiable estimate of P(token visits expert) where the gate has one
    (noisy top-k), otherwise the probabilities again.
    """

    logits_GTE: Float[Array, "G T E"]
    probs_GTE: Float[Array, "G T E"]
    load_GTE: Float[Array, "G T E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """The inputs of REINFORCE for each token's choice, from gates that sample their routing.

    ``log_prob`` is the differentiable log-probability of the chosen experts, ``baseline`` the
    expected reward. The reward is the log-likelihood of the token's target.
    """

    log_prob_GT: Float[Array, "*G T"]
    baseline_GT: Float[Array, "*G T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Weights that mix tokens into slots before the experts and back after them (Soft MoE).

    X = E * P slots per group, those of expert 0 first. The weights of padding are 0.
    """

    dispatch_GTX: Float[Array, "G T X"]
    combine_GTX: Float[Array, "G T X"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merge:
    """Weights that merge the experts into one for each span of a sequence (SMEAR, Lory).

    Each of B sequences has N = ceil(L / span) spans of ``span`` tokens; the last may be shorter.
    ``valid_BL``: spans consist of these tokens in order; None: of all positions.
    """

    weight_BNE: Float[Array, "B N E"]
    span: int = dataclasses.field(metadata={"static": True})
    valid_BL: Bool[Array, "B L"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateOutput:
    """A gate's routing, the router's statistics, and values that only this gate has.

    ``losses``: the gate's own named scalars, already weighted. ``means``: named values per group,
    [G, ...]; their means over the batch, weighted by valid tokens, are passed to ``update`` and,
    where scalar, logged as ``moe/gate/<name>``.
    """

    routing: Routing
    stats: RouterStats
    losses: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    identity_weight_GT: Float[Array, "G T"] | None = None
    """The share of the input that the output keeps, y = a x + ..., from gates with one (BASE)."""
    means: dict[str, Float[Array, "G ..."]] = dataclasses.field(default_factory=dict)
    cut_GTE: Bool[Array, "G T E"] | None = None
    """Pairs that the gate chose but had no column for: counted as dropped."""
    policy: Policy | None = None
    """From gates with ``trained_by = "policy"``; the task turns it into losses."""
    mixing: Slots | Merge | None = None
    """From gates that mix tokens or experts instead of sending tokens. ``routing`` is then for
    information only: column e is expert e, its weight the expert's share in the token's output."""


class ExpertWeights(NamedTuple):
    """FFN weights of all experts, stacked; every leaf leads with E.

    ``gate_EDF`` is None for experts without a gated activation (GELU, ReLU), biases for experts
    without them. The bias of an expert's output is no part of its partial sums: the layer adds it.
    """

    gate_EDF: Float[Array, "E D F"] | None
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]
    gate_bias_EF: Float[Array, "E F"] | None = None
    up_bias_EF: Float[Array, "E F"] | None = None


class Tokens(NamedTuple):
    """A device's tokens and where they go, group by group.

    Weights are float32, 0 in inactive columns. Tokens with larger scores get slots earlier, where
    slots are given out by score.
    """

    x_gTD: Float[Array, "g T D"]
    expert_gTK: Int[Array, "g T K"]
    weight_gTK: Float[Array, "g T K"]
    score_gT: Float[Array, "g T"]

    def flat(self) -> tuple[Array, Array, Array]:
        """x_tD, expert_tK, weight_tK with groups laid end to end."""
        arrays = (self.x_gTD, self.expert_gTK, self.weight_gTK)
        x_tD, expert_tK, weight_tK = (a.reshape(-1, a.shape[-1]) for a in arrays)
        return x_tD, expert_tK, weight_tK

    def grouped(self, y_tD: Array, kept_tK: Array) -> "Dispatched":
        """A result for the flat tokens, group by group again."""
        return y_tD.reshape(self.x_gTD.shape), kept_tK.reshape(self.expert_gTK.shape)


Dispatched = tuple[Float[Array, "g T D"], Bool[Array, "g T K"]]
"""Each token's weighted sum of its experts' outputs, and which of its pairs found room."""


@dataclasses.dataclass(frozen=True)
class Site:
    """The manual mesh axes around a transport: experts are split S ways, F over ``tensor``."""

    shards: int = 1
    expert_axis: str | None = None
    tensor_axis: str | None = None


class Job(NamedTuple):
    """The static side of a dispatch."""

    num_experts: int
    activation: str
    site: Site
    capacity: int = 0
    """Slots per group and expert; 0 for transports without slots."""

    @property
    def own_experts(self) -> int:
        """Experts of one shard."""
        return self.num_experts // self.site.shards

    def most_rows(self, expert_tK: Array) -> int:
        """Rows that one shard may have to compute: every token of every shard on its experts."""
        tokens, columns = expert_tK.shape
        return self.site.shards * tokens * min(columns, self.own_experts)


class Counts(NamedTuple):
    """One layer's work in one step, over all devices."""

    tokens: float
    pairs: float
    kept: float
    """Pairs that were not dropped."""
    slots: float
    """Slots of all experts and groups; 0 for transports without slots."""
    num_experts: int
    shards: int
    """Shards of the experts."""


@dataclasses.dataclass(frozen=True)
class SlotRules:
    """The number of slots of an expert, and the pairs that get them."""

    capacity_factor: float = 1.25
    """Slots per expert over the mean number of pairs."""
    priority: Priority = "position"
    """The order in which pairs get the slots of an expert: one of ``PRIORITIES``."""
    reroute: int = 0
    """The number of further experts that a pair tries in turn when its expert is full."""

    def __post_init__(self) -> None:
        if self.priority not in PRIORITIES:
            raise ValueError(
                f"priority={self.priority!r} is unknown; use one of {', '.join(PRIORITIES)}"
            )
        if self.reroute < 0:
            raise ValueError(f"reroute={self.reroute} must be 0 (off) or a number of rounds")
        _check_above_0("capacity_factor", self.capacity_factor)

    @property
    def draws_score(self) -> bool:
        """True if tokens are served by a random score, not by their largest weight."""
        return self.priority == "random"

    @property
    def ranks_tokens(self) -> bool:
        """True if a token's slot depends on all tokens of its group, later ones too."""
        # The experts with room for overflow are known when all tokens have been served.
        return self.priority in ("gate", "random") or self.reroute > 0


@dataclasses.dataclass(frozen=True)
class Transport(abc.ABC):
    """The way of tokens to their experts and back: a frozen dataclass with its options as fields.

    Every field has a default: a config that names the transport may give none of them. The names
    are those of ``moejax.dispatch.TRANSPORTS``.
    """

    calls_grouped_matmul: ClassVar[bool] = False
    """True if experts run in ``kernels.grouped_matmul`` or ``grouped_ffn`` on every platform. The
    kernels of TPU and GPU do not pass ``check_vma``, which is then off."""

    @property
    def slot_rules(self) -> SlotRules | None:
        """The rules by which pairs get slots; None where every pair has room.

        Without slots nothing is dropped, and a result does not depend on groups.
        """
        return None

    @abc.abstractmethod
    def run(self, tokens: Tokens, weights: ExpertWeights, job: Job) -> Dispatched:
        """The experts' outputs for this device's tokens, in ``shard_map`` or without a mesh.

        The named scopes "pack", "exchange", "experts" and "unpack" are the parts that
        ``moejax profile`` tells apart.
        """

    @abc.abstractmethod
    def rows(self, counts: Counts) -> tuple[float, float | None]:
        """Rows that experts compute and rows that are sent to experts, over all devices.

        Sent rows include the share 1 / S that stays on its shard; None where the counts do not
        determine them.
        """


class Visibility(NamedTuple):
    """The inputs of a token's output besides its own sequence up to itself.

    ``future``: later tokens of its own sequence. ``others``: other sequences of the batch.
    """

    train_future: bool = False
    train_others: bool = False
    eval_future: bool = False
    eval_others: bool = False

    @property
    def mark(self) -> str:
        """The mark that metrics, tables and figures carry; empty when nothing leaks."""
        parts = []
        for phase in ("train", "eval"):
            visible = [w for w in ("future", "others") if getattr(self, f"{phase}_{w}")]
            if visible:
                parts.append(f"{phase}:{'+'.join(visible)}")
        return " ".join(parts)

    def union(self, other: "Visibility") -> "Visibility":
        """The dependences of either of the two."""
        return Visibility(*(a or b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The choices around a gate that decide what a token's output may depend on.

    ``group``: the tokens that share slots: "sequence", a whole number of sequences such as "4", or
    "batch". ``moejax.options.DispatchOptions`` makes one from names, and has the defaults.
    """

    num_experts: int
    transport: Transport
    eval_transport: Transport
    group: str = "sequence"

    def __post_init__(self) -> None:
        for field in ("transport", "eval_transport"):
            if not isinstance(getattr(self, field), Transport):
                raise ValueError(
                    f"{field}={getattr(self, field)!r} is not a transport; use a value such as "
                    "moejax.dispatch.Dropless()"
                )
        if self.group not in ("sequence", "batch") and not (
            self.group.isdecimal() and int(self.group) > 0
        ):
            raise ValueError(
                f"group={self.group!r} is unknown; use 'sequence', 'batch' or a whole number of "
                "sequences such as '4'"
            )
        _check_above_0("num_experts", self.num_experts)

    def rows_per_group(self, batch: int) -> int:
        """Sequences in one routing group, for a batch of ``batch`` sequences."""
        if self.group == "batch":
            return batch
        return 1 if self.group == "sequence" else int(self.group)


def _check_above_0(field: str, value: Any) -> None:
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0):
        raise ValueError(f"{field}={value!r} must be a finite number above 0")


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """The sizes a gate is built for. ``layer`` may be traced: stacked layers share one program.

    ``token_counts``: counts how often each token occurs in the training text, int64[V]; None where
    there is no text.
    """

    d_model: int
    num_experts: int
    vocab_size: int = 0
    layer: int | Int[Array, ""] = 0
    num_tasks: int = 1
    token_counts: Callable[[], np.ndarray] | None = None


@runtime_checkable
class Gate(Protocol):
    """A gating function: a frozen dataclass whose fields are its hyper-parameters.

    Every method is pure. State changes only in ``update``, once per optimizer step. These members
    are required; everything optional is in ``GateTraits``, which a gate returns from ``traits()``.
    ``moejax.gating.gate`` has base classes with the usual implementations.
    """

    trained_by: ClassVar[TrainedBy]
    """The source of the parameters' gradient: the task loss, only auxiliary losses, or a policy
    gradient."""

    def check(self, num_experts: int, train: bool) -> None:
        """Raises ValueError, naming field, value and remedy, when the gate cannot work."""
        ...

    def columns(self, num_experts: int) -> int:
        """K: the number of columns of its routings."""
        ...

    def init(self, key: PRNGKeyArray, spec: GateSpec) -> GateParams: ...

    def init_state(self, spec: GateSpec) -> GateState: ...

    def __call__(
        self, params: GateParams, state: GateState, x_GTD: Array, context: GateContext
    ) -> GateOutput: ...

    def update(self, state: GateState, stats: "MoEStats") -> GateState: ...

    def capacity(self, num_tokens: int, num_experts: int, factor: float) -> int:
        """Slots per expert in a group of ``num_tokens``."""
        ...

    def visibility(self, moe: MoEConfig) -> Visibility: ...


Reads = Literal["tokens", "positions", "sequence", "task"]
"""Inputs of a routing besides a token's own activations: see ``GateTraits.reads``."""


def _one_row(num_experts: int) -> int:
    return 1


def _nothing_frozen(step: Int[Array, ""]) -> dict[str, Bool[Array, ""]]:
    return {}


def _no_advice(rows: int, mesh: Mapping[str, int]) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class GateTraits:
    """Everything optional that a gate states about itself; the defaults are those of top-k.

    A gate returns one from a method ``traits()``. A gate without that method has the defaults.
    """

    reads: tuple[Reads, ...] = ()
    """Inputs of the routing besides the token's own activations: token ids (the context must then
    have them), positions, other tokens of the same sequence, or the sequence's task."""
    follows: bool = False
    """Takes experts that were chosen elsewhere, ``GateContext.expert_GTK``, and weighs them by its
    own router."""
    reads_past: bool = False
    """In evaluation a token's routing depends on earlier tokens of its sequence, or on noise that
    is drawn for a whole sequence: a text is then decoded by routing all of it again for every new
    token. Otherwise a token that is given alone, with its position, is routed as in its text."""
    mixes: Literal["slots", "weights"] | None = None
    """Outputs have ``mixing``: tokens are mixed into slots, or the experts' weights into one
    expert. No transport is used, and rows must not hold several texts."""
    least_rows: Callable[[int], int] = _one_row
    """``least_rows(num_experts)``: the fewest sequences that a routing group may have."""
    causal_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of the gate's fields that make evaluation causal, for the message that refuses a gate
    that sees the future."""
    causal_gate: str = ""
    """The name of a similar gate that is causal, for the same message."""
    frozen: Callable[[Int[Array, ""]], dict[str, Bool[Array, ""]]] = _nothing_frozen
    """``frozen(step)``: whether each named parameter stays exactly as it is in the update after
    ``step`` completed ones. Parameters that are not named are trained."""
    advice: Callable[[int, Mapping[str, int]], str] = _no_advice
    """``advice(rows, mesh)``: one line with the fields to set so that the gate saves time on this
    mesh; empty if there is nothing to gain. ``rows``: sequences of a batch per device; ``mesh``:
    the sizes of its axes. Results are the same on every mesh."""
    check_data: Callable[[int, int, int, int], None] | None = None
    """``check_data(layers, length, train_rows, eval_rows)`` raises ValueError unless the gate can
    route rows 0 .. n-1 of both kinds, of ``length`` tokens, in each of the MoE layers. None: it
    routes any data."""
    check_rows: Callable[[bool, np.ndarray, np.ndarray], None] | None = None
    """``check_rows(train, row_N, digest_N)`` raises ValueError unless the rows with these ids, of
    training or held-out data, have the content that the gate's routing was recorded for.
    ``digest_N``: see ``moejax.record.routing.row_digests``. Given only by a gate whose routing
    belongs to certain rows and does not depend on the model. None: any content will do."""

    @property
    def routes_alone(self) -> bool:
        """True if a token that is given without its text is routed as within it, in evaluation."""
        return not (self.reads_past or self.mixes or "sequence" in self.reads)

    @classmethod
    def of(cls, gate: Gate) -> "GateTraits":
        """The gate's traits, or the defaults.

        Raises:
          ValueError: a gate without ``traits`` has a member that belongs there.
        """
        traits = getattr(gate, "traits", None)
        if traits is not None:
            return traits()
        misplaced = [name for name in FORMER_MEMBERS if hasattr(gate, name)]
        if misplaced:
            raise ValueError(
                f"gate {type(gate).__name__} has {', '.join(misplaced)} as members; return them "
                "from its method traits(), see moejax.types.GateTraits"
            )
        return cls()


FORMER_MEMBERS = (
    "mixes", "reads_tokens", "least_rows", "causal", "causal_gate", "frozen", "advice",
    "check_data", "check_rows",
)  # fmt: skip
"""Members by which gates stated these things before ``GateTraits``: refused, or they would be
ignored silently."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """Statistics of one layer's routing, summed over the whole (global) batch.

    Pairs are (token, expert) pairs with positive weight on valid tokens. ``load`` counts them
    before capacity is applied, ``dropped`` those that exceed it.
    """

    tokens: Int[Array, ""]
    load_E: Int[Array, "E"]
    dropped_E: Int[Array, "E"]
    dropped_L: Int[Array, "L"]
    dropped_K: Int[Array, "K"]
    """By column, which is the rank of the choice in top-k gates."""
    unserved_tokens: Int[Array, ""]
    """Tokens without a pair, or whose pairs were all dropped."""
    prob_E: Float[Array, "E"]
    """Router probability summed over valid tokens."""
    entropy: Float[Array, ""]
    """Entropy of the router's distribution in nats, summed over valid tokens."""
    gate: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
    """The gate's ``means`` times valid tokens, summed: divide by ``tokens``."""
    load_ME: Int[Array, "M E"] | None = None
    """Pairs by task (modality); None with a single task."""

    @property
    def pairs(self) -> Int[Array, ""]:
        return jnp.sum(self.load_E)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalStats(MoEStats):
    """The statistics of a call in evaluation, which moves no gate's state."""


class MoEInfo(NamedTuple):
    """The report of ``moejax.MoE`` about a call: the second of its two results."""

    losses: dict[str, Float[Array, ""]]
    """Unweighted auxiliary losses; the balance losses are 1 at perfect balance."""
    stats: MoEStats
    routing: Routing
    kept_GTK: Bool[Array, "G T K"]
    """Active pairs that found room."""
    router: RouterStats
    policy: Policy | None = None
    identity_weight_GT: Float[Array, "G T"] | None = None
    """See ``GateOutput``."""


class MoEOutput(NamedTuple):
    """The result of ``moejax.MoE``: ``y, info = layer(x)``.

    A plain tuple would do, but ``nnx.tabulate`` cannot show one that holds ``MoEInfo``.
    """

    y: Float[Array, "..."]
    info: MoEInfo


Tap = Callable[[Float[Array, "B L D"], MoEInfo], dict[str, Array]]
"""Arrays to record of an MoE layer, from its input and its ``MoEInfo``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerAux:
    """The report of one layer, or of all layers of a model, besides the output.

    For several layers, ``losses`` and ``means`` are means over the layers that have them,
    ``mean_square`` has one value per layer, and the rest leads with the MoE layers.
    """

    losses: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
    """Auxiliary losses, unweighted."""
    means: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
    """Numbers that are neither losses nor routing, logged under their names."""
    stats: MoEStats | None = None
    """None without MoE layers."""
    policy: Policy | None = None
    """For gates trained by policy gradient."""
    taps: dict[str, Array] | None = None
    """The arrays of a ``Tap``; None without one."""
    mean_square: Float[Array, "..."] | None = None
    """Mean square of the output: the first one that is not finite is where a NaN began."""
    memory: Any = None
    """While decoding, what attention keeps of the tokens so far; by layer for several."""

    def joined(self, other: "LayerAux") -> "LayerAux":
        """Both reports about the same layer in one."""
        own, more = (
            {f.name: getattr(a, f.name) for f in dataclasses.fields(a)} for a in (self, other)
        )
        named = {name: {**own.pop(name), **more.pop(name)} for name in ("losses", "means")}
        return LayerAux(**named, **{n: more[n] if x is None else x for n, x in own.items()})

    @classmethod
    def over_layers(cls, layers: Sequence["LayerAux"]) -> "LayerAux":
        """Successive layers' reports in one."""

        def means(dicts: list[dict[str, Array]]) -> dict[str, Array]:
            names = dict.fromkeys(name for one in dicts for name in one)
            return {n: jnp.mean(jnp.stack([d[n] for d in dicts if n in d])) for n in names}

        def of_experts(name: str) -> Any:
            found = [x for layer in layers if (x := getattr(layer, name)) is not None]
            return jax.tree.map(lambda *x: jnp.stack(x), *found) if found else None

        return cls(
            losses=means([layer.losses for layer in layers]),
            means=means([layer.means for layer in layers]),
            **{name: of_experts(name) for name in ("stats", "policy", "taps", "mean_square")},
            memory=tuple(layer.memory for layer in layers),
        )
