"""Checkpoints: asynchronous saves, and restores that verify and skip corrupt checkpoints.

Orbax writes the arrays, every process its own shards, and commits a step by a rename, so a killed
save leaves no step behind. Restores (`restore.py`) are checked against the manifest that is saved
with the arrays (`manifest.py`). A corrupt step is moved to ``<directory>_bad/<step>-<n>``, never
deleted.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moejax.config.saved import committed_steps
from moejax.errors import UserError
from moejax.record import files
from moejax.train.checkpoint import manifest as manifests
from moejax.train.checkpoint.checksum import checksums
from moejax.train.checkpoint.manifest import Manifest
from moejax.train.checkpoint.restore import WHOLE, Part, Restored, exactly, newest_good, one_line
from moejax.train.processes import from_first, is_first


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without its handling of preemption, which the training loop does.

    At a step that JAX's preemption service names, orbax computes the time since the last save. For
    a checkpoint from before it started that time has no zone (``lightweight_initialize``), and the
    subtraction raises a TypeError, after which no old checkpoint is removed.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores the training state in `directory`.

    A state is any pytree of arrays; typed PRNG keys are welcome. In a job of several processes all
    of them make the same calls, and every leaf is an array over the whole mesh.

    Args:
      directory: made on the first save.
      keep: the number of newest checkpoints to keep, at least 1. With 1 there is no older one to
        fall back to.
      read_only: never save, move or delete anything; for readers of a run that may be running.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise UserError(f"train.keep_checkpoints={keep} must be at least 1")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._reported: int | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Committed steps, ascending, without saves that are still running or were killed."""
        return committed_steps(self._directory)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Starts saving `state` and returns once it may be overwritten (donated).

        Waits for the save before it. `meta` is a JSON object. Returns False, and does nothing, if
        the step exists already.

        Raises:
          UserError: if this save or the one before it could not be written.
        """
        if self._read_only:
            raise ValueError("this Checkpointer is read only")
        self.wait()
        if from_first(step in self.steps()):
            return False
        leaves = manifests.named_leaves(state)
        arrays = {name: manifests.as_array(leaf) for name, leaf in leaves.items()}
        sums, diverged = checksums(arrays)
        if diverged and is_first():
            more = f" and {len(diverged) - 1} more arrays" if len(diverged) > 1 else ""
            _warn(
                f"at step {step} devices hold different copies of {diverged[0]}{more}: a hardware "
                "fault or a kernel that is not deterministic; the first copy is saved"
            )
        entries = manifests.entries(leaves, sums)
        about = manifests.encode(Manifest(step, entries, dict(meta)))
        stored = {name: x for name, x in arrays.items() if x.size}  # orbax takes no empty arrays
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(stored), meta=ocp.args.JsonSave(about))
        with self._write_errors(step):
            self._open().save(step, args=items, force=True)
        self._saving = step
        return True

    def wait(self) -> None:
        """Blocks until the last save is committed.

        Raises:
          UserError: if it could not be written. Earlier checkpoints are untouched.
        """
        step, self._saving = self._saving, None
        if step is not None:
            with self._write_errors(step):
                self._open().wait_until_finished()

    def just_committed(self) -> bool:
        """True at the first call after the last save has been committed."""
        step = self._saving
        if step is None or step == self._reported or step not in self.steps():
            return False
        self._reported = step
        return True

    def close(self) -> None:
        """Waits and releases the threads; raises as `wait` does."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(
        self, abstract_state: Any, *, step: int | None = None, part: Part = WHOLE
    ) -> Restored | None:
        """The newest checkpoint that passes every check, or None if there has never been one.

        A corrupt one is moved aside with a line on stderr, and the one before it is tried.

        Args:
          abstract_state: the state or its description: leaves with `shape`, `dtype` and the
            `sharding` to restore onto, over any mesh.
          step: restore this one, or fail and move nothing.
          part: the part of the checkpoint that `abstract_state` describes.

        Raises:
          UserError: if all are corrupt, if `step` is missing or corrupt, or if an intact checkpoint
            holds another tree, shape or dtype (then nothing is moved).
        """
        self.wait()
        if step is not None:
            return exactly(self._directory, step, abstract_state, part)
        restored, rejected = newest_good(self._directory, abstract_state, part, self._reject)
        bad = self._bad_folder()
        if restored is None and (rejected or from_first(bad.is_dir() and any(bad.iterdir()))):
            raise UserError(
                f"{self._directory} holds no usable checkpoint (damaged ones are in "
                f"{self._directory if self._read_only else bad}); put a good copy back, or remove "
                "the damaged ones to start again at step 0"
            )
        if rejected and self._manager is not None:
            self._manager.reload()
        return restored

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                cleanup_tmp_directories=True,  # of killed saves
                lightweight_initialize=True,  # does not fail on corrupt metadata of an old step
            )
            logging.getLogger("absl").addFilter(_not_an_orbax_traceback)
            if sys.unraisablehook is sys.__unraisablehook__:  # not replaced by others
                sys.unraisablehook = _hide_late_writes
            # By default orbax composes an array from pieces of all its copies. If these differed,
            # the result would be none of them; so the first copy is saved, as in the checksum.
            one_copy = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
            types = ocp.type_handlers.create_type_handler_registry((jax.Array, one_copy))
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            handlers.add(
                "state",
                ocp.args.PyTreeSave,
                ocp.PyTreeCheckpointHandler(type_handler_registry=types),
            )
            self._manager = _Manager(self._directory, options=options, handler_registry=handlers)
        return self._manager

    def _bad_folder(self) -> Path:
        return self._directory.with_name(self._directory.name + "_bad")

    def _reject(self, step: int, problem: str) -> None:
        if is_first():
            action = "skipped" if self._read_only else f"moved to {self._move_aside(step)}"
            _report(self._directory, step, problem, action)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moejax checkpoint {step} rejected")

    def _move_aside(self, step: int) -> Path:
        """Moves a step to the first free `<directory>_bad/<step>-<n>`, by a rename."""
        bad = self._bad_folder()
        with files.writing(bad):
            bad.mkdir(exist_ok=True)
        n = 0
        while (bad / f"{step}-{n}").exists():
            n += 1
        return (self._directory / str(step)).rename(bad / f"{step}-{n}")

    @contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            # A manager that failed fails again at its next call; the next save makes a new one,
            # which also removes the files that this save has left.
            if self._manager is not None:
                with suppress(ValueError, OSError, RuntimeError):
                    self._manager.close()
                self._manager = None
            kept = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"checkpoint {step} could not be written to {self._directory}: "
                f"{one_line(error)}; make room or fix the disk and run again "
                f"(checkpoints kept: {kept})"
            ) from error


def restore_subtree(directory: str | Path, abstract_subtree: Any, key: str = "params") -> Restored:
    """The part `key` of the newest good checkpoint in `directory`, verified, for a warm start.

    Reads only the arrays of that part and changes nothing in `directory`: corrupt checkpoints are
    skipped with a line on stderr. Leaves are described as in `Checkpointer.restore`.

    Raises:
      UserError: if no checkpoint is usable or the part has another tree, shape or dtype.
    """
    directory = Path(directory).absolute()

    def skip(step: int, problem: str) -> None:
        if is_first():
            _report(directory, step, problem, "skipped")

    restored, rejected = newest_good(directory, abstract_subtree, Part(f"{key}/"), skip)
    if restored is None:
        present = "only damaged ones" if rejected else "none"
        raise UserError(f"no checkpoint to start from in {directory}: found {present}")
    return restored


def _report(directory: Path, step: int, problem: str, action: str) -> None:
    _warn(
        f"checkpoint {step} in {directory} is damaged: {problem}; {action}, trying the one before"
    )


def _warn(message: str) -> None:
    print(f"moejax: {message}", file=sys.stderr, flush=True)


def _hide_late_writes(error: Any) -> None:
    """An unraisablehook that hides errors of tensorstore's threads after orbax has given up a save.

    Every write under way then finds orbax's event loop closed, which would print dozens of
    tracebacks beside the one line about a full disk.
    """
    late = error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"
    if not (late and error.object is None):
        sys.__unraisablehook__(error)


def _not_an_orbax_traceback(record: logging.LogRecord) -> bool:
    """False for tracebacks that orbax logs, several times, for an error that it also raises."""
    return not (record.exc_info and "orbax" in record.pathname)
