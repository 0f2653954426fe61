r"""Finding 1, context-independent specialisation: the token decides on the expert, not its context.

Two measures of how much a kind of token (its id, its position, its domain, the id before it) says
about its expert:

* The paper's (appendix E): r(kind)_i, the share of the kind's choices that expert i gets, and its
  standard deviation over experts; 0 where all experts get the same, `largest_spread` where a kind
  always gets the same experts. Only kinds with more than `LEAST` occurrences count, and even those
  spread by chance: `Spread` has the same number for shuffled kinds.
* The information I(first choice; kind) as a share of the entropy H(first choice), corrected for
  chance, (I - I_0) / (H - I_0) with I_0 the mean of shuffled kinds: 0 for a router that ignores the
  kind, 1 for one that reads nothing else.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.statistics.balance import entropy
from moejax.analysis.statistics.kinds import mutual_information
from moejax.analysis.statistics.values import ratio
from moejax.contrib.openmoe.interval import Interval, over_rows
from moejax.record.counts import NONE, choice_counts
from moejax.record.routing import Routed

LEAST = 128
"""A kind counts with more occurrences than this (Xue et al., appendix E)."""

SHUFFLES = 20
SEED = 0

TOKEN, PREVIOUS, POSITION, DOMAIN = "token id", "previous token id", "position", "domain"
CONTEXTS = (PREVIOUS, POSITION, DOMAIN)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Standard deviation over experts of r(kind), for the kinds that occur often.

    ``chance`` and ``chance_high`` are mean and 97.5% quantile, over shuffles, of the mean over
    kinds. ``values`` has a number per kind, ``shuffled`` those of one shuffle.
    """

    kinds: int
    mean: float
    chance: float
    chance_high: float
    largest: float
    values: list[float] = dataclasses.field(repr=False)
    shuffled: list[float] = dataclasses.field(repr=False)

    @property
    def excess(self) -> float:
        """The part that is not chance."""
        return self.mean - self.chance


@dataclasses.dataclass(frozen=True)
class Layer:
    """The measures of one MoE layer, by kind."""

    first: dict[str, Spread]
    """r of first choices: one expert a token."""
    shares: dict[str, Spread]
    """r of all k choices, each 1/k of a token."""
    information: dict[str, float]
    """Corrected for chance, in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """Finding 1 of a run."""

    layers: list[Layer]
    tokens: int
    information: dict[str, Interval]
    """Mean over layers."""
    lead: Interval
    """Information of the token id minus that of the most informative context, mean over layers."""


def largest_spread(num_experts: int, choices: int = 1) -> float:
    r"""The largest standard deviation of r over experts: sqrt(1 / (k E) - 1 / E^2).

    All tokens of the kind get the same k experts: k shares of 1/k, and E - k of 0.
    """
    return float(np.sqrt(1 / (choices * num_experts) - 1 / num_experts**2))


def spread_over_experts(counts_CE: Int[np.ndarray, "C E"]) -> Float[np.ndarray, " C"]:
    """Standard deviation (of E, not E - 1) of each kind's shares; NaN for an absent kind."""
    return ratio(counts_CE, counts_CE.sum(axis=1, keepdims=True)).std(axis=1)


def spread_of(
    choice_TK: Int[np.ndarray, "T K"], kind_T: Int[np.ndarray, " T"], num_experts: int
) -> Spread:
    """The spread of the kinds that occur more than `LEAST` times, and that of shuffled kinds."""
    kinds = int(kind_T.max(initial=-1)) + 1
    often_C = np.bincount(kind_T, minlength=kinds) > LEAST

    def values(kind_T: np.ndarray) -> np.ndarray:
        return spread_over_experts(choice_counts(choice_TK, kind_T, kinds, num_experts)[often_C])

    random = np.random.default_rng(SEED)
    value_C = values(kind_T)
    chance_SC = np.stack([values(random.permutation(kind_T)) for _ in range(SHUFFLES)])
    if not value_C.size:
        nan = float("nan")
        return Spread(0, nan, nan, nan, nan, [], [])
    chance_S = chance_SC.mean(axis=1)
    return Spread(
        kinds=int(often_C.sum()),
        mean=float(value_C.mean()),
        chance=float(chance_S.mean()),
        chance_high=float(np.quantile(chance_S, 0.975)),
        largest=largest_spread(num_experts, choice_TK.shape[1]),
        values=value_C.tolist(),
        shuffled=chance_SC[0].tolist(),
    )


def information(
    expert_T: Int[np.ndarray, " T"], kind_T: Int[np.ndarray, " T"]
) -> tuple[float, float, float]:
    """I, its mean for shuffled kinds I_0, and H, in nats, of the tokens that have an expert."""
    kind_T, expert_T = kind_T[expert_T != NONE], expert_T[expert_T != NONE]
    random = np.random.default_rng(SEED)
    shuffled = (random.permutation(kind_T) for _ in range(SHUFFLES))
    chance = [mutual_information(_table(expert_T, other_T)) for other_T in shuffled]
    table_CE = _table(expert_T, kind_T)
    return mutual_information(table_CE), float(np.mean(chance)), float(entropy(table_CE.sum(0)))


def _table(
    expert_T: Int[np.ndarray, " T"], kind_T: Int[np.ndarray, " T"]
) -> Int[np.ndarray, "C E"]:
    kinds, num_experts = int(kind_T.max(initial=-1)) + 1, int(expert_T.max(initial=-1)) + 1
    return choice_counts(expert_T[:, None], kind_T, kinds, num_experts)


def corrected(measured: float, chance: float, total: float) -> float:
    """(I - I_0) / (H - I_0); NaN where nothing is left to tell (all tokens get one expert)."""
    return float(ratio(np.asarray(measured - chance), np.asarray(total - chance)))


def kinds_of(routed: Routed) -> dict[str, Int[np.ndarray, "N L"]]:
    """The kinds of every token: its id, and its context.

    A row's first token has no token before it, which is a kind of its own.
    """
    token_NL = routed.token_NL.astype(np.int64)
    previous_NL = np.pad(token_NL[:, :-1] + 1, ((0, 0), (1, 0)))
    kinds = {
        TOKEN: token_NL,
        PREVIOUS: previous_NL,
        POSITION: np.broadcast_to(np.arange(token_NL.shape[1]), token_NL.shape),
    }
    if routed.label_NL is not None:
        kinds[DOMAIN] = routed.label_NL.astype(np.int64)
    return kinds


def specialisation(routed: Routed) -> Specialisation:
    """Finding 1 of a text.

    Raises:
      ValueError: fewer rows than intervals need.
    """
    kinds, valid_NL = kinds_of(routed), routed.valid_NL
    layers, chances = [], []
    for layer in routed.layers:
        choice_TK, expert_T = routed.choices(layer)[valid_NL], routed.first(layer)[valid_NL]
        first, shares, corrected_share, chance = {}, {}, {}, {}
        for name, kind_NL in kinds.items():
            kind_T = kind_NL[valid_NL]
            first[name] = spread_of(expert_T[:, None], kind_T, routed.num_experts)
            shares[name] = spread_of(choice_TK, kind_T, routed.num_experts)
            measured = information(expert_T, kind_T)
            corrected_share[name], chance[name] = corrected(*measured), measured[1]
        layers.append(Layer(first, shares, corrected_share))
        chances.append(chance)
    return Specialisation(layers, int(valid_NL.sum()), *_intervals(routed, kinds, chances))


def _intervals(
    routed: Routed, kinds: dict[str, np.ndarray], chances: list[dict[str, float]]
) -> tuple[dict[str, Interval], Interval]:
    """Information by kind, and the token id's lead, as means over layers with intervals.

    Chance is proportional to 1 / tokens, so that of fewer rows follows from that of all.
    """
    first = [routed.first(layer) for layer in routed.layers]

    def mean_share(row_n: np.ndarray, name: str) -> float:
        values = []
        for expert_NL, chance in zip(first, chances, strict=True):
            has_nL = expert_NL[row_n] != NONE
            expert_T, kind_T = expert_NL[row_n][has_nL], kinds[name][row_n][has_nL]
            scale = np.sum(expert_NL != NONE) / has_nL.sum()
            table_CE = _table(expert_T, kind_T)
            total = float(entropy(table_CE.sum(axis=0)))
            values.append(corrected(mutual_information(table_CE), chance[name] * scale, total))
        return float(np.mean(values))

    def lead(row_n: np.ndarray) -> float:
        return mean_share(row_n, TOKEN) - max(
            mean_share(row_n, name) for name in kinds if name in CONTEXTS
        )

    by_kind = {
        name: over_rows(routed.rows, lambda row_n, name=name: mean_share(row_n, name))
        for name in kinds
    }
    return by_kind, over_rows(routed.rows, lead)
