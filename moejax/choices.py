"""What a token may see, and the options of Mixture-of-Depths. Needs nothing."""

import dataclasses
import math
from typing import NamedTuple

SCOPES: tuple[str, ...] = ("sequence", "group", "batch")
PREDICTORS: tuple[str, ...] = ("mlp", "router")


class Visibility(NamedTuple):
    """What a token's output may depend on besides its own sequence up to itself.

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
            seen = [w for w in ("future", "others") if getattr(self, f"{phase}_{w}")]
            if seen:
                parts.append(f"{phase}:{'+'.join(seen)}")
        return " ".join(parts)

    def union(self, other: "Visibility") -> "Visibility":
        """Sees whatever either of the two sees."""
        return Visibility(*(a or b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class DepthsConfig:
    """Mixture-of-Depths: which blocks only some tokens pass through, and how many do."""

    capacity: float = 0.0
    """Share of a sequence's tokens that a routed block has room for; 0 routes no block."""
    every: int = 2
    """Every so-manieth block is routed."""
    predictor: str = "mlp"
    """What decides in evaluation: one of ``PREDICTORS``."""

    def check(self, moe_every: int) -> None:
        """Raises ValueError, naming field, value and remedy, when blocks cannot be routed so.

        ``moe_every``: every so-manieth block has experts (0: none). All blocks with experts are
        routed or none is, so that what they count is of the same tokens.
        """
        if not 0.0 <= self.capacity <= 1.0:
            raise ValueError(f"mod_capacity={self.capacity} must lie between 0 (off) and 1")
        if self.every < 1:
            raise ValueError(f"mod_every={self.every} must be at least 1 (all blocks)")
        if self.predictor not in PREDICTORS:
            raise ValueError(
                f"mod_predictor={self.predictor!r} is unknown; use one of {', '.join(PREDICTORS)}"
            )
        if self.capacity and moe_every % self.every:
            raise ValueError(
                f"mod_every={self.every} must divide moe.every={moe_every}, so that all blocks "
                f"with experts are routed; use mod_every={moe_every} or moe.every={self.every}"
            )

    def routes(self, block: int) -> bool:
        """Whether the block at this place of a period, from 0, is routed."""
        return self.capacity > 0 and (block + 1) % self.every == 0

    def chosen(self, length: int) -> int:
        """ceil(capacity n): how many of a sequence's n = ``length`` tokens a routed block takes."""
        # The subtraction keeps 0.1 * 30 at 3 although the product is 3.0000000000000004.
        return max(1, min(math.ceil(self.capacity * length - 1e-9), length))

    @property
    def visibility(self) -> Visibility:
        """Who is among the best C of a sequence depends on later tokens; a prediction does not."""
        return Visibility(train_future=0.0 < self.capacity < 1.0)
