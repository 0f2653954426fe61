"""What the processes of a run compare before the first step, so that they are one run.

JAX compares nothing: processes whose configs, data or code differ train a model of neither, wait
for each other for ever, or save where only one of them looks.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import sys
import sysconfig
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import moejax
from moejax import job as jobs
from moejax.config import Config, flatten, make_gate, to_dict
from moejax.config.tasks import task_entry
from moejax.errors import UserError

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorstore")
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC",
)  # fmt: skip
OWN_AFFAIR = (
    "cache", "color", "dump", "log", "socket_address", "traceback", "transport", "visible_devices",
)  # fmt: skip
"""In the names of JAX's settings: where something is kept or said, and which devices are whose."""
SEEN_WITHIN = 3.0
"""Seconds until a file that process 0 has made is to be seen by the others."""
_MORE = 3


def on_settings(config: Config) -> None:
    """Compares config, code, libraries and environment; call it before a device starts.

    Raises:
      UserError: on every process, naming what differs, the values and whose they are.
    """
    job = jobs.current()
    if job is None:
        return
    fields = flatten(to_dict(config))
    # Others follow from these two.
    first = {name: fields.pop(name) for name in ("task.name", "moe.gate.name")}
    own = {name: x for name, x in fields.items() if not name.startswith("distributed.")}
    job.exchange("settings", {**first, **own, **_code(config), **_environment()}, _compared)


def on_data(fingerprint: str, devices: Sequence[Any]) -> None:
    """Compares the data and the kinds of devices; call it before anything is compiled.

    Raises:
      UserError: as `on_settings`.
    """
    job = jobs.current()
    if job is None:
        return
    kinds = sorted({x.device_kind for x in devices if x.process_index == job.place.process})
    facts = {"the fingerprint of the data": fingerprint, "the kind of device": ", ".join(kinds)}
    job.exchange("data", facts, _compared)


def on_run(workdir: Path, saved: dict[str, Any], steps: Sequence[int]) -> None:
    """Compares what the processes read in the workdir of a run, into which nothing is written.

    Raises:
      UserError: as `on_settings`.
    """
    job = jobs.current()
    if job is None:
        return
    facts = {
        f"config.json in --workdir={workdir}": _digest(json.dumps(saved, sort_keys=True).encode()),
        f"the checkpoints in --workdir={workdir}": list(steps),
    }
    job.exchange("run", facts, _compared)


def on_folder(workdir: Path) -> None:
    """Makes sure that all processes have one workdir, on a disk that they share.

    Process 0 writes a small file into the folder, or into the one that it is to be made in, and
    removes it once the others have looked for it.

    Raises:
      UserError: on every process, naming those that have another folder.
    """
    job = jobs.current()
    if job is None:
        return
    folder = Path(os.path.realpath(workdir))
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    name, below = f".moejax-{secrets.token_hex(8)}", folder.relative_to(there).parts
    if job.place.process:
        name = ""
    else:
        try:
            (there / name).write_text("")
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: {there} cannot be written to ({error.strerror}); name "
                "another folder"
            ) from error
    try:
        mine = {"name": name, "below": below}
        wanted = job.exchange("folder", mine, lambda values: ("", values[0]))
        seen = job.place.process == 0 or _is_seen(folder, wanted["below"], wanted["name"])
        job.exchange("seen", {"folder": str(folder), "seen": seen}, _one_folder)
    finally:
        if name:
            (there / name).unlink(missing_ok=True)


def _is_seen(folder: Path, below: Sequence[str], name: str) -> bool:
    """Whether the file lies where it would if this folder were process 0's.

    Network file systems need a moment.
    """
    if list(folder.parts[len(folder.parts) - len(below) :]) != list(below):
        return False
    above = folder.parents[len(below) - 1] if below else folder
    until = time.monotonic() + SEEN_WITHIN
    while not (above / name).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _one_folder(values: list[dict[str, Any]]) -> tuple[str, None]:
    apart = [r for r, value in enumerate(values) if not value["seen"]]
    if not apart:
        return "", None
    return (
        f"--workdir is {values[0]['folder']} in process 0 and {values[apart[0]]['folder']} in "
        f"{_processes(apart)}, which does not see what process 0 writes there; name one folder on "
        "a disk that all processes share"
    ), None


def _compared(values: list[dict[str, Any]]) -> tuple[str, None]:
    """The first difference in words, and the names of the next."""
    names = dict.fromkeys(name for value in values for name in value)
    different = [
        name for name in names if any(value.get(name) != values[0].get(name) for value in values)
    ]
    if not different:
        return "", None
    holders: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        holders.setdefault(_shown(value.get(different[0])), []).append(process)
    said = " and ".join(f"{value} in {_processes(whose)}" for value, whose in holders.items())
    more = ""
    if len(different) > 1:
        listed = ", ".join(different[1 : 1 + _MORE])
        rest = len(different) - 1 - _MORE
        more = f" (also different: {listed}{f' and {rest} more' if rest > 0 else ''})"
    return f"{different[0]} is {said}{more}; give every process the same", None


def _shown(value: Any) -> str:
    return "absent" if value is None else repr(value)


def _processes(numbers: list[int]) -> str:
    """``process 3``, ``processes 1, 2``; long lists in part."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


def _environment() -> dict[str, Any]:
    """Versions, and settings that a result or a program depends on."""
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    versions["the version of python"] = platform.python_version()
    flags = shlex.split(os.environ.get("XLA_FLAGS", ""))
    kept = sorted(flag for flag in flags if not flag.startswith("--xla_dump"))
    settings = {
        f"JAX's setting {name}": str(value)
        for name, value in jax.config.values.items()
        if not any(word in name for word in OWN_AFFAIR)
    }
    variables = {name: os.environ.get(name, "") for name in VARIABLES}
    return {**versions, "XLA_FLAGS": " ".join(kept), **variables, **settings}


def _code(config: Config) -> dict[str, str]:
    """Digests of moejax's sources and of the user's own that the config names."""
    root = Path(moejax.__file__).parent
    found = {
        f"the digest of moejax/{path.relative_to(root).as_posix()}": _digest(path.read_bytes())
        for path in sorted(root.rglob("*.py"))
    }
    names = {
        type(make_gate(config)).__module__,
        task_entry(config.task.name).build.partition(":")[0],
    }
    for module in _own_modules(sorted(names & sys.modules.keys())):
        assert module.__file__ is not None
        source = Path(module.__file__).read_bytes()
        found[f"the digest of the module {module.__name__}"] = _digest(source)
    return found


def _own_modules(names: Sequence[str]) -> Iterator[types.ModuleType]:
    """The user's modules among these, and those that they have imported from."""
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    installed.append(str(Path(moejax.__file__).parent))
    waiting, done = list(names), set[str]()
    while waiting:
        module = sys.modules.get(waiting.pop())
        if module is None or module.__name__ in done:
            continue
        done.add(module.__name__)
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py") or file.startswith(tuple(installed)):
            continue
        yield module
        for value in list(vars(module).values()):
            is_module = isinstance(value, types.ModuleType)
            name = value.__name__ if is_module else getattr(value, "__module__", "")
            if isinstance(name, str):
                waiting.append(name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
