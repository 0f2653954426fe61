"""A finished or stopped run, opened for a notebook: ``moejax.load(workdir)``."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Int

from moejax import mesh as meshes
from moejax.analysis import plot
from moejax.analysis.run import RunData
from moejax.config import Config
from moejax.config import load as load_config
from moejax.data.documents import Document, Piece
from moejax.data.source import Source
from moejax.data.tokenizers.interface import Tokenizer
from moejax.data.tokenizers.load import load_tokenizer
from moejax.errors import UserError
from moejax.record.files import read_rows
from moejax.tasks.language.mixture import Mixture
from moejax.tasks.language.source import TextSource
from moejax.tasks.task import Batch, Task
from moejax.train import evaluate
from moejax.types import LayerAux

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class Text:
    """A run's tokenizer: text to token ids and back."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """The token ids of a text."""
        data = text.encode("utf-8")
        document = Document("text", "text", len(data))
        return self.tokenizer.encode([Piece(document, data, is_first=True)])[0].astype(np.int32)

    def decode(self, tokens: Sequence[int] | Array | np.ndarray) -> str:
        """The text of token ids, with replacement characters for incomplete ones."""
        return self.tokenizer.decode(np.asarray(tokens).tolist())


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """One checkpoint of a run, on one device unless a mesh was asked for.

    ``model, state, tokenizer, config = moejax.load(workdir)`` works too.
    """

    workdir: Path
    step: int
    config: Config
    """The config of the training run; ``mesh`` is where the arrays are now."""
    model: Any
    """The NNX module, with the checkpoint's parameters."""
    params: Any
    """The same parameters as a nested dict, for ``task.apply``."""
    state: Any
    """The gates' state; an empty tree for gates without state."""
    tokenizer: Text | None
    """None if the data are not text, or prepared shards (then pass ``tokenizer`` to ``load``)."""
    task: Task
    data: Source
    mesh: jax.sharding.Mesh
    key: Array
    """The run's key, for gates that draw noise in evaluation."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.state, self.tokenizer, self.config))

    def batch(self, number: int = 0) -> Batch:
        """A batch of the run's evaluations: arrays by name, for ``apply``.

        Raises:
          UserError: the number exceeds the number of batches.
        """
        train = self.config.train
        batches = self.data.eval_batches(train.batch_size, train.eval_rows)
        if not 0 <= number < len(batches):
            raise UserError(f"batch({number}): an evaluation has {len(batches)} batches, from 0")
        return {name: jax.numpy.asarray(x) for name, x in batches[number].items()}

    def apply(self, batch: Batch) -> tuple[Any, LayerAux]:
        """The model's predictions for a batch in evaluation, and its layers' report."""
        step = jax.numpy.int32(self.step)
        with jax.set_mesh(self.mesh):
            return self._applied(self.params, self.state, dict(batch), step, self.key)

    def logits(self, text: str | Int[Array, "B L"] | np.ndarray) -> Array:
        """Logits [B, L, V] of a text, or of token ids [B, L], for a language model.

        Raises:
          UserError: the run is of another task, or has no tokenizer for a text.
        """
        if not self.task.causal:
            name = self.config.task.name
            raise UserError(f"logits: task.name={name!r} is no language model; use apply(batch)")
        if isinstance(text, str):
            if self.tokenizer is None:
                raise UserError(
                    f"logits: the data of {self.workdir} are prepared tokens; name their tokenizer "
                    "in moejax.load(workdir, tokenizer='bpe.json'), or give token ids"
                )
            text = self.tokenizer.encode(text)[None]
        token_BL = np.asarray(text, np.int32)
        # Whole routing groups, as the run's batches have; the rows that fill up are padding.
        more = (
            0
            if self.config.moe.group == "sequence"
            else -len(token_BL) % self.config.train.batch_size
        )
        rows = len(token_BL) + more
        batch = {
            # A target for each token is in a batch, which logits do not depend on.
            "tokens": jax.numpy.asarray(np.pad(token_BL, ((0, more), (0, 1)))),
            "valid": jax.numpy.broadcast_to(
                np.arange(rows)[:, None] < len(token_BL), (rows, token_BL.shape[1])
            ),
            "row": jax.numpy.arange(rows, dtype=np.int32),
        }
        return self.apply(batch)[0][: len(token_BL)]

    @functools.cached_property
    def recorded(self) -> RunData:
        """The run's files, for the functions of ``moejax.analysis``."""
        return RunData.read(self.workdir)

    def metrics(self) -> "pandas.DataFrame":
        """metrics.jsonl as a pandas table, a row each (docs/recorded.md names the columns)."""
        return _table(self.workdir / "metrics.jsonl")

    def timings(self) -> "pandas.DataFrame":
        """timings.jsonl as a pandas table."""
        return _table(self.workdir / "timings.jsonl")

    def figures(self) -> list[str]:
        """The names of this run's figures in the report."""
        return list(plot.figures(self.recorded))

    def figure(self, name: str) -> Any:
        """A figure of the report as a ``plotly.graph_objects.Figure``, by its name or a prefix.

        Raises:
          UserError: there is no such figure; the message lists the names.
        """
        return plot.figure(self.recorded, name)

    @functools.cached_property
    def _applied(self) -> Any:
        return jax.jit(functools.partial(self.task.apply, train=False))


def load(
    workdir: str | Path,
    step: int | None = None,
    *,
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    mesh: Mapping[str, int] | None = None,
) -> LoadedRun:
    """Open a run's checkpoint: model, gate state, tokenizer, config and recorded files.

    Args:
      workdir: the run's folder.
      step: the checkpoint's step; None for the newest intact one.
      overrides: ``field=value`` for fields that differ from the run's, such as
        ``moe.eval_transport=cells``.
      tokenizer: the file of the tokenizer, where the data are prepared shards.
      mesh: devices by axis, such as ``{"expert": 4}``; one device if None.

    Raises:
      UserError: no run, no such checkpoint, other data than the run's, or a wrong override.
    """
    folder = Path(workdir).expanduser()
    if (folder / "sweep.json").exists():
        raise UserError(f"moejax.load({str(workdir)!r}): it is a sweep; name one of its trials/")
    source = str(folder / "config.json")
    config = load_config(source, list(overrides)).config
    shape = dict.fromkeys(meshes.AXES, 1) | dict(mesh or {})
    there = load_config(source, [*overrides, *(f"mesh.{axis}={n}" for axis, n in shape.items())])
    with evaluate.open_run(there.config, str(folder), step) as found:
        run, state = found.run, found.state
        model = run.task.built(state.params)
    return LoadedRun(
        workdir=folder,
        step=found.step,
        config=config,
        model=model,
        params=state.params,
        state=state.gate_state,
        tokenizer=_tokenizer(run.data, tokenizer),
        task=run.task,
        data=run.data,
        mesh=run.mesh,
        key=jax.random.wrap_key_data(state.key),
    )


def _tokenizer(data: Source, path: str) -> Text | None:
    if path:
        return Text(load_tokenizer(path))
    if isinstance(data, TextSource | Mixture) and data.corpus.origin:
        return Text(data.corpus.origin.tokenizer)
    return None


def _table(path: Path) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError as error:
        raise UserError(
            "tables need pandas: pip install pandas; moejax.record.files.read_rows gives dicts"
        ) from error
    return pandas.DataFrame(read_rows(path))
