"""The language model in a workdir, with what decoding needs of its checkpoint."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax import mesh as meshes
from moejax.config import Config, settings, validate
from moejax.config.saved import CHECKPOINTS, read_config
from moejax.config.tasks import LANGUAGE
from moejax.config.tree import set_field
from moejax.data.tokenizers.interface import Tokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.data.tokenizers.named import folder_of
from moejax.errors import UserError
from moejax.generate.causal import way_of
from moejax.generate.decode import Weights, apart
from moejax.job.launch import configure_devices
from moejax.tasks.language.task import LanguageModel
from moejax.train import compile_cache, setup
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.checkpoint.restore import Part
from moejax.train.metrics.log import warn
from moejax.train.state import abstract
from moejax.train.workdir.contents import check_identity, missing_checkpoints


class Speaker(NamedTuple):
    """A language model to generate with."""

    task: LanguageModel
    weights: Weights
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    """The tokens that end a text."""
    mesh: Mesh
    step: int


@contextlib.contextmanager
def open_speaker(config: Config, workdir: str, step: int | None) -> Iterator[Speaker]:
    """The model of a run with its newest good checkpoint, or that of ``step``.

    Only parameters and the gates' states are read; the run's text is not needed.

    Raises:
      UserError: no language model, no such checkpoint, a gate that cannot be decoded.
    """
    if config.task.name != LANGUAGE:
        raise UserError(
            f"--workdir={workdir} holds a run of task.name={config.task.name}, which predicts no "
            f"text; name the workdir of a run with task.name={LANGUAGE}"
        )
    for field in ("data.path", "data.eval_path", "train.init_from"):
        set_field(config, field, "")
    visibility = validate(config)
    folder = Path(workdir)
    saved = read_config(folder)
    # A converted model's prompts open as its own file says, also in a workdir older than data.bos.
    is_converted = str(saved.get("source", "")).startswith("hf:")
    tokenizer = load_tokenizer(config.data.tokenizer, "auto" if is_converted else config.data.bos)
    ends = ends_of(config.data.tokenizer, tokenizer)
    task = LanguageModel.from_config(config, tokenizer.vocab_size)
    way_of(task.model)
    configure_devices(config)
    devices = setup.devices_of(config)
    validate(config, len(devices))
    del visibility
    settings.warn_of_changes(saved)
    check_identity(folder, saved)
    missing = missing_checkpoints(folder, saved)
    mesh = meshes.make_mesh({axis: config.mesh[axis] for axis in meshes.AXES}, devices)
    with (
        compile_cache.kept(config.report.compile_cache),
        jax.set_mesh(mesh),
        Checkpointer(folder / CHECKPOINTS, read_only=True) as checkpoints,
    ):
        wanted = abstract(jax.eval_shape(lambda: _arrays(task)), mesh)
        restored = checkpoints.restore(wanted["params"], step=step, part=Part("params/"))
        if restored is None:
            missing = missing and f"{missing}; put the folder back"
            raise UserError(missing or f"{workdir} has no checkpoint to generate with; train first")
        if missing and step is None:
            warn(f"{missing}; that one is used")
        gate_state = wanted["gate_state"]
        if jax.tree.leaves(gate_state):
            part = Part("gate_state/")
            found = checkpoints.restore(gate_state, step=restored.step, part=part)
            assert found is not None
            gate_state = found.state
        key = jax.random.key(config.train.seed)
        weights = Weights(
            apart(restored.state, task.model.num_periods),
            gate_state,
            jnp.int32(restored.step),
            jax.random.key_data(jax.random.fold_in(key, 1)),
        )
    with compile_cache.kept(config.report.compile_cache):
        yield Speaker(task, weights, tokenizer, ends, mesh, restored.step)


def ends_of(path: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text.

    They are ``eos_token_id`` of the ``generation_config.json`` or ``config.json`` beside the
    tokenizer's file, as a converted model has them; otherwise the separator of documents.

    Raises:
      UserError: a file that is no JSON object, or a value that is no token.
    """
    for name in ("generation_config.json", "config.json") if path else ():
        file = folder_of(path) / name
        if not file.is_file():
            continue
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{file} cannot be read ({error}); restore or remove it") from error
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{file}: eos_token_id={ids} must be the numbers of tokens")
        return tuple(ids)
    return (tokenizer.separator,)


def _arrays(task: LanguageModel) -> dict:
    """Parameters and gate states as before the first step, for their shapes."""
    vocab = task.model.vocab_size
    return {
        "params": task.init(jax.random.key(0)),
        "gate_state": task.init_gate_state(lambda: np.ones(vocab, np.int64)),
    }
