"""The parameters of a run's checkpoint, described from its manifest and read in slices."""

from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from moejax.config import from_dict
from moejax.config.build import make_gate
from moejax.config.checks import has_experts
from moejax.config.saved import CHECKPOINTS, committed_steps, read_config
from moejax.errors import UserError
from moejax.inspection.stored import Index, Model, Stored
from moejax.record.files import parsed
from moejax.train.checkpoint.manifest import Damaged, decode

PARAMS = "params/"
CACHE_BYTES = 10**9
"""Decoded chunks that are kept, so that the slices of one chunk decode it once."""


def open_workdir(folder: Path, step: int | None = None) -> Model:
    """The model of a run's newest checkpoint, or of that of ``step``.

    Raises:
      UserError: no such checkpoint, or one whose description is damaged.
    """
    saved = read_config(folder, needs=("config",))
    steps = committed_steps(folder / CHECKPOINTS)
    if not steps or (step is not None and step not in steps):
        listed = f"those there: {', '.join(map(str, steps))}" if steps else "train first"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{wanted} in {folder}; {listed}")
    step = steps[-1] if step is None else step
    place = folder / CHECKPOINTS / str(step)
    try:
        about = decode(parsed((place / "meta" / "metadata").read_bytes()), step)
    except (Damaged, OSError, ValueError) as error:
        raise UserError(
            f"{place / 'meta' / 'metadata'} cannot be read ({' '.join(str(error).split())}); name "
            "another checkpoint with --step"
        ) from error
    config = from_dict(saved["config"])
    sparse = has_experts(config)
    experts = int(config.moe.num_experts) if sparse else 0
    heads = int(config.model.get("moa_experts", 0))
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    return Model(
        str(folder),
        [
            Stored(
                name.removeprefix(PARAMS),
                entry.shape,
                entry.dtype,
                _Reader(place / "state", name, context),
            )
            for name, entry in about.arrays.items()
            if name.startswith(PARAMS)
        ],
        min(make_gate(config).columns(experts), experts) if sparse else 0,
        experts,
        int(config.model.moa_k) / heads if heads else 1.0,
        {"step": step, "gate": config.moe.gate.name if sparse else ""},
    )


class _Reader:
    """Reads slices of one array of a checkpoint."""

    def __init__(self, folder: Path, name: str, context: ts.Context):
        self._folder, self._name, self._context = folder, name, context
        self._array: ts.TensorStore | None = None

    def __call__(self, index: Index) -> np.ndarray:
        try:
            if self._array is None:
                files = {"driver": "file", "path": f"{self._folder}/"}
                store = {"driver": "ocdbt", "base": files, "path": f"{self._name}/"}
                spec = {"driver": "auto", "kvstore": store}
                self._array = ts.open(spec, open=True, read=True, context=self._context).result()
            values = np.asarray(self._array[index].read().result())
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._folder}: array {self._name} cannot be read ({reason}); name another "
                "checkpoint with --step"
            ) from error
        return values.view(ml_dtypes.bfloat16) if values.dtype.kind == "V" else values
