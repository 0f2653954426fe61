"""Measure the reading core: the code that one training step of a language model needs.

    python scripts/reading_core.py [--json core.json] [--root ANOTHER_CHECKOUT]

The step is that of `configs/lm.py:size=debug`: the gate `top_k`, transport `cells`, the kernels of
the CPU, no gradient accumulation. A module of moejax belongs to the core if

* a function of it runs while `moejax.train.step.train_step` is traced, model and optimizer included
  (`run`), or
* it defines a class or a constant that these functions name, in a body or in a signature, or that
  the fields and bases of such a class name (`type`). A re-exported name counts where it is defined.

Not in the core: reading configs and data, building the task, placing arrays, the loop, checkpoints
and metrics. Lines are those of whole files, as `wc -l` counts them.
"""

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def functions_that_run(root: Path) -> dict[Path, set[int]]:
    """First lines of the functions that run while a step is traced, by file."""
    import jax

    from moejax.config import load
    from moejax.train.setup import prepare
    from moejax.train.step import train_step

    config = load(f"{root}/configs/lm.py:size=debug").config
    config.mesh.expert = 1
    run = prepare(config)
    step = functools.partial(
        train_step, task=run.task, optimizer=run.optimizer, schedule=run.schedule, grad_accum=1
    )
    package, lines = str(root / "moejax") + os.sep, defaultdict(set)

    def record(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and code.co_name != "<module>":
            lines[Path(code.co_filename)].add(code.co_firstlineno)

    state, batch = run.abstract_state, run.abstract_batch
    jax.clear_caches()
    with jax.set_mesh(run.mesh):
        sys.setprofile(record)
        try:
            jax.eval_shape(step, state, batch)
        finally:
            sys.setprofile(None)
    return lines


class Source:
    """A module's syntax tree, and the names that it imports from moejax."""

    def __init__(self, file: Path, root: Path):
        self.module = importlib.import_module(module_name(file, root))
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moejax")
            for alias in node.names
        }

    def functions(self, first_lines: set[int]) -> list[ast.AST]:
        """Definitions that begin at these lines, decorators included."""
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and min([node.lineno, *(d.lineno for d in node.decorator_list)]) in first_lines
        ]

    def fields(self, name: str) -> list[ast.AST]:
        """Bases and annotated fields of a class of this module."""
        return [
            part
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef) and node.name == name
            for part in [*node.bases, *(s for s in node.body if isinstance(s, ast.AnnAssign))]
        ]


def module_name(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def home(module: ModuleType, name: str) -> tuple[ModuleType, str] | None:
    """The module that defines an imported class or constant; None for functions and modules."""
    value = getattr(module, name, None)
    if value is None or inspect.ismodule(value) or inspect.isroutine(value):
        return None
    if inspect.isclass(value) and value.__module__.startswith("moejax"):
        return sys.modules[value.__module__], value.__name__
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    for node in tree.body:  # a constant or a name for a type: follow re-exports
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moejax"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return home(importlib.import_module(node.module or ""), alias.name)
    return module, name


def measure(root: Path) -> dict[str, Any]:
    """The core's files with their lines and the reason that each belongs to it."""
    source = functools.cache(lambda file: Source(file, root))
    running = functions_that_run(root)
    reasons = {file: "run" for file in running}
    waiting = [
        (file, node) for file, lines in running.items() for node in source(file).functions(lines)
    ]
    seen: set[tuple[Path, str]] = set()
    while waiting:
        file, node = waiting.pop()
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        for name in names & set(source(file).imports):
            module, original = source(file).imports[name]
            defined = home(importlib.import_module(module), original)
            if defined is None:
                continue
            place = Path(defined[0].__file__ or "")
            reasons.setdefault(place, "type")
            if (place, defined[1]) not in seen:
                seen.add((place, defined[1]))
                waiting += [(place, part) for part in source(place).fields(defined[1])]
    rows = [
        {
            "file": file.relative_to(root).as_posix(),
            "lines": len(file.read_text(encoding="utf-8").splitlines()),
            "reason": reasons[file],
        }
        for file in sorted(reasons)
    ]
    totals = {
        name: {"files": len(own), "lines": sum(row["lines"] for row in own)}
        for name, own in (("core", rows), ("run", [row for row in rows if row["reason"] == "run"]))
    }
    return {**totals, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the measurement to this file")
    parser.add_argument("--root", type=Path, default=HERE, help="another checkout to measure")
    options = parser.parse_args()
    root = options.root.resolve()
    if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(root):
        # moejax must be that of the root, whichever one is installed.
        environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    core = measure(root)
    for row in core["rows"]:
        print(f"{row['lines']:6,}  {row['reason']:4}  {row['file']}")
    for name, text in (("run", "of functions that run"), ("core", "with the types they name")):
        print(f"{core[name]['lines']:6,}  lines in {core[name]['files']} files {text}")
    if options.json:
        options.json.write_text(json.dumps(core, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
