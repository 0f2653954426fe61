"""From a workdir to a Hugging Face folder that transformers loads."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import from_dict
from moejax.config.saved import CHECKPOINTS, committed_steps, read_config, read_manifest
from moejax.data.tokenizers.named import FILES, JSON, MODEL, SUFFIX, folder_of
from moejax.errors import UserError
from moejax.hf.families import READABLE
from moejax.hf.fields import Fields, family_for, fields_of
from moejax.hf.imported import COMPANIONS, FOLDER
from moejax.hf.layout import Copy, Plan, plan
from moejax.hf.rows import GATE_STATE
from moejax.hf.tensors import SHARD_BYTES, Described, write_folder
from moejax.record import files
from moejax.tasks.language.task import LanguageModel
from moejax.train.checkpoint.pieces import PieceReader

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "max_position_embeddings",
)
"""Keys that a converted model takes over from the config that it came with."""


def export_model(
    workdir: str | Path,
    out: str | Path,
    step: int | None = None,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a run's checkpoint as a model of a published family.

    Args:
      step: of the checkpoint; None for the newest.
      dtype: of the weights: float32, bfloat16 or float16; "" for that of the model's own config, or
        float32.

    Returns:
      A summary: ``family``, ``step``, ``dtype`` and ``tensors``.

    Raises:
      UserError: no checkpoint, a folder that is in use, or an option that no family has.
    """
    workdir, out = Path(workdir), Path(out)
    saved = read_config(workdir)
    config = from_dict(saved["config"])
    if config.task.name != "language":
        raise UserError(f"task.name={config.task.name} has no published family; use task language")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is in use; name a new folder")
    step = _step(workdir, step)
    manifest = read_manifest(workdir / CHECKPOINTS, step)
    if manifest is None:
        raise UserError(f"checkpoint {step} in {workdir} has no readable manifest; name another")
    arrays = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        for name, (shape, dtype, _) in manifest["arrays"].items()
        if name.startswith(("params/", "gate_state/"))
    }
    config.model.vocab_size = arrays["params/embed_VD"].shape[0]
    fields = fields_of(config)
    scale = absorbed(fields)
    companions = _companions(workdir, config.data.tokenizer)
    theirs = _their_config(companions)
    family, keys = family_for(fields, theirs.get("model_type", ""))
    task = LanguageModel.from_config(config, config.model.vocab_size)
    try:
        copies = plan(family, task.model, arrays)
    except ValueError as error:
        raise UserError(f"{workdir}: {error}") from error
    dtype = dtype or theirs.get("dtype") or theirs.get("torch_dtype") or "float32"
    if dtype not in NAMES:
        raise UserError(f"--dtype={dtype} is unknown; use one of {', '.join(NAMES)}")
    kept = {key: theirs[key] for key in KEPT if key in theirs}
    length = {"max_position_embeddings": _reach(fields, config.train.seq_len)}
    keys = {**keys, **length, **kept, "dtype": dtype, "torch_dtype": dtype}
    source = PieceReader(workdir / CHECKPOINTS / str(step))
    for name in arrays:
        if name.startswith(GATE_STATE) and name not in copies.leading and source.read(name).any():
            raise UserError(
                f"moe.gate.name={config.moe.gate.name}: the gate's state ({name}) is not 0, and "
                f"{family.model_type}, the family that the model fits otherwise, has none"
            )
    tensors = _Tensors(copies, source, dtype, scale)
    with _new_folder(out) as partial:
        write_folder(partial, tensors.described, tensors.value, shard_bytes)
        _copy_companions(companions, config.data.tokenizer, partial)
        files.write_json(partial / "config.json", keys)
    return {
        "family": family.model_type,
        "step": step,
        "dtype": dtype,
        "tensors": len(tensors.described),
    }


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` if the block ends without an error, and is removed if not."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(source: Path, tokenizer: str, target: Path) -> None:
    """Copies the files that came with the model, or the run's own tokenizer."""
    for name in COMPANIONS:
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    own = Path(tokenizer).expanduser()
    if not tokenizer or any((target / name).exists() for name in (JSON, MODEL)):
        return
    if own.is_dir():
        for name in FILES:
            if (own / name).is_file():
                shutil.copyfile(own / name, target / name)
    elif own.is_file():
        shutil.copyfile(own, target / (MODEL if own.suffix == SUFFIX else JSON))


def _step(workdir: Path, step: int | None) -> int:
    steps = committed_steps(workdir / CHECKPOINTS)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint to export; train first")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {workdir}; steps there: {steps}")
    return steps[-1] if step is None else step


def absorbed(fields: Fields) -> float:
    """The factor of embeddings, moved into their matrix, which then is not tied to the output's.

    Families have no such factor, except one whose config can have any. A model of ours has
    sqrt(d_model) unless it says otherwise.
    """
    scale = fields["model.embed_scale"]
    multiplied = (fields["model.residual_scale"], fields["model.logit_scale"]) != (1.0, 1.0)
    if scale == 1.0 or multiplied:
        return 1.0
    fields |= {"model.embed_scale": 1.0, "model.tie_embeddings": False}
    return scale


def _reach(fields: Fields, length: int) -> int:
    """The number of positions in the model's config."""
    if fields["model.rope_scaling"] == "none":
        return length
    return math.ceil(fields["model.rope_trained_length"] * fields["model.rope_factor"])


def _companions(workdir: Path, tokenizer: str) -> Path:
    """The folder of the files that came with the model, which a fine-tuned run shares."""
    beside = folder_of(tokenizer)
    return beside if beside.name == FOLDER and beside.is_dir() else workdir / FOLDER


def _their_config(folder: Path) -> dict[str, Any]:
    """The keys of the config that the model came with, those of its text model in their place."""
    path = folder / "config.json"
    keys = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    family = READABLE.get(keys.get("model_type", ""))
    return {**keys, **keys.get(family.within, {})} if family else keys


class _Tensors:
    """The tensors of an export, read from the checkpoint one at a time."""

    def __init__(self, copies: Plan, source: PieceReader, dtype: str, scale: float):
        self._copies, self._source, self._scale = copies.tensors(), source, scale
        self.described = {
            name: Described("F32" if parts[0].row.wide else NAMES[dtype], parts[0].shape)
            for name, parts in self._copies.items()
        }
        if scale != 1.0 and "lm_head.weight" not in self.described:
            self.described["lm_head.weight"] = self.described[EMBEDDING]

    def value(self, name: str) -> np.ndarray:
        if name not in self._copies:  # the head of a tied model whose embedding has a factor
            return self._of(self._copies[EMBEDDING])
        value = self._of(self._copies[name])
        return value * np.float32(self._scale) if name == EMBEDDING else value

    def _of(self, parts: list[Copy]) -> np.ndarray:
        if parts[0].expert is None:
            return self._piece(parts[0])
        return np.stack([self._piece(part) for part in parts])

    def _piece(self, copy: Copy) -> np.ndarray:
        return copy.row.to_theirs([self._source.read(p.array, p.index) for p in copy.places])


EMBEDDING = "model.embed_tokens.weight"
