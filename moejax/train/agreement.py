"""Comparisons between the processes of a run before the first step, so that they are one run.

JAX compares nothing: processes with different configs, data or code train a model of neither, wait
for each other for ever, or save to a folder that only one of them reads.
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
MAY_DIFFER = (
    "cache", "color", "dump", "log", "socket_address", "traceback", "transport", "visible_devices",
)  # fmt: skip
"""Parts of names of JAX's settings that may differ: paths, logs, and each process's devices."""
VISIBLE_WITHIN = 3.0
"""Seconds within which a file made by process 0 must be visible to the others."""
_LISTED = 3
"""Further differences named in a message."""


def on_settings(config: Config) -> None:
    """Compares config, code, libraries and environment; call it before a device starts.

    Raises:
      UserError: on every process, naming the difference, the values and the processes.
    """
    job = jobs.current()
    if job is None:
        return
    fields = flatten(to_dict(config))
    # Other fields depend on these two.
    first = {name: fields.pop(name) for name in ("task.name", "moe.gate.name")}
    own = {name: x for name, x in fields.items() if not name.startswith("distributed.")}
    job.exchange("settings", {**first, **own, **_code(config), **_environment()}, _differences)


def on_data(fingerprint: str, devices: Sequence[Any]) -> None:
    """Compares the data and the kinds of devices; call it before anything is compiled.

    Raises:
      UserError: as `on_settings`.
    """
    job = jobs.current()
    if job is None:
        return
    kinds = sorted({x.device_kind for x in devices if x.process_index == job.spec.process})
    facts = {"the fingerprint of the data": fingerprint, "the kind of device": ", ".join(kinds)}
    job.exchange("data", facts, _differences)


def on_run(workdir: Path, saved: dict[str, Any], steps: Sequence[int]) -> None:
    """Compares the workdir of a run as the processes see it; nothing is written there.

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
    job.exchange("run", facts, _differences)


def on_folder(workdir: Path) -> None:
    """Makes sure that all processes have the same workdir, on a disk that they share.

    Process 0 writes a small file into the folder, or into its nearest existing parent, and removes
    it once the others have looked for it.

    Raises:
      UserError: on every process, naming those with another folder.
    """
    job = jobs.current()
    if job is None:
        return
    folder = Path(os.path.realpath(workdir))
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    name, below = f".moejax-{secrets.token_hex(8)}", folder.relative_to(existing).parts
    if job.spec.process:
        name = ""
    else:
        try:
            (existing / name).write_text("")
        except OSError as error:
            raise UserError(
                f"--workdir={workdir}: {existing} cannot be written to ({error.strerror}); name "
                "another folder"
            ) from error
    try:
        mine = {"name": name, "below": below}
        wanted = job.exchange("folder", mine, lambda values: ("", values[0]))
        visible = job.spec.process == 0 or _is_visible(folder, wanted["below"], wanted["name"])
        job.exchange("visible", {"folder": str(folder), "visible": visible}, _one_folder)
    finally:
        if name:
            (existing / name).unlink(missing_ok=True)


def _is_visible(folder: Path, below: Sequence[str], name: str) -> bool:
    """True if process 0's file is where it must be if this folder is process 0's.

    Waits for a while, since network file systems are slow.
    """
    if list(folder.parts[len(folder.parts) - len(below) :]) != list(below):
        return False
    above = folder.parents[len(below) - 1] if below else folder
    until = time.monotonic() + VISIBLE_WITHIN
    while not (above / name).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _one_folder(values: list[dict[str, Any]]) -> tuple[str, None]:
    apart = [r for r, value in enumerate(values) if not value["visible"]]
    if not apart:
        return "", None
    return (
        f"--workdir is {values[0]['folder']} in process 0 and {values[apart[0]]['folder']} in "
        f"{_processes(apart)}, which does not see what process 0 writes there; name one folder on "
        "a disk that all processes share"
    ), None


def _differences(values: list[dict[str, Any]]) -> tuple[str, None]:
    """A sentence about the first difference, and the names of further ones."""
    names = dict.fromkeys(name for value in values for name in value)
    different = [
        name for name in names if any(value.get(name) != values[0].get(name) for value in values)
    ]
    if not different:
        return "", None
    holders: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        holders.setdefault(_shown(value.get(different[0])), []).append(process)
    values_text = " and ".join(f"{value} in {_processes(r)}" for value, r in holders.items())
    more = ""
    if len(different) > 1:
        listed = ", ".join(different[1 : 1 + _LISTED])
        rest = len(different) - 1 - _LISTED
        more = f" (also different: {listed}{f' and {rest} more' if rest > 0 else ''})"
    return f"{different[0]} is {values_text}{more}; give every process the same", None


def _shown(value: Any) -> str:
    return "absent" if value is None else repr(value)


def _processes(numbers: list[int]) -> str:
    """``process 3``, ``processes 1, 2``; long lists are cut."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"


def _environment() -> dict[str, Any]:
    """Versions, and settings that results or programs depend on."""
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    versions["the version of python"] = platform.python_version()
    flags = shlex.split(os.environ.get("XLA_FLAGS", ""))
    kept = sorted(flag for flag in flags if not flag.startswith("--xla_dump"))
    settings = {
        f"JAX's setting {name}": str(value)
        for name, value in jax.config.values.items()
        if not any(word in name for word in MAY_DIFFER)
    }
    variables = {name: os.environ.get(name, "") for name in VARIABLES}
    return {**versions, "XLA_FLAGS": " ".join(kept), **variables, **settings}


def _code(config: Config) -> dict[str, str]:
    """Digests of moejax's sources, and of the user's modules that the config names."""
    root = Path(moejax.__file__).parent
    digests = {
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
        digests[f"the digest of the module {module.__name__}"] = _digest(source)
    return digests


def _own_modules(names: Sequence[str]) -> Iterator[types.ModuleType]:
    """The user's modules among these, and the ones that they import from."""
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
