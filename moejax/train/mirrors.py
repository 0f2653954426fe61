"""Where else the scalars of ``metrics.jsonl`` and ``timings.jsonl`` go: TensorBoard, wandb."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moejax.errors import UserError


class Mirror(Protocol):
    """Takes scalars by name, such as ``eval/loss``; ``metrics.jsonl`` stays the source of truth."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder, with names that end in ``suffix``.

    Events after ``resume_step`` are marked as void. ``asked`` is the setting that wants them.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        asked: str = "report.tensorboard=True",
        suffix: str = "",
    ):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"{asked} needs tensorboardX; pip install 'moejax[tensorboard]' or leave it out"
            ) from error
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases named as the workdir, whose own files are in ``WORKDIR/wandb``.

    ``WORKDIR/.wandb-id`` holds its id, so that a resumed run goes on in the same one. Rows that it
    has already are the ones the resumed run logs again; it keeps the first.

    Raises:
      UserError: wandb is not installed, or does not start.
    """

    def __init__(self, workdir: Path):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "report.wandb=True needs wandb; pip install 'moejax[wandb]' or set it to False"
            ) from error
        path = workdir / ".wandb-id"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
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
            reason = " ".join(str(error).split())
            raise UserError(
                f"report.wandb=True: wandb does not start ({reason}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Nothing to do: its own process writes what it has been told."""

    def close(self) -> None:
        self._run.finish()
