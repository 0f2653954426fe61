"""Rows of a family's table: a tensor of Hugging Face's beside the parameters that it holds."""

import dataclasses
import math

import numpy as np

from moejax.train.parameters import split_name

GATE_STATE = "gate_state/"
"""Begins the paths of arrays of the gate's state, which lead with the MoE layers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A tensor and the parameters of ours that it holds.

    ``theirs``: its name, with ``{layer}`` and ``{expert}`` in the place of numbers. ``ours``: paths
    of parameters below the layer, or of the model for a name without ``{layer}``.

    A parameter is a matrix [in, out]: ``query_DHI`` is [D, HI], ``out_HID`` is [HI, D]. The tensor
    holds its matrices beside each other along ``out``, transposed with ``linear`` (a weight of
    torch.nn.Linear is [out, in]). A ``vector`` is flat.
    """

    theirs: str
    ours: tuple[str, ...]
    linear: bool = True
    vector: bool = False
    join: str = "halves"
    """The order along ``out``: ``halves`` one after the other, ``interleaved`` by turns, ``heads``
    one after the other within each head."""
    stacked: bool = False
    """True if the tensor leads with the experts; a name with ``{expert}`` is of one expert."""
    factor: float = 1.0
    """Theirs divided by ours."""
    wide: bool = False
    """True if the tensor is float32 whatever the model's type."""
    beside: str = ""
    """A parameter without which the tensor does not exist."""
    instead: str = ""
    """A parameter with which the tensor does not exist."""
    zeros: bool = False
    """True for a tensor of zeros in the place of a part that our model does not have, of the shape
    of ``ours``."""

    @property
    def of_experts(self) -> bool:
        """True if the parameters have an axis of experts that the tensor is a place on."""
        return self.stacked or "{expert}" in self.theirs

    def shape(self, ours: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of their tensor (of one expert) for parameters of these shapes."""
        if self.vector:
            return (sum(math.prod(shape) for shape in ours),)
        sizes = [_matrix(name, shape) for name, shape in zip(self.ours, ours, strict=True)]
        rows, columns = sizes[0][0], sum(size[1] for size in sizes)
        return (columns, rows) if self.linear else (rows, columns)

    def to_ours(self, theirs: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """The parameters that a tensor (of one expert) holds."""
        matrix = theirs.T if self.linear and not self.vector else theirs
        if self.factor != 1.0:
            matrix = matrix / np.asarray(self.factor, matrix.dtype)
        sizes = [
            math.prod(shape) if self.vector else _matrix(name, shape)[1]
            for name, shape in zip(self.ours, shapes, strict=True)
        ]
        if self.join == "interleaved":
            parts = [matrix[..., i :: len(sizes)] for i in range(len(sizes))]
        elif self.join == "heads":
            heads = shapes[0][-2]
            whole = matrix.reshape(*matrix.shape[:-1], heads, -1)
            parts = np.split(whole, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)
        else:
            parts = np.split(matrix, np.cumsum(sizes)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_theirs(self, ours: list[np.ndarray]) -> np.ndarray:
        """The tensor (of one expert) that holds these parameters."""
        shapes = [x.shape for x in ours]
        if self.vector:
            parts = [x.reshape(-1) for x in ours]
        else:
            named = zip(self.ours, ours, strict=True)
            parts = [x.reshape(_matrix(name, x.shape)) for name, x in named]
        if self.join == "interleaved":
            matrix = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        elif self.join == "heads":
            apart = [
                x.reshape(*x.shape[:-1], s[-2], s[-1]) for x, s in zip(parts, shapes, strict=True)
            ]
            matrix = np.concatenate(apart, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            matrix = np.concatenate(parts, axis=-1)
        if self.factor != 1.0:
            matrix = matrix * np.asarray(self.factor, matrix.dtype)
        if self.zeros:
            matrix = np.zeros_like(matrix)
        return np.ascontiguousarray(matrix.T if self.linear and not self.vector else matrix)


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter of one layer and one expert."""
    letters = split_name(name.rpartition("/")[2])[1][-len(shape) :]
    rows = 1 if letters[0] in "DR" else len(shape) - 1
    return math.prod(shape[:rows]), math.prod(shape[rows:])
