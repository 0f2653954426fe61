"""Compiled programs that outlive the process: JAX's persistent compilation cache, safe to kill.

JAX writes an entry where readers look for it, so a process killed while it writes, or a full disk,
leaves a torn one there, which every later run trips over and none repairs. Here JAX gets a folder
of its own process, with hard links to what is known, and what it adds is linked back once whole:

    FOLDER/MACHINE/jit_train_step-<hash>-cache     an entry, whole from the moment it is there
    FOLDER/MACHINE/jit_train_step-<hash>-digest    SHA-256 of its name and content
    FOLDER/MACHINE/.process-<pid>-<random>/        one process's view; removed when it has ended

An entry holds machine code, so machines whose processors differ do not share any. What is loaded is
what would be compiled, bit for bit; the cache can be removed at any time.

What is loaded is run, so an entry is used only if its digest is right and nobody else could have
written it: neither the folder, nor one above it, nor the entry's files may belong to another user
or be writable by others (`moejax.train.trust`).
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from moejax.train import trust
from moejax.train.processes import is_first

AUTO, OFF = "auto", "off"
MAX_BYTES = 2**30
"""Entries not used for longest are removed beyond this."""

_SUFFIX, _DIGEST = "-cache", "-digest"
_VIEW = ".process-"
_LOCK = ".lock"
_SETTINGS = {
    # What compiles faster is not worth a file.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    # Its path would be that of this process, and a part of the entries' keys.
    "jax_persistent_cache_enable_xla_caches": "none",
}
_FOLDER, _SWITCH = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(\w+)")

_active: "Cache | None" = None


class Cache:
    """One process's view of a folder of entries. ``close`` removes the view."""

    def __init__(self, folder: Path):
        self.folder = folder / machine()
        for path in (folder, self.folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            trust.check(path)
        _remove_dead_views(self.folder)
        self.view = Path(tempfile.mkdtemp(prefix=f"{_VIEW}{os.getpid()}-", dir=self.folder))
        self._lock = os.open(self.view / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._known = set[str]()
        self._take()

    def _take(self) -> None:
        """Links what is known and can be trusted into the view, and says what cannot."""
        damaged, foreign = [], []
        for name in _entries(self.folder):
            try:
                os.link(self.folder / name, self.view / name, follow_symlinks=False)
                problem = trust.problem_of_file(self.view / name)
                whole = not problem and _digest_of(self.folder, name) == _digest(self.view / name)
            except FileNotFoundError:  # another process has just removed it
                continue
            except PermissionError:
                foreign.append(f"{name} belongs to another user")
                continue
            if whole:
                self._known.add(name)
                continue
            (self.view / name).unlink()
            if problem:
                foreign.append(f"{name} {problem}")
            else:
                damaged.append(name)
                _remove(self.folder, name)
        if damaged:
            named = ", ".join(name.rpartition("-")[0].rpartition("-")[0] for name in damaged[:3])
            more = ", ..." if len(damaged) > 3 else ""
            _say(
                f"compiled programs in {self.folder} are damaged (no digest, or another one) and "
                f"removed: {named}{more}; compiled anew"
            )
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            _say(f"compiled programs in {self.folder} are not used: {foreign[0]}{more}")

    def publish(self) -> None:
        """Adds to the folder what JAX has added; nothing may be compiling meanwhile."""
        new = [name for name in _entries(self.view) if name not in self._known]
        for name in new:
            entry = self.view / name
            if not _is_whole(entry):
                entry.unlink()
                continue
            with open(entry, "rb") as file:
                os.fchmod(file.fileno(), 0o600)
                os.fsync(file.fileno())
            if not (self.folder / name).exists():  # another process may have been faster
                digest = self.view / _digest_name(name)
                digest.write_text(_digest(entry))
                digest.chmod(0o600)
                digest.replace(self.folder / digest.name)
                with contextlib.suppress(FileExistsError):
                    os.link(entry, self.folder / name)
            self._known.add(name)
        if new:
            _prune(self.folder)

    def forget(self, program: str) -> None:
        """Removes the entries of a program of which one cannot be read."""
        for name in _entries(self.view):
            if name.startswith(f"{program}-"):
                _remove(self.folder, name)
                (self.view / name).unlink()
                self._known.discard(name)

    def close(self) -> None:
        self.publish()
        shutil.rmtree(self.view, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def kept(choice: str, names_matter: bool = False) -> Iterator[None]:
    """Inside, what is compiled is looked up in and added to the user's cache.

    ``choice`` is ``report.compile_cache``: "auto", "off" or a folder. With "auto" a cache that is
    set up or switched off by JAX's own means is left as it is. A folder that cannot be used is one
    line on stderr, and everything is compiled. Programs that differ only in the names of scopes are
    one, unless ``names_matter``.
    """
    global _active
    folder = folder_of(choice)
    if folder is None or _active is not None:
        yield
        return
    try:
        cache = Cache(folder)
    except OSError as error:
        _say(
            f"compiled programs cannot be kept in {folder} ({error.strerror}); compiling without. "
            "report.compile_cache names another folder or is off"
        )
        yield
        return
    except trust.Untrusted as problem:
        _say(
            f"compiled programs in {folder} are not used, since {problem}; compiling without. Mend "
            "that (chmod go-w), or let report.compile_cache name another folder or be off"
        )
        yield
        return
    with _jax_uses(cache, names_matter), _one_line_warnings(cache):
        _active = cache
        try:
            yield
        finally:
            _active = None
            with _or_warn(cache):
                cache.close()


def publish() -> None:
    """Makes what has been compiled so far survive a kill; does nothing without a cache."""
    if _active is not None:
        with _or_warn(_active):
            _active.publish()


def folder_of(choice: str) -> Path | None:
    """The folder that ``report.compile_cache`` stands for; None for no cache of ours."""
    if choice == OFF:
        return None
    if choice != AUTO:
        return Path(os.path.expanduser(choice)).absolute()
    if getattr(jax.config, _FOLDER) or not getattr(jax.config, _SWITCH):
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative values ignored.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    homeless = os.environ.get("HOME") == "" and not os.path.isabs(base)  # it would be /.cache
    # Or a batch system's user by number, whom the container does not know.
    if homeless or not os.path.isabs(root):
        _say(
            "compiled programs are not kept: this user has no home folder; report.compile_cache "
            "names a folder or is off"
        )
        return None
    return Path(root) / "moejax" / "jax"


def machine() -> str:
    """What an entry's machine code depends on and its key does not say: the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    text = "\n".join(sorted(set(features or lines)))
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _jax_uses(cache: Cache, names_matter: bool) -> Iterator[None]:
    settings = {
        **_SETTINGS,
        _FOLDER: str(cache.view),
        "jax_compilation_cache_include_metadata_in_key": names_matter,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _one_line_warnings(cache: Cache) -> Iterator[None]:
    """JAX goes on without an entry that it cannot read, but says so at length and at every run."""
    show = warnings.showwarning

    def shown(message: Any, *args: Any, **kwargs: Any) -> None:
        trouble = _TROUBLE.search(str(message))
        if not trouble:
            show(message, *args, **kwargs)
            return
        action, program = trouble.groups()
        if action == "reading":
            cache.forget(program)
        what = "is damaged and removed" if action == "reading" else "cannot be written"
        _say(f"the compiled {program} in {cache.folder} {what}; compiled anew")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_TROUBLE.pattern)
        warnings.showwarning = shown
        yield


@contextlib.contextmanager
def _or_warn(cache: Cache) -> Iterator[None]:
    """The cache is a convenience: no failure of its folder ends a run."""
    try:
        yield
    except OSError as error:
        _say(f"compiled programs could not be kept in {cache.folder}: {error.strerror}")


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(_SUFFIX)]


def _digest_name(name: str) -> str:
    return name.removesuffix(_SUFFIX) + _DIGEST


def _digest(entry: Path) -> str:
    """Of the name as well, so that one program does not pass for another."""
    digest = hashlib.sha256(entry.name.encode() + b"\0")
    with open(entry, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(folder: Path, name: str) -> str:
    """What the digest ought to be; "" if nothing that can be trusted says it."""
    path = folder / _digest_name(name)
    try:
        return "" if trust.problem_of_file(path) else path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / _digest_name(name)).unlink(missing_ok=True)


def _is_whole(entry: Path) -> bool:
    """False for what a full disk has cut short. JAX compresses with zstandard where it has it."""
    data = entry.read_bytes()
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return True  # has its length at the front, and is refused by JAX when cut
    stream = zlib.decompressobj()
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof


def _remove_dead_views(folder: Path) -> None:
    """Views of processes that were killed: nobody holds their lock."""
    for name in os.listdir(folder):
        if not name.startswith(_VIEW):
            continue
        view = folder / name
        try:
            lock = os.open(view / _LOCK, os.O_RDWR)
        except OSError:  # being made or removed by its owner
            continue
        with open(lock, "rb+"):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(view, ignore_errors=True)


def _prune(folder: Path) -> None:
    found = []
    for name in _entries(folder):
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            about = (folder / name).stat()
            found.append((max(about.st_atime, about.st_mtime), about.st_size, name))
    total = sum(size for _, size, _ in found)
    for _, size, name in sorted(found):
        if total <= MAX_BYTES:
            return
        _remove(folder, name)
        total -= size


def _say(line: str) -> None:
    if is_first():
        print(f"moejax: warning: {line}", file=sys.stderr, flush=True)
