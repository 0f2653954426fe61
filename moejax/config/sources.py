"""Sources of configs: pages (files or modules with ``get_config``) and finished runs."""

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moejax.config import shipped
from moejax.config.overrides import check_fields, unknown_field
from moejax.config.saved import CONFIG, read_config
from moejax.config.tasks import LANGUAGE
from moejax.config.tree import Config, default, flatten, nested, set_field, set_gate, table_of
from moejax.errors import UserError, suggest

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_UNKNOWN_KEY = re.compile(r'Key "([^"]+)" does not exist')


def read(source: str) -> Config:
    """The config that ``source`` names, its fields checked.

    ``path.py[:arg]``, ``package.module[:arg]``, the name of a page that comes with moejax
    (``lm[:arg]``), a workdir, or its config.json.

    Raises:
      UserError: nothing there, an error inside the page (with its line), or a field that does not
        belong to the table or has another type.
    """
    source = os.path.expanduser(source)
    if is_workdir(source):
        return _read_workdir(source)
    page = open_page(source)
    if page is None:
        raise UserError(
            f"config {source!r} is neither a file 'path.py[:arg]', a module 'package.module[:arg]' "
            f"nor the workdir of a run, nor a page of moejax's own; "
            f"{suggest(source.partition(':')[0], shipped.pages())}"
        )
    return _call_get_config(page)


def is_workdir(source: str) -> bool:
    """True if ``source`` is a folder or a config.json.

    A folder with the name of a page counts only if it is the workdir of a run.
    """
    if os.path.isdir(source) and shipped.path_of(source):
        return os.path.exists(os.path.join(source, "config.json"))
    return os.path.isdir(source) or source.endswith(".json")


@dataclasses.dataclass(frozen=True)
class Page:
    """A file or module of the user's, and the argument that follows its name."""

    module: types.ModuleType
    path: str
    arg: str | None

    def takes_arg(self, function: Callable[..., Any]) -> bool:
        return bool(inspect.signature(function).parameters)

    def call(self, function: Callable[..., Any]) -> Any:
        """``function(arg)``, or ``function()`` if it takes nothing; a generator is run to its end.

        Raises:
          UserError: an exception of the page, in one line with its file and line.
        """

        def run() -> Any:
            result = function(self.arg) if self.takes_arg(function) else function()
            return list(result) if inspect.isgenerator(result) else result

        path = self.module.__file__ or self.path
        with _own_imports(path):
            return _guard(path, run)


def open_page(source: str) -> Page | None:
    """The page that ``path.py[:arg]``, ``package.module[:arg]`` or the name of a page that comes
    with moejax stands for; None if it is none of these.

    Raises:
      UserError: nothing there, or an error inside the page (with its line).
    """
    path, arg = split_source(source)
    path = shipped.path_of(path) or path
    if path.endswith(".py"):
        return Page(_run_file(path), path, arg or None)
    if _MODULE.fullmatch(path):
        return Page(_import(path), path, arg or None)
    return None


def split_source(source: str) -> tuple[str, str]:
    """The name of a page and the argument that follows it.

    Names of files may have colons: the file or folder that exists decides which one separates.
    """
    colons = [at for at, letter in enumerate(source) if letter == ":"]
    for is_there in (os.path.isfile, os.path.isdir):
        for at in [len(source), *reversed(colons)]:
            if is_there(source[:at]):
                return source[:at], source[at + 1 :]
    after = [at for at in colons if source[:at].endswith(".py")]
    at = after[0] if after else len(source) if source.endswith(".py") else source.find(":")
    return (source, "") if at < 0 else (source[:at], source[at + 1 :])


def _run_file(path: str) -> types.ModuleType:
    try:
        with open(path, "rb") as file:
            text = file.read()  # Python reads the mark at its beginning and its coding itself
    except OSError as error:
        folder = os.path.dirname(path)
        pages = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
        pages = [os.path.join(folder, page) for page in pages if page.endswith(".py")]
        hint = f"; {suggest(path, pages)}" if pages else ""
        raise UserError(f"config file {path!r}: {error.strerror}{hint}") from error
    stem = os.path.splitext(os.path.basename(path))[0]
    number = zlib.crc32(os.fsencode(os.path.abspath(path)))
    module = types.ModuleType(f"{stem}_{number:08x}")
    module.__file__ = path
    # As an import would: dataclasses and typing look a class's module up. The name is the path's
    # own, since a page may be called as a module that is there.
    sys.modules[module.__name__] = module
    # Not imported: no stale bytecode, and none written beside the page.
    with _own_imports(path):
        _guard(path, lambda: exec(compile(text, path, "exec"), module.__dict__))
    return module


@contextlib.contextmanager
def _own_imports(path: str) -> Iterator[None]:
    """While entered, a page may import from the packages that contain its file."""
    finder = _Above(Path(path).absolute())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Above(importlib.abc.MetaPathFinder):
    """Find the folders above a file as packages, after everything else, the nearest first.

    No other names: a folder beside them, say of results, is no package.
    """

    def __init__(self, file: Path):
        self._folders = {folder.name: folder for folder in reversed(file.parents)}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        first, *others = fullname.split(".")
        if first not in self._folders:
            return None
        within = self._folders[first].parent.joinpath(*[first, *others][:-1])
        return importlib.machinery.PathFinder.find_spec(fullname, [str(within)], target)


def _import(name: str) -> types.ModuleType:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        raise UserError(f"config module {name!r}: {error}") from error
    if spec is None:
        raise UserError(f"config module {name!r} does not exist")
    return _guard(spec.origin or name, lambda: importlib.import_module(name))


def _call_get_config(page: Page) -> Config:
    path, arg = page.path, page.arg
    get_config = getattr(page.module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"config {path!r} defines no function get_config(arg=None)")
    if arg is not None and not page.takes_arg(get_config):
        raise UserError(f"config {path!r} takes no argument, but {arg!r} follows its name")
    config = page.call(get_config)
    if not isinstance(config, Config):
        raise UserError(
            f"config {path!r}: get_config returned {type(config).__name__}, not a config; start it "
            "from moejax.config.default() and return that"
        )
    config.lock()
    check_fields(config, flatten(config), f"config {path!r}", "return moejax.config.default()")
    return config


def _guard(path: str, run: Callable[[], Any]) -> Any:
    """Run the user's code; its exceptions become one line with the file and the line number."""
    try:
        return run()
    except UserError:
        raise
    except SyntaxError as error:
        if "codec can't decode" in str(error.msg) or "null bytes" in str(error.msg):
            raise UserError(f"config file {path!r} is not UTF-8 text: {error.msg}") from error
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise UserError(f"config {path!r} called sys.exit({error.code!r})") from error
    except Exception as error:  # a page is the user's program: it may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == path] or frames
        raise UserError(f"{own[-1].filename}:{own[-1].lineno}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """The error in one line; for a field that does not exist, with the nearest one."""
    unknown = _UNKNOWN_KEY.search(str(error))
    if unknown:
        config = default()
        return unknown_field(unknown.group(1), table_of(config), config)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read_workdir(source: str) -> Config:
    path = Path(source if source.endswith(".json") else os.path.join(source, CONFIG))
    return from_dict(read_config(path, ("config",))["config"], str(path))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts in the table's order; ``from_dict`` is its inverse.

    Survives JSON: an int stays an int, a float a float, and a tuple comes back as a tuple.
    """
    flat = flatten(config)
    return nested({name: flat[name] for name in table_of(config)})


def from_dict(tree: dict[str, Any], origin: str = "config") -> Config:
    """The config that ``to_dict`` gave ``tree`` for, also after JSON.

    Raises:
      UserError: naming ``origin`` and the first field that is missing, unknown or of another type.
    """
    flat = flatten(tree)
    config = default(flat.setdefault("task.name", LANGUAGE))
    set_gate(config, flat.get("moe.gate.name", config.moe.gate.name))
    table = table_of(config)
    for name, value in flat.items():
        if isinstance(value, list):
            flat[name] = tuple(value)
        elif name in table and table[name].type is float and type(value) is int:
            flat[name] = float(value)
    check_fields(config, flat, origin, "it was written by another version of moejax")
    for name, value in flat.items():
        set_field(config, name, value)
    return config
