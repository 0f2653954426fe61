"""Finding 2, early routing learning: routing soon reaches its final state.

The same rows, routed at several steps of one run, against their routing at the last:

* router saturation, the share of choices that are the same (Muennighoff et al., arXiv 2409.02060,
  eq. 5), of all k choices and of the first;
* the cosine between r(token id), the shares of experts, then and at last, mean over ids with more
  than `LEAST` occurrences. Shares of different ids are alike too, by as much as `others` says.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.statistics.choices import saturation, saturation_by_chance
from moejax.analysis.statistics.values import ratio
from moejax.contrib.openmoe.tokens import LEAST
from moejax.record.counts import choice_counts, selected
from moejax.record.routing import Routed


@dataclasses.dataclass(frozen=True)
class StepComparison:
    """One step against the last, by MoE layer."""

    step: int
    saturation: list[float]
    first_saturation: list[float]
    cosine: list[float]


@dataclasses.dataclass(frozen=True)
class Early:
    """Finding 2 of a run. At the last step every number is 1 by definition."""

    steps: list[StepComparison]
    last: int
    source: str
    """The routed rows: the recorded probe, or rows that checkpoints were evaluated on."""
    tokens: int
    kinds: int
    """Token ids with more than `LEAST` occurrences."""
    chance: list[float]
    """Saturation of unrelated routing: k / E, by layer."""
    others: list[float]
    """Mean cosine between two different ids at the last step, by layer."""


def early(recordings: Iterable[tuple[int, Routed]], source: str) -> Early:
    """Finding 2 from recordings of the same rows, in order of their steps.

    Raises:
      ValueError: without any recording.
    """
    recorded = list(recordings)
    if not recorded:
        raise ValueError("no recordings")
    last, end = recorded[-1]
    shares = _token_shares(end)
    return Early(
        steps=[_compare(step, routed, end) for step, routed in recorded],
        last=last,
        source=source,
        tokens=int(end.valid_NL.sum()),
        kinds=shares[0].shape[0],
        chance=[saturation_by_chance(_selected(end, layer)) for layer in end.layers],
        others=[cosine_of_others(share_CE) for share_CE in shares],
    )


def cosines(
    then_CE: Float[np.ndarray, "C E"], last_CE: Float[np.ndarray, "C E"]
) -> Float[np.ndarray, " C"]:
    """The cosine of each row with the same row of the other; NaN for a row of zeros."""
    size_C = np.linalg.norm(then_CE, axis=1) * np.linalg.norm(last_CE, axis=1)
    return ratio(np.sum(then_CE * last_CE, axis=1), size_C)


def cosine_of_others(share_CE: Float[np.ndarray, "C E"]) -> float:
    """The mean cosine of two different rows; NaN for fewer than two."""
    unit_CE = ratio(share_CE, np.linalg.norm(share_CE, axis=1, keepdims=True))
    pairs = len(unit_CE) * (len(unit_CE) - 1)
    total = np.square(unit_CE.sum(axis=0)).sum() - len(unit_CE)
    return float(ratio(np.asarray(total), np.asarray(pairs)))


def _compare(step: int, routed: Routed, end: Routed) -> StepComparison:
    at_all, at_first, cosine = [], [], []
    pairs = zip(_token_shares(routed), _token_shares(end), strict=True)
    for layer, (share_CE, last_CE) in enumerate(pairs):
        at_all.append(saturation(_selected(routed, layer), _selected(end, layer)))
        at_first.append(saturation(_selected_first(routed, layer), _selected_first(end, layer)))
        cosine.append(_mean(cosines(share_CE, last_CE)))
    return StepComparison(step, at_all, at_first, cosine)


def _mean(value_C: Float[np.ndarray, " C"]) -> float:
    return float(value_C.mean()) if value_C.size else float("nan")


def _token_shares(routed: Routed) -> list[Float[np.ndarray, "C E"]]:
    """r of the ids that occur often, over all k choices, by layer."""
    token_T = routed.token_NL[routed.valid_NL].astype(np.int64)
    often_V = np.bincount(token_T) > LEAST
    tables = []
    for layer in routed.layers:
        choice_TK = routed.choices(layer)[routed.valid_NL]
        table_CE = choice_counts(choice_TK, token_T, len(often_V), routed.num_experts)[often_V]
        tables.append(ratio(table_CE, table_CE.sum(axis=1, keepdims=True)))
    return tables


def _selected(routed: Routed, layer: int) -> np.ndarray:
    valid_NL = routed.valid_NL
    weight_TK = routed.weight_MNLK[layer][valid_NL]
    return selected(routed.expert_MNLK[layer][valid_NL], weight_TK, routed.num_experts)


def _selected_first(routed: Routed, layer: int) -> np.ndarray:
    expert_T: Int[np.ndarray, " T"] = routed.first(layer)[routed.valid_NL]
    return expert_T[:, None] == np.arange(routed.num_experts)
