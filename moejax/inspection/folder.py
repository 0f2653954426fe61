"""The parameters of a Hugging Face model, under our names, read in slices from its files."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from moejax.errors import UserError
from moejax.hf.imported import check_tensors, open_model
from moejax.hf.layout import Copy, plan
from moejax.hf.rows import Row
from moejax.hf.tensors import TensorFolder
from moejax.inspection.stored import Index, Model, Stored
from moejax.tasks.language.task import LanguageModel
from moejax.train.checkpoint.manifest import named_leaves

PARAMS = "params/"


def open_folder(folder: Path, tensors: TensorFolder) -> Model:
    """The model in a folder whose tensors are open.

    Raises:
      UserError: a config or tensors that do not fit each other or any family.
    """
    model = open_model(folder)
    task = LanguageModel.from_config(model.config, model.config.model.vocab_size)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    shapes = named_leaves({"params": params})
    try:
        copies = plan(model.family, task.model, shapes)
    except ValueError as error:
        raise UserError(f"{model.theirs.path}: {error}") from error
    state = task.init_gate_state() if task.model.num_moe_layers else {}
    whole = plan(model.family, task.model, {**shapes, **named_leaves({"gate_state": state})})
    check_tensors(tensors, whole, model)
    pieces: dict[str, dict[Index, tuple[Copy, int]]] = {}
    for copy in copies.copies:
        for number, place in enumerate(() if copy.row.zeros else copy.places):
            pieces.setdefault(place.array, {})[place.index] = copy, number
    sparse = task.model.num_moe_layers
    experts = task.model.moe.num_experts if sparse else 0
    return Model(
        str(folder),
        [
            Stored(
                name.removeprefix(PARAMS),
                tuple(x.shape),
                tensors.dtype(next(iter(pieces[name].values()))[0].theirs),
                _Reader(tensors, pieces[name], tuple(x.shape), copies.leading[name]),
            )
            for name, x in shapes.items()
        ],
        task.model.gate.columns(experts) if sparse else 0,
        experts,
        1.0,
        {"family": model.family.model_type, "tensors": len(tensors.names)},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """Reads an array of ours from the tensors that hold its pieces.

    ``pieces``: the copy of each place on the ``leading`` axes, and the place's number in it.
    """

    tensors: TensorFolder
    pieces: dict[Index, tuple[Copy, int]]
    shape: tuple[int, ...]
    leading: int

    def __call__(self, index: Index) -> np.ndarray:
        """The values at an index; of a piece only the slice of its first axis is read."""
        full = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        outer, inner = full[: self.leading], full[self.leading :]
        return self._outer(outer, (), inner)

    def _outer(self, outer: Index, at: Index, inner: Index) -> np.ndarray:
        if not outer:
            return self._piece(*self.pieces[at], inner)
        first, *rest = outer
        if isinstance(first, int):
            return self._outer(tuple(rest), (*at, first), inner)
        places = range(*first.indices(self.shape[len(at)]))
        return np.stack([self._outer(tuple(rest), (*at, i), inner) for i in places])

    def _piece(self, copy: Copy, number: int, inner: Index) -> np.ndarray:
        row, shapes = copy.row, [place.shape for place in copy.places]
        lead = () if copy.expert is None else (slice(copy.expert, copy.expert + 1),)
        if _slices(row, shapes) and isinstance(inner[0], slice):
            # All but the last axis are one side of a matrix [in, out]; here it is the first alone.
            begin, end, _ = inner[0].indices(shapes[number][0])
            rows = slice(begin, end)
            theirs = self.tensors.read(copy.theirs, lead + _on_input(row, rows))
            shapes = [(end - begin, *shape[1:]) for shape in shapes]
            inner = (slice(None), *inner[1:])
        else:
            theirs = self.tensors.read(copy.theirs, lead)
        theirs = theirs if copy.expert is None else theirs[0]
        return row.to_ours(theirs, shapes)[number][inner]


def _on_input(row: Row, rows: slice) -> tuple[slice, ...]:
    return (slice(None), rows) if row.linear else (rows,)


def _slices(row: Row, shapes: list[tuple[int, ...]]) -> bool:
    """True if a slice of the first axis of ours is a slice of their tensor."""
    return not row.vector and all(len(shape) == 2 for shape in shapes)
