"""Copies of the scalars of ``metrics.jsonl`` and ``timings.jsonl`` in TensorBoard and wandb."""

import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moejax.errors import UserError
from moejax.record.files import write_whole, writing
from moejax.train.processes import is_first


class Mirror(Protocol):
    """Takes scalars by name, such as ``eval/loss``; ``metrics.jsonl`` stays the source of truth."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check(tensorboard: bool, wandb: bool) -> None:
    """Checks that mirrors can be made, before a run makes anything.

    Raises:
      UserError: a package is not installed, or wandb has no account.
    """
    if tensorboard:
        _tensorboard("report.tensorboard=True")
    if wandb:
        package = _wandb()
        if is_first():  # the only one that writes there
            _check_login(package)


def _check_login(wandb: Any) -> None:
    try:
        ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:  # pydantic's, for an invalid variable of wandb's
        raise UserError(_no_start(error)) from error
    if not ready:
        raise UserError(_no_start("it has no account here"))


def _no_start(reason: Any) -> str:
    return (
        f"report.wandb=True: wandb does not start ({' '.join(str(reason).split())}); run `wandb "
        "login`, or set WANDB_MODE=offline"
    )


def _tensorboard(asked: str) -> Any:
    try:
        import tensorboardX
        import tensorboardX.proto.event_pb2
        import tensorboardX.record_writer
        import tensorboardX.summary
    except ImportError as error:
        raise UserError(
            f"{asked} needs tensorboardX; pip install 'moejax[tensorboard]' or leave it out"
        ) from error
    return tensorboardX


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "report.wandb=True needs wandb; pip install 'moejax[wandb]' or set it to False"
        ) from error
    return wandb


class TensorBoard:
    """An event file in a folder, with a name that ends in ``suffix``.

    Events after ``resume_step`` are marked as void. ``asked`` is the setting that asks for them.
    Events are written directly, not in a thread as by tensorboardX's SummaryWriter: its thread ends
    when the disk is full, and then the program that fills its queue hangs.

    Raises:
      UserError: tensorboardX is not installed, or the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        asked: str = "report.tensorboard=True",
        suffix: str = "",
    ):
        package = _tensorboard(asked)
        self._folder, self._scalar = folder, package.summary.scalar
        self._event: Any = package.proto.event_pb2.Event
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}{suffix}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._records: Any = package.record_writer.RecordWriter(str(folder / name))
        self._write(0, file_version="brain.Event:2")
        if resume_step is not None:
            start = package.proto.event_pb2.SessionLog(status="START")
            self._write(resume_step + 1, session_log=start)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._write(step, summary=self._scalar(name, value))

    def flush(self) -> None:
        with writing(self._folder):
            self._records.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        with writing(self._folder):
            self._records.write(event.SerializeToString())


class Wandb:
    """A run of Weights & Biases with the name of the workdir and its files in ``WORKDIR/wandb``.

    ``WORKDIR/.wandb-id`` holds its id, so that a resumed run continues the same one. Rows that a
    resumed run logs again are ignored there.

    Raises:
      UserError: wandb is not installed, or does not start.
    """

    def __init__(self, workdir: Path):
        wandb = _wandb()
        path = workdir / ".wandb-id"
        if not path.exists():
            write_whole(path, secrets.token_hex(4))
        try:
            self._run: Any = wandb.init(
                project="moejax",
                name=workdir.resolve().name,
                dir=str(workdir),
                id=path.read_text(),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(_no_start(error)) from error

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Does nothing: wandb's own process writes the rows."""

    def close(self) -> None:
        self._run.finish()
