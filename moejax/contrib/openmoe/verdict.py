"""Verdicts on the three findings, by the criteria of docs/openmoe.md."""

from typing import NamedTuple

import numpy as np

from moejax.contrib.openmoe.drops import Arm, Drops
from moejax.contrib.openmoe.early import Early, StepComparison
from moejax.contrib.openmoe.tokens import POSITION, TOKEN, Specialisation, Spread

APPEARS, ABSENT, UNKNOWN = "appears", "does not appear", "cannot say"

TIMES = 2.0
"""Finding 1: ids must spread over experts this many times as much as positions, beyond chance."""
EARLY = 0.2
"""Finding 2 looks at the recording nearest before this share of the steps: the paper's first of
five checkpoints."""
ALIKE = 0.9
"""Finding 2: the least cosine of r of a token at two steps that counts as the same routing."""
TYPICAL = Arm(1.25)
FLAT = Arm(1.25, "gate")


class Verdict(NamedTuple):
    """One finding: its name, whether it appears, and the numbers that say so."""

    finding: str
    answer: str
    because: str

    def __str__(self) -> str:
        return f"{self.finding}: {self.answer}. {self.because}"


def specialisation_verdict(specialisation: Specialisation) -> Verdict:
    """Finding 1, on first choices, means over layers."""
    name = "context-independent specialisation"
    ids = [layer.first[TOKEN] for layer in specialisation.layers]
    positions = [layer.first[POSITION] for layer in specialisation.layers]
    if not ids[0].kinds:
        return Verdict(name, UNKNOWN, "No token id occurs more than 128 times; use more --rows.")
    beyond_ids, beyond_positions = _excess(ids), _excess(positions)
    contexts = {k: v for k, v in specialisation.information.items() if k != TOKEN}
    context = max(contexts, key=lambda kind: contexts[kind].value)
    because = (
        f"Shares of a token id's choices spread over experts by {_mean(ids, 'mean'):.3f} (chance "
        f"{_mean(ids, 'chance'):.3f}, at most {ids[0].largest:.3f}), of a position's by "
        f"{_mean(positions, 'mean'):.3f} (chance {_mean(positions, 'chance'):.3f}). The token id "
        f"tells {specialisation.information[TOKEN].value:.1%} of its first expert, the most "
        f"telling context ({context}) {contexts[context].value:.1%}; lead "
        f"{_percent(specialisation.lead)}."
    )
    if not positions[0].kinds:
        return Verdict(name, UNKNOWN, f"{because} Positions need more than 128 --rows.")
    by_chance = all(spread.mean <= spread.chance_high for spread in ids)
    if by_chance or specialisation.lead.high < 0:
        return Verdict(name, ABSENT, because)
    every_layer = all(spread.mean > spread.chance_high for spread in ids)
    clear = (
        every_layer
        and beyond_ids >= TIMES * max(beyond_positions, 0.0)
        and specialisation.lead.low > 0
    )
    return Verdict(name, APPEARS if clear else UNKNOWN, because)


def early_verdict(early: Early) -> Verdict:
    """Finding 2, means over layers."""
    name = "early routing learning"
    compared = at_early(early)
    if compared is None:
        because = (
            f"No recording of the first {EARLY:.0%} of {early.last} steps, from {early.source}."
        )
        return Verdict(name, UNKNOWN, because)
    if not early.kinds:
        because = f"No token id occurs more than 128 times in {early.source}."
        return Verdict(name, UNKNOWN, because)
    cosine, others = float(np.mean(compared.cosine)), float(np.mean(early.others))
    because = (
        f"At step {compared.step} of {early.last}, token ids' shares of experts have cosine "
        f"{cosine:.3f} with their last ({_untrained(early)}those of other ids {others:.3f}); "
        f"router saturation is {np.mean(compared.saturation):.1%} (chance "
        f"{np.mean(early.chance):.1%}), of first choices {np.mean(compared.first_saturation):.1%}."
    )
    alike = cosine >= ALIKE and 1 - cosine <= (1 - others) / 2
    return Verdict(name, APPEARS if alike else ABSENT, because)


def at_early(finding: Early) -> StepComparison | None:
    """The last recording in the first fifth of the steps; None if there is only the untrained."""
    early = [compared for compared in finding.steps if 0 < compared.step <= EARLY * finding.last]
    return early[-1] if early else None


def drops_verdict(measured: list[Drops]) -> Verdict:
    """Finding 3, first come, first served at 1.25 times the mean load."""
    name = "drop towards the end"
    first_come = {drops.text: drops for drops in measured if drops.arm == TYPICAL}
    flat = next(drops for drops in measured if drops.arm == FLAT)
    own, *others = first_come.values()
    # Parts of the own text are in the sentence, but are no text of another domain.
    texts = [own, *(drops for drops in others if not drops.text.startswith(f"{own.text}, "))]
    rising = [drops for drops in texts if drops.rise.low > 0]
    parts = [_curve(own), *(_compared(drops, own) for drops in others)]
    because = "; ".join(parts) + (
        f". Batch-prioritised, {flat.text} rises by {_percent(flat.rise)}."
    )
    if rising:
        where = "" if own in rising else " out of domain only"
        return Verdict(name, f"{APPEARS}{where}", because)
    falling = all(drops.rise.high <= 0 for drops in texts)
    return Verdict(name, ABSENT if falling else UNKNOWN, because)


def _curve(drops: Drops) -> str:
    return (
        f"{drops.text}: from {drops.early.value:.1%} of choices in the first quarter to "
        f"{drops.late.value:.1%} in the last, a rise of {_percent(drops.rise)}"
    )


def _compared(drops: Drops, own: Drops) -> str:
    if drops.late.low > own.late.high:
        word = "more"
    elif drops.late.high < own.late.low:
        word = "less"
    else:
        word = "not distinguishable"
    return (
        f"{drops.text}: {drops.late.value:.1%} in the last quarter ({word}), a rise of "
        f"{_percent(drops.rise)}"
    )


def _excess(spreads: list[Spread]) -> float:
    return float(np.mean([spread.excess for spread in spreads]))


def _mean(spreads: list[Spread], field: str) -> float:
    return float(np.mean([getattr(spread, field) for spread in spreads]))


def _untrained(early: Early) -> str:
    first = early.steps[0]
    return f"untrained {np.mean(first.cosine):.3f}, " if first.step == 0 else ""


def _percent(interval: object) -> str:
    """An interval of a share, in points."""
    value, low, high = (100 * getattr(interval, field) for field in ("value", "low", "high"))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
