"""The options of ``--launcher=slurm`` and their translation to sbatch."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import typing
from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError, suggest
from moejax.sweep.slurm.job import TIME_IS_UP

EXTRA = "slurm_"
"""The prefix of long options of sbatch."""
_OURS = (
    "array", "output", "error", "open_mode", "signal", "requeue", "no_requeue", "job_name", "chdir",
    "nodes", "ntasks", "ntasks_per_node", "wrap", "parsable", "wait", "hold", "test_only",
)  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options; None leaves one to the cluster's default."""

    partition: str | None = None
    account: str | None = None
    time: int | None = None
    """Minutes that a trial may run at a stretch before it saves and is requeued."""
    cpus: int | None = None
    gpus: int | None = None
    mem: float | None = None
    """GB."""
    save_seconds: int = 90
    """Time before the limit at which a trial is asked to save."""
    restarts: int = 100
    """The number of restarts after which a trial whose time is up stays stopped."""
    poll_seconds: float = 10.0
    """Interval between two reads of the queue."""
    setup: str | None = None
    """A line of shell that runs before the trial, such as "module load cuda"."""
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def sbatch(self) -> dict[str, str | bool]:
        """The long options of sbatch; `True` for one without a value."""
        known = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "cpus-per-task": self.cpus,
            "gpus-per-node": self.gpus,
            "mem": None if self.mem is None else f"{round(self.mem * 1024)}M",
        }
        # B: only the batch script gets the signal; the job's Python runs in its place.
        fixed = {"signal": f"B:{TIME_IS_UP.name[3:]}@{self.save_seconds}", "requeue": True}
        named = {name: str(value) for name, value in known.items() if value is not None}
        return {**named, **{k.replace("_", "-"): v or True for k, v in self.extra.items()}, **fixed}


def parse(words: Mapping[str, str]) -> Options:
    """The options of ``key=value`` pairs.

    Raises:
      UserError: an unknown name or an invalid value.
    """
    fields = {field.name: field for field in dataclasses.fields(Options) if field.name != "extra"}
    values: dict[str, Any] = {}
    extra: dict[str, str] = {}
    for name, text in words.items():
        if name.startswith(EXTRA):
            extra[_extra(name)] = text
        elif name not in fields:
            raise UserError(
                f"--launcher-option {name}={text}: the launcher 'slurm' has no such option; "
                f"{suggest(name, fields)}, and {EXTRA}NAME for any other option of sbatch"
            )
        else:
            values[name] = _value(name, text, fields[name].type)
    options = Options(**values, extra=extra)
    if options.time is not None and options.save_seconds >= 60 * options.time:
        raise UserError(
            f"--launcher-option save_seconds={options.save_seconds} leaves nothing of time="
            f"{options.time} minutes; allow more time, or fewer seconds to save"
        )
    return options


def _extra(name: str) -> str:
    own = name[len(EXTRA) :].replace("-", "_")
    if not _NAME.fullmatch(own):
        raise UserError(f"--launcher-option {name}: {EXTRA} is followed by a long option of sbatch")
    fields = {field.name for field in dataclasses.fields(Options)}
    if own in _OURS:
        raise UserError(
            f"--launcher-option {name}: the launcher decides {own!r} itself (a trial is one "
            "process on one node); remove it"
        )
    if own in fields:
        raise UserError(f"--launcher-option {name}: write it as {own}")
    return own


def _value(name: str, text: str, kind: Any) -> Any:
    """A value parsed as its field's type, apart from None; numbers are not negative."""
    kinds = typing.get_args(kind) or (kind,)
    if str in kinds:
        if text:
            return text
        raise UserError(f"--launcher-option {name}= is empty; give it a value or remove it")
    whole = int in kinds
    least = 0 if name in ("restarts", "gpus") else 1 if whole else 0.001
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if not least <= number < 1_000_000:
        raise UserError(
            f"--launcher-option {name}={text} must be a {'whole ' if whole else ''}number, "
            f"at least {least}"
        )
    return number


def check_cluster(options: Options) -> None:
    """Ask SLURM whether it would accept such a job. Nothing is written or queued.

    Raises:
      UserError: submitit or a SLURM command is missing, or SLURM would refuse the job.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--launcher=slurm needs the package submitit: pip install 'moejax[slurm]'")
    for command in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
        if shutil.which(command) is None:
            raise UserError(
                f"--launcher=slurm: no command {command!r} here; run this on a machine of the "
                "SLURM cluster, or use --launcher=local"
            )
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.sbatch().items()
    ]
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only", *flags, "--wrap=true"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError("--launcher=slurm: sbatch --test-only does not answer") from error
    if asked.returncode != 0:
        raise UserError(f"--launcher=slurm: {complaint(asked.stderr)}; see --launcher-option")


def complaint(stderr: str) -> str:
    """The error message of a SLURM command, on one line and without the command's name."""
    lines = [re.sub(r"^(\w+: )*(error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))) or "SLURM refuses and does not say why"
