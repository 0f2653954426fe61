"""Restoring checkpoints: only a state that passes every check is returned.

Orbax does not notice a flipped bit in the payload, casts dtypes without a message, returns a
description in the place of a missing array and takes an empty folder for the newest step. So a
checkpoint counts as good if its manifest matches its digest and describes the requested state, and
every restored array has the checksum in the manifest.

Layout: ``<directory>/<step>/state`` (arrays) and ``<directory>/<step>/meta`` (manifest).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tensorstore as ts

from moejax.config.saved import committed_steps
from moejax.errors import UserError
from moejax.record.files import parsed
from moejax.train.checkpoint.checksum import checksums
from moejax.train.checkpoint.manifest import (
    Damaged,
    check_same_tree,
    decode,
    entries,
    from_array,
    named_leaves,
    stored_as,
)
from moejax.train.processes import from_first, shared_problem


@dataclass(frozen=True)
class Restored:
    """A verified state, the step it belongs to and the `meta` it was saved with."""

    step: int
    state: Any
    meta: dict[str, Any]


class Part(NamedTuple):
    """A part of a checkpoint: names that begin with ``prefix`` and have no folder ``without``."""

    prefix: str = ""
    without: str = ""

    def has(self, name: str) -> bool:
        return name.startswith(self.prefix) and not (self.without and f"/{self.without}/" in name)


WHOLE = Part()


def newest_good(
    directory: Path, abstract: Any, part: Part, reject: Callable[[int, str], None]
) -> tuple[Restored | None, list[int]]:
    """The newest good checkpoint, and the newer steps, which were passed to `reject`."""
    rejected: list[int] = []
    while True:
        untried = [step for step in committed_steps(directory) if step not in rejected]
        step = from_first(max(untried, default=-1))
        if step < 0:
            return None, rejected
        try:
            return _load(directory, step, abstract, part), rejected
        except Damaged as damage:
            rejected.append(step)
            reject(step, str(damage))


def exactly(directory: Path, step: int, abstract: Any, part: Part = WHOLE) -> Restored:
    """Checkpoint `step`, or a UserError."""
    steps = committed_steps(directory)
    if not from_first(step in steps):
        listed = ", ".join(map(str, steps)) or "none"
        raise UserError(f"no checkpoint of step {step} in {directory}; steps there: {listed}")
    try:
        return _load(directory, step, abstract, part)
    except Damaged as damage:
        raise UserError(f"checkpoint {step} in {directory} is damaged: {damage}") from damage


def one_line(error: BaseException) -> str:
    """The root cause on one line of moderate length; tensorstore writes kilobytes."""
    error = _root(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _load(directory: Path, step: int, abstract: Any, part: Part) -> Restored:
    """Reads and verifies one checkpoint, or a part of it, onto abstract's shardings.

    All processes agree after each stage, because the next stage needs all of them.

    Raises:
      Damaged: on every process, if it is on one of them.
      UserError: if the checkpoint is intact and describes another tree.
    """
    folder = directory / str(step)
    with _agreement():
        about = decode(_read_json(folder / "meta"), step)
    leaves = {part.prefix + name: leaf for name, leaf in named_leaves(abstract).items()}
    saved = {name: entry for name, entry in about.arrays.items() if part.has(name)}
    wanted = entries(leaves)
    check_same_tree(saved, wanted, f"checkpoint {step} in {directory}")
    with _agreement():
        arrays = _read_arrays(folder / "state", leaves)
    sums, diverged = checksums(arrays)
    for name, checksum in sums.items():
        if checksum != saved[name].checksum or name in diverged:
            raise Damaged(f"array {name} ({saved[name]}) does not match its checksum")
    values = [from_array(arrays[name], leaf) for name, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(abstract), values)
    return Restored(step, state, about.meta)


@contextmanager
def _agreement() -> Iterator[None]:
    """Raises `Damaged` on every process if the body raised it on one."""
    problem = ""
    try:
        yield
    except Damaged as damage:
        problem = str(damage)
    problem = shared_problem(problem)
    if problem:
        raise Damaged(problem)


def _read_json(folder: Path) -> Any:
    with _ReadErrors(folder, "its manifest"):
        return parsed((folder / "metadata").read_bytes())


def _read_arrays(folder: Path, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The stored arrays of described leaves, on the leaves' shardings.

    Every process reads the blocks of its own devices, directly with TensorStore: orbax's reader
    ends with a barrier, at which the other processes would wait for one that found damage, and
    leaves coroutines behind that print tracebacks.
    """
    files = {"driver": "file", "path": f"{folder}/"}
    context = ts.Context({"cache_pool#index": {"total_bytes_limit": 100_000_000}})
    stored = {name: stored_as(leaf) for name, leaf in leaves.items()}
    opening = {}
    for name in stored:
        store = {
            "driver": "ocdbt",
            "base": files,
            "path": f"{name}/",
            "cache_pool": "cache_pool#index",
        }
        spec = {"driver": "auto", "kvstore": store}
        opening[name] = ts.open(spec, open=True, read=True, context=context)
    arrays = {}
    for name, x in stored.items():
        if not x.size:  # nothing is stored
            arrays[name] = jnp.zeros(x.shape, x.dtype, device=x.sharding)
            continue
        with _ReadErrors(folder, f"array {name}"):
            arrays[name] = _read_onto_devices(opening[name].result(), x)
    return arrays


def _read_onto_devices(source: ts.TensorStore, x: jax.ShapeDtypeStruct) -> jax.Array:
    if (source.shape, source.dtype.numpy_dtype) != (x.shape, x.dtype):
        raise Damaged(f"its files hold {source.dtype.numpy_dtype}{list(source.shape)} for {x}")
    assert x.sharding is not None
    blocks = {}  # by index: a block that several devices hold is read once
    for index in x.sharding.addressable_devices_indices_map(x.shape).values():
        blocks.setdefault(repr(index), source[index].read())
    blocks = {index: block.result() for index, block in blocks.items()}
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: blocks[repr(index)])


class _ReadErrors:
    """Turns the errors of missing, truncated or altered files into `Damaged`.

    Errors of the machine (no memory, too many open files, no permission) say nothing about the
    checkpoint and end the command, so that a good checkpoint is not rejected.
    """

    _DAMAGE = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
    _MACHINE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "CANCELLED")

    def __init__(self, folder: Path, what: str):
        self._folder, self._what = folder, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, ValueError | OSError):
            return
        problem = f"{self._what} cannot be read ({one_line(error)})"
        of_the_machine = any(code in str(error) for code in self._MACHINE)
        if isinstance(error, self._DAMAGE) and not of_the_machine:
            raise Damaged(problem) from error
        raise UserError(f"{self._folder}: {problem}; fix that and run again") from error
