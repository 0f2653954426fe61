"""Allowed imports, the places of collectives, and the cost of `import moejax`."""

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moejax"

FLOORS: list[dict[str, set[str]]] = [
    {"errors": set(), "context": set()},
    {
        "types": {"context"},
        "mesh": {"errors"},
        "kernels": {"errors"},
        "record": {"errors"},
    },
    {
        "gating": {"errors", "kernels", "mesh", "record", "types"},
        "losses": {"types"},
        "experts": {"kernels", "types"},
    },
    {
        "dispatch": {"experts", "kernels", "mesh", "types"},
        "reference": {"experts", "types"},
    },
    {"options": {"dispatch", "experts", "types"}},
    {
        "layers": {
            "dispatch", "experts", "gating", "losses", "mesh", "options", "record", "types",
        },
    },
    {
        "models": {"layers", "mesh", "options", "types"},
        "config": {"dispatch", "errors", "gating", "mesh", "options", "record", "types"},
        "data": {"errors"},
    },
    {
        "job": {"config", "errors", "mesh"},
        "tasks": {
            "config", "data", "dispatch", "errors", "layers", "losses", "mesh", "models", "options",
            "record", "types",
        },
    },
    {
        "contrib/multitask": {
            "config", "data", "dispatch", "errors", "experts", "gating", "layers", "mesh", "models",
            "tasks", "types",
        },
        "contrib/multimodal": {
            "config", "data", "errors", "layers", "mesh", "models", "options", "tasks", "types",
        },
        "train": {
            "config", "data", "dispatch", "errors", "job", "kernels", "mesh", "moejax", "record",
            "tasks", "types",
        },
    },
    {
        "sweep": {"config", "dispatch", "errors", "job", "record", "train", "types"},
        "hf": {"config", "data", "errors", "gating", "options", "record", "tasks", "train"},
        "generate": {
            "config", "data", "dispatch", "errors", "job", "mesh", "options", "record", "tasks",
            "train", "types",
        },
    },
    {
        "inspection": {"config", "errors", "hf", "record", "tasks", "train"},
        "analysis": {
            "config", "errors", "gating", "moejax", "options", "record", "sweep", "tasks", "train",
            "types",
        },
    },
    {
        "contrib/openmoe": {
            "analysis", "config", "data", "dispatch", "errors", "record", "tasks", "train", "types",
        },
        "contrib/scaling": {"errors", "sweep", "train"},
        "contrib/harness": {"config", "data", "errors", "generate", "train"},
        "notebook": {
            "analysis", "config", "data", "errors", "mesh", "record", "tasks", "train", "types",
        },
    },
    {
        "cli": {
            "analysis", "config", "contrib/openmoe", "contrib/scaling", "data", "errors", "gating",
            "generate", "hf", "inspection", "job", "mesh", "moejax", "record", "sweep", "tasks",
            "train", "types",
        },
    },
    {"moejax": {"errors", "gating", "layers", "mesh", "types"}, "contrib": set()},
]  # fmt: skip
"""Rooms of the package, from the ground up, and the rooms each may import.

A room may import from the floors below and from itself. "moejax" is the package's front,
``__init__.py`` and ``__main__.py``, which holds the version.
"""

MAY_IMPORT: dict[str, set[str]] = {room: may for floor in FLOORS for room, may in floor.items()}

ENTRY_POINTS = {
    "__init__.py": {"notebook"}, "__main__.py": {"cli"}, "train/__main__.py": {"cli"},
}  # fmt: skip
"""`python -m moejax` and `python -m moejax.train` are the command line under another name, and
``moejax.load`` imports the trainer and the report when it is first asked for."""

FLAX = {"layers", "models", "tasks", "contrib/multitask", "contrib/multimodal", "cli"}

COLLECTIVES = {
    "all_gather", "all_to_all", "pmax", "pmean", "pmin", "ppermute", "pshuffle", "psum",
    "psum_scatter", "ragged_all_to_all",
}  # fmt: skip
MAY_COMMUNICATE = {"dispatch", "kernels", "train/checkpoint/checksum.py", "cli/machine.py"}
"""Tokens travel in dispatch; checksums are sums over devices; doctor tries each collective."""

MAY_AGREE = {"train/processes.py", "train/checkpoint/checkpointer.py"}
"""Modules where processes agree or wait for each other, through ``multihost_utils``."""

FILES = sorted(PACKAGE.rglob("*.py"))


def path_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(path: str) -> str:
    """The room of a module given as a path, such as ``contrib/scaling/law.py``."""
    first, *others = path.removesuffix(".py").split("/")
    if first == "contrib" and len(others) > 1:
        return f"contrib/{others[0]}"
    return "moejax" if first.startswith("__") else first


@functools.cache
def parsed(file: Path) -> ast.AST:
    return ast.parse(file.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in moejax"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for name in imported(parsed(file)):
        first, *rest = name.split(".")
        if first == "moejax":
            room = room_of("/".join(rest) + ("/" if len(rest) > 1 else ""))
            rooms.add(room if room in MAY_IMPORT else "moejax")
    return rooms


def test_imports_point_downwards():
    """Every file; the first breach is named."""
    above = {
        path_of(file): forbidden
        for file in FILES
        if (
            forbidden := imported_rooms(file)
            - MAY_IMPORT[room_of(path_of(file))]
            - {room_of(path_of(file))}
            - ENTRY_POINTS.get(path_of(file), set())
        )
    }
    assert not above


def test_the_table_has_no_cycle_and_no_dead_names():
    assert {room_of(path_of(file)) for file in FILES} == set(MAY_IMPORT)
    below: set[str] = {"moejax"}
    for floor in FLOORS:
        for room, may in floor.items():
            assert may <= below, f"{room} imports {sorted(may - below)}, which is not below it"
        below |= set(floor)


def test_every_import_that_the_table_allows_exists():
    used = {room: set() for room in MAY_IMPORT}
    for file in FILES:
        used[room_of(path_of(file))] |= imported_rooms(file)
    assert {room: may - used[room] for room, may in MAY_IMPORT.items() if may - used[room]} == {}


def test_gates_and_dispatch_do_not_import_each_other():
    """Their independence lets any gate use any transport."""
    for first, second in (("gating", "dispatch"), ("dispatch", "gating")):
        for file in FILES:
            if room_of(path_of(file)) == first:
                assert second not in imported_rooms(file), path_of(file)


def test_flax_is_imported_from_layers_upwards_only():
    users = {room_of(path_of(f)) for f in FILES if any(
        name.split(".")[0] == "flax" for name in imported(parsed(f))
    )}  # fmt: skip
    assert "layers" in users and users <= FLAX


def collectives_in(tree: ast.AST) -> set[str]:
    """Names of collectives read from a module called ``lax``, or imported from it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
            owner = node.value
            if getattr(owner, "attr", getattr(owner, "id", "")) == "lax":
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            found |= {alias.name for alias in node.names} & COLLECTIVES
    return found


def test_collectives_live_in_dispatch_and_kernels():
    found = {}
    for file in FILES:
        names = collectives_in(parsed(file))
        if names:
            found[path_of(file)] = names
    assert found["dispatch/exchange.py"] >= {"all_to_all", "all_gather", "psum", "psum_scatter"}
    for path in found:
        assert path in MAY_COMMUNICATE or path.split("/")[0] in MAY_COMMUNICATE, path


def test_processes_agree_in_few_places():
    users = {path_of(f) for f in FILES if any(
        "multihost_utils" in name for name in imported(parsed(f))
    )}  # fmt: skip
    assert users == MAY_AGREE


MEASURE = """
import json, sys, time
import jax
wall, cpu = time.perf_counter(), time.process_time()
before = set(sys.modules)
import moejax
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
light = sorted({name.split(".")[0] for name in set(sys.modules) - before})
moejax.MoE
full = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"wall": wall, "cpu": cpu, "light": light, "full": full}))
"""


def measure() -> dict:
    command = [sys.executable, "-c", MEASURE]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def measured() -> dict:
    return measure()


def test_import_moejax_takes_less_than_a_second_more_than_import_jax(measured):
    """Processor time, on which other work has little effect; the best of three."""
    seconds = [measured["cpu"]]
    while min(seconds) >= 1.0 and len(seconds) < 3:
        seconds.append(measure()["cpu"])
    assert min(seconds) < 1.0


def test_modules_that_only_the_layer_needs_are_imported_with_it(measured):
    assert not {"flax", "chex", "optax", "rich", "absl"} & set(measured["light"])
    assert {"flax", "chex"} <= set(measured["full"])


def test_the_layer_needs_no_training_libraries(measured):
    heavy = {"tensorflow", "torch", "orbax", "grain", "matplotlib", "tokenizers", "tensorboardX"}
    assert not heavy & set(measured["full"])
