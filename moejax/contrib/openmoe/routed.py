"""How a checkpoint routed the rows of a text."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

NONE = -1
"""An expert that is none: of padding, of an inactive column."""


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """Rows [N] of L positions in M MoE layers, K choices a token.

    ``weight_MNLK`` is 0 where a column is inactive; ``kept_MNLK`` says whether the pair found room.
    ``label_NL`` is the domain of each token, an index into ``names``; None if the text has none.
    """

    expert_MNLK: Int[np.ndarray, "M N L K"]
    weight_MNLK: Float[np.ndarray, "M N L K"]
    kept_MNLK: Bool[np.ndarray, "M N L K"]
    token_NL: Int[np.ndarray, "N L"]
    valid_NL: Bool[np.ndarray, "N L"]
    num_experts: int
    label_NL: Int[np.ndarray, "N L"] | None = None
    names: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return self.expert_MNLK.shape[0]

    @property
    def rows(self) -> int:
        return self.expert_MNLK.shape[1]

    @property
    def active_MNLK(self) -> Bool[np.ndarray, "M N L K"]:
        """Whether the pair was wanted."""
        return (self.weight_MNLK > 0) & self.valid_NL[..., None]

    def choices(self, layer: int) -> Int[np.ndarray, "N L K"]:
        """The experts of a layer's tokens; `NONE` in inactive columns."""
        return np.where(self.active_MNLK[layer], self.expert_MNLK[layer], NONE)

    def first(self, layer: int) -> Int[np.ndarray, "N L"]:
        """The expert with the largest weight of each token; `NONE` for a token without any."""
        weight_NLK = np.where(self.active_MNLK[layer], self.weight_MNLK[layer], 0.0)
        column_NL1 = np.argmax(weight_NLK, axis=-1)[..., None]
        return np.take_along_axis(self.choices(layer), column_NL1, axis=-1)[..., 0]

    def select(self, row_n: Int[np.ndarray, " n"]) -> "Routed":
        """Some of the rows."""
        return dataclasses.replace(
            self,
            expert_MNLK=self.expert_MNLK[:, row_n],
            weight_MNLK=self.weight_MNLK[:, row_n],
            kept_MNLK=self.kept_MNLK[:, row_n],
            token_NL=self.token_NL[row_n],
            valid_NL=self.valid_NL[row_n],
            label_NL=None if self.label_NL is None else self.label_NL[row_n],
        )


def counts(
    choice_TK: Int[np.ndarray, "T K"], kind_T: Int[np.ndarray, " T"], kinds: int, num_experts: int
) -> Int[np.ndarray, "C E"]:
    """Pairs of each kind of token, 0 <= kind < C, and each expert; choices of `NONE` count not."""
    cell_TK = kind_T[:, None] * (num_experts + 1) + choice_TK + 1  # NONE in a column of its own
    counted = np.bincount(cell_TK.reshape(-1), minlength=kinds * (num_experts + 1))
    return counted.reshape(kinds, num_experts + 1)[:, 1:]
