"""From a Hugging Face folder to a workdir: config, tokenizer and weights."""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import Config, settings, validate
from moejax.config.overrides import apply_overrides
from moejax.config.saved import CHECKPOINTS, holds_run, write_config
from moejax.data.shards import is_prepared
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.named import JSON, MODEL
from moejax.errors import UserError, suggest
from moejax.hf.families import READABLE, Family
from moejax.hf.fields import config_of
from moejax.hf.keys import Theirs
from moejax.hf.layout import Plan, plan
from moejax.hf.tensors import DTYPES, TensorFolder
from moejax.train import setup
from moejax.train.checkpoint.manifest import as_array, named_leaves
from moejax.train.checkpoint.pieces import PieceWriter
from moejax.train.setup import Run
from moejax.train.workdir.contents import check_workdir, note_saved
from moejax.train.workdir.origin import origin
from moejax.train.workdir.run_record import about_run

FOLDER = "hf"
"""The folder of a workdir with the files of the model's authors but its weights."""

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "README.md",
)
"""Files that come along where they exist."""

SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "tiktoken.model")
"""Tokenizers of other libraries, which are not read."""

LONGEST = 2048
"""The most tokens of a sequence in evaluation and fine-tuning, unless ``train.seq_len`` says."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in a Hugging Face folder: its family and its config in our fields."""

    folder: Path
    family: Family
    theirs: Theirs
    config: Config


def open_model(folder: str | Path, overrides: Sequence[str] = ()) -> Model:
    """Reads a model's config.

    Raises:
      UserError: no config.json, an unknown architecture, a value that is not supported, or an
        override that is wrong.
    """
    folder = Path(folder)
    theirs = _their_config(folder)
    family = READABLE[theirs.get("model_type")]
    if family.within:
        theirs = _part(theirs, family.within)
    try:
        fields = family.read(theirs)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"{theirs.path} holds a value that no {family.model_type} has "
            f"({type(error).__name__}: {error}); restore the model's own config.json"
        ) from error
    length = theirs.whole("max_position_embeddings", 0)
    own: dict[str, Any] = {
        "train.seq_len": min(length or LONGEST, LONGEST),
        "train.batch_size": 8,
        "train.steps": 1,
        "optim.name": "sgd",
        "optim.b1": 0.0,
        "optim.clip_norm": 0.0,
    }
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        own["data.tokenizer"] = str(tokenizer.absolute())
    try:
        config = config_of({**fields, **own})
        validate(config)
    except UserError as error:
        raise UserError(f"{theirs.path}: {error}") from error
    apply_overrides(config, overrides)
    return Model(folder, family, theirs, config)


def import_model(
    folder: str | Path, workdir: str | Path, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Makes the workdir of a run whose checkpoint of step 0 has the model's weights.

    Weights are copied piece by piece, so that one tensor is in memory at a time.

    Returns:
      A summary: ``family``, ``parameters`` and ``tensors``.

    Raises:
      UserError: see ``open_model``; a tokenizer that does not fit; tensors that are missing, left
        over or of another shape; a workdir that is in use. Then nothing is made.
    """
    workdir = Path(workdir)
    if holds_run(workdir):
        raise UserError(f"--workdir={workdir} holds a run; name a new folder")
    model = open_model(folder, overrides)
    _check_vocabulary(model.config, model.theirs, model.folder)
    with TensorFolder(folder) as tensors:
        run = setup.prepare(model.config)
        check_workdir(workdir, run.config, run.data.fingerprint)
        arrays = named_leaves(run.abstract_state)
        try:
            copies = plan(model.family, run.task.model, arrays)
        except ValueError as error:
            raise UserError(f"{model.theirs.path}: {error}; set that option back") from error
        check_tensors(tensors, copies, model)
        content = _record(run, model, workdir, overrides)
        partial = workdir.with_name(f".{workdir.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write_config(partial, content)
            _copy_companions(model.folder, partial / FOLDER)
            _write_weights(partial / CHECKPOINTS, run, tensors, copies, content)
            note_saved(partial)
            if workdir.is_dir():
                workdir.rmdir()
            partial.rename(workdir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {
        "family": model.family.model_type,
        "parameters": content["parameters"],
        "tensors": len(copies.tensors()),
    }


def _their_config(folder: Path) -> Theirs:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of a Hugging Face model")
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name the folder of a Hugging Face model"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    theirs = Theirs(keys, str(path))
    kind = theirs.get("model_type", None)
    if kind not in READABLE:
        raise UserError(
            f"{path}: model_type={kind!r} is not supported; {suggest(str(kind), READABLE)}"
        )
    if theirs.get("quantization_config", None):
        raise UserError(
            f"{path}: quantization_config: the weights are quantised; save the model in bfloat16 "
            "(from_pretrained with dequantize=True, then save_pretrained)"
        )
    return theirs


def _part(theirs: Theirs, key: str) -> Theirs:
    """The config of the text model."""
    part = theirs.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{theirs.path}: {key} is not a JSON object; download it again")
    return Theirs(part, theirs.path)


def _check_vocabulary(config: Config, theirs: Theirs, folder: Path) -> None:
    """Checks that the tokenizer has no more tokens than the model.

    Raises:
      UserError: it has, or the model's own is not of the kind that is read.
    """
    path, size = config.data.tokenizer, config.model.vocab_size
    if config.data.path and is_prepared(os.path.expanduser(config.data.path)):
        return  # shards have their own tokenizer
    slow = [name for name in SLOW_TOKENIZERS if (folder / name).is_file()]
    if slow and not path:
        raise UserError(
            f"{folder} has {slow[0]} but no tokenizer.json, and bytes are not this model's tokens; "
            "save the fast tokenizer there (save_pretrained of transformers' AutoTokenizer), or "
            "name one with --config.data.tokenizer"
        )
    count = load_tokenizer(path).vocab_size
    if count > size and path:
        raise UserError(
            f"{path} has {count} tokens, but {theirs.path} says vocab_size={size}; name the "
            "model's own tokenizer with --config.data.tokenizer"
        )
    if count > size:
        raise UserError(
            f"{folder} has no tokenizer.json, and vocab_size={size} of {theirs.path} is too small "
            f"for bytes as tokens ({count}); put the model's tokenizer.json there, or name it with "
            "--config.data.tokenizer"
        )


def check_tensors(tensors: TensorFolder, copies: Plan, model: Model) -> None:
    """Checks the names and shapes of all tensors.

    Raises:
      UserError: one is missing, left over, or has another shape than the config says.
    """
    wanted = copies.tensors()
    for name, parts in wanted.items():
        if name not in tensors:
            raise UserError(
                f"{tensors.folder} has no tensor {name!r}, which {model.theirs.path} asks for; "
                "download the model again"
            )
        shape = parts[0].shape
        if tensors.shape(name) != shape:
            raise UserError(
                f"{tensors.file(name)}: tensor {name!r} has shape {list(tensors.shape(name))}, but "
                f"{model.theirs.path} says {list(shape)}; they are of different models"
            )
        if tensors.dtype(name) not in DTYPES:
            raise UserError(
                f"{tensors.file(name)}: tensor {name!r} is of type {tensors.dtype(name)}; save the "
                "model in bfloat16, float16 or float32"
            )
    layers = model.config.model.num_layers
    extra = [name for name in tensors.names if name not in wanted]
    ignored, prefix = model.family.ignored, model.family.prefix
    for name in extra:
        own = name.removeprefix(prefix)
        if name.startswith(ignored) or name.endswith(ignored) or _beyond(own, layers):
            continue
        if own == "lm_head.weight" and model.config.model.tie_embeddings:
            continue
        raise UserError(
            f"{tensors.file(name)}: tensor {name!r} is not part of a {model.family.model_type} "
            f"with this {model.theirs.path}; they are of different models"
        )


def _beyond(name: str, layers: int) -> bool:
    """True for a tensor of layers after the last: heads that predict several tokens."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and parts[2].isdecimal() and int(parts[2]) >= layers


def _record(run: Run, model: Model, workdir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The content of config.json, with the tokenizer's path in the workdir."""
    config = run.config.copy_and_resolve_references()
    own, kept = model.folder.absolute(), (workdir / FOLDER).absolute()
    copies = {own: kept, **{own / name: kept / name for name in (JSON, MODEL)}}
    tokenizer = Path(config.data.tokenizer).expanduser().absolute()
    if config.data.tokenizer and tokenizer in copies:
        config.data.tokenizer = str(copies[tokenizer])
    return {
        **about_run(dataclasses.replace(run, config=config)),
        "source": f"hf:{model.folder}",
        "overrides": list(overrides),
        **origin(),
        "environment": settings.environment(),
        "devices": {"kind": run.mesh.devices.flat[0].device_kind, "count": run.mesh.size},
        "id": secrets.token_hex(8),
        "baselines": run.data.baselines(),
        "history": [],
    }


def _copy_companions(source: Path, target: Path) -> None:
    target.mkdir()
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_weights(
    directory: Path, run: Run, tensors: TensorFolder, copies: Plan, content: Mapping[str, Any]
) -> None:
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in named_leaves(run.abstract_state).items()
    }
    meta = {"fingerprint": run.data.fingerprint, "run": content, "logs": {}, "probe": []}
    with PieceWriter(directory, 0, arrays, copies.leading, meta) as writer:
        written = set()
        for copy in copies.copies:
            part = () if copy.expert is None else (slice(copy.expert, copy.expert + 1),)
            theirs = tensors.read(copy.theirs, part)
            theirs = theirs if copy.expert is None else theirs[0]
            values = copy.row.to_ours(theirs, [place.shape for place in copy.places])
            for place, value in zip(copy.places, values, strict=True):
                writer.put(place.array, place.index, value)
                written.add(place.array)
        for name, value in _other_leaves(run):
            if name not in written:
                writer.put(name, (), value)


def _other_leaves(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """The state's arrays besides the parameters; the parameters are never made."""
    rest = jax.jit(lambda: dataclasses.replace(run.fresh_state(), params=()))()
    for name, leaf in named_leaves(rest).items():
        yield name, np.asarray(as_array(leaf))
