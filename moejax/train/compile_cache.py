"""Compiled programs that outlive the process: JAX's persistent compilation cache, safe to kill.

JAX writes an entry in the place where readers look for it, so a process that is killed while it
writes, or a full disk, leaves a torn entry that every later run reads. Here JAX gets a private
folder for this process, with hard links to the known entries; new entries are linked back when they
are complete:

    FOLDER/MACHINE/jit_train_step-<hash>-cache     an entry, complete from the start
    FOLDER/MACHINE/jit_train_step-<hash>-digest    SHA-256 of its name and content
    FOLDER/MACHINE/.process-<pid>-<random>/        one process's view; removed when it has ended

An entry holds machine code, so machines with different processors do not share entries. Loaded
programs are those that would be compiled, bit for bit; the cache can be removed at any time.

Entries are executed, so one is used only if its digest is right and nobody else can have written
it: neither the folder, nor one above it, nor the entry's files may belong to another user or be
writable by others (`moejax.train.ownership`).
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from moejax.data.formats.compression import CHUNK, ZSTANDARD, Damaged, open_bytes
from moejax.train import ownership
from moejax.train.processes import is_first

AUTO, OFF = "auto", "off"
MAX_BYTES = 2**30
"""Beyond this the least recently used entries are removed."""

_SUFFIX, _DIGEST = "-cache", "-digest"
_VIEW = ".process-"
_LOCK = ".lock"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_SETTINGS = {
    # A program that compiles faster is not worth a file.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    # The path of XLA's own caches would be that of this process, and a part of the entries' keys.
    "jax_persistent_cache_enable_xla_caches": "none",
}
_FOLDER, _SWITCH = "jax_compilation_cache_dir", "jax_enable_compilation_cache"

_active: "Cache | None" = None


class Cache:
    """One process's view of a folder of entries. ``close`` removes the view."""

    def __init__(self, folder: Path):
        self.folder = folder / machine()
        for path in (folder, self.folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            ownership.check(path)
        _remove_dead_views(self.folder)
        self.view = Path(tempfile.mkdtemp(prefix=f"{_VIEW}{os.getpid()}-", dir=self.folder))
        self._lock = os.open(self.view / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._known = set[str]()
        problems = [
            f"{name} {text}" for name in _entries(self.folder) if (text := self._link(name))
        ]
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            _warn(f"compiled programs in {self.folder} are not used: {problems[0]}{more}")

    def _link(self, name: str) -> str:
        """Links an entry into the view; returns why it is not used, or ""."""
        entry = self.view / name
        try:
            os.link(self.folder / name, entry, follow_symlinks=False)
            problem = ownership.problem_of_file(entry)
            intact = not problem and _stored_digest(self.folder, name) == _digest(entry)
        except FileNotFoundError:  # another process has just removed it
            return ""
        except PermissionError:
            return "belongs to another user"
        if intact:
            self._known.add(name)
            return ""
        entry.unlink()
        if problem:
            return problem
        _remove(self.folder, name)
        return "is damaged (its digest is missing or differs) and removed"

    def publish(self) -> None:
        """Adds JAX's new entries to the folder; nothing may be compiling meanwhile."""
        new = [name for name in _entries(self.view) if name not in self._known]
        for name in new:
            entry = self.view / name
            if not _is_complete(entry):
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
            _remove_least_used(self.folder)

    def close(self) -> None:
        self.publish()
        shutil.rmtree(self.view, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def kept(choice: str, names_matter: bool = False) -> Iterator[None]:
    """Inside, compiled programs are looked up in and added to the user's cache.

    ``choice`` is ``report.compile_cache``: "auto", "off" or a folder. With "auto" a cache that is
    set up or switched off by JAX's own settings is left as it is. If a folder cannot be used, one
    line on stderr says so, and everything is compiled. Programs that differ only in the names of
    scopes are one, unless ``names_matter``.
    """
    global _active
    folder = folder_of(choice)
    cache = None if folder is None or _active else _open(folder)
    if cache is None:
        yield
        return
    settings = {
        **_SETTINGS,
        _FOLDER: str(cache.view),
        "jax_compilation_cache_include_metadata_in_key": names_matter,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with warnings.catch_warnings():
        # JAX continues without an entry that it cannot write; `publish` drops what it has left.
        warnings.filterwarnings("ignore", message="Error writing persistent compilation cache")
        try:
            _configure(settings)
            _active = cache
            yield
        finally:
            _active = None
            with _warn_of_errors(cache):
                cache.close()
            _configure(before)


def publish() -> None:
    """Makes the programs compiled so far survive a kill; does nothing without a cache."""
    if _active is not None:
        with _warn_of_errors(_active):
            _active.publish()


def folder_of(choice: str) -> Path | None:
    """The folder for a value of ``report.compile_cache``; None for no cache of ours."""
    if choice == OFF:
        return None
    if choice != AUTO:
        return Path(os.path.expanduser(choice)).absolute()
    if getattr(jax.config, _FOLDER) or not getattr(jax.config, _SWITCH):
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard ignores relative values.
    root = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    no_home = os.environ.get("HOME") == "" and not os.path.isabs(base)  # it would be /.cache
    # Or a batch system's user by number, unknown in the container.
    if no_home or not os.path.isabs(root):
        _warn(
            "compiled programs are not kept: this user has no home folder; report.compile_cache "
            "names a folder or is off"
        )
        return None
    return Path(root) / "moejax" / "jax"


def machine() -> str:
    """The processor, which an entry's machine code depends on and its key does not contain."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    text = "\n".join(sorted(set(features or lines)))
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _open(folder: Path) -> Cache | None:
    """The cache in a folder; None, with a warning, if the folder cannot be used."""
    try:
        return Cache(folder)
    except OSError as error:
        _warn(
            f"compiled programs cannot be kept in {folder} ({error.strerror}); compiling without. "
            "report.compile_cache names another folder or is off"
        )
    except ownership.Untrusted as problem:
        _warn(
            f"compiled programs in {folder} are not used, since {problem}; compiling without. Fix "
            "that (chmod go-w), or let report.compile_cache name another folder or be off"
        )
    return None


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _warn_of_errors(cache: Cache) -> Iterator[None]:
    """The cache is a convenience: no failure of its folder ends a run."""
    try:
        yield
    except OSError as error:
        _warn(f"compiled programs could not be kept in {cache.folder}: {error.strerror}")


def _entries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(_SUFFIX)]


def _digest_name(name: str) -> str:
    return name.removesuffix(_SUFFIX) + _DIGEST


def _digest(entry: Path) -> str:
    """A digest that includes the name, so that one program does not pass for another."""
    return hashlib.sha256(entry.name.encode() + b"\0" + entry.read_bytes()).hexdigest()


def _stored_digest(folder: Path, name: str) -> str:
    """The digest on file; "" if there is none that can be trusted."""
    path = folder / _digest_name(name)
    try:
        return "" if ownership.problem_of_file(path) else path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / _digest_name(name)).unlink(missing_ok=True)


def _is_complete(entry: Path) -> bool:
    """True if a full disk has not cut an entry short. JAX compresses with zstandard or zlib."""
    data = entry.read_bytes()
    if data.startswith(_ZSTANDARD):
        with open_bytes(str(entry), ZSTANDARD) as content:
            try:
                while content.read1(CHUNK):
                    pass
            except Damaged:
                return False
        return True
    stream = zlib.decompressobj()
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof


def _remove_dead_views(folder: Path) -> None:
    """Removes the views of killed processes, whose locks nobody holds."""
    for view in folder.glob(f"{_VIEW}*"):
        with contextlib.suppress(OSError), open(view / _LOCK, "rb+") as lock:
            # An OSError: the view's owner holds the lock, or is making or removing it.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(view, ignore_errors=True)


def _remove_least_used(folder: Path) -> None:
    entries = []
    for name in _entries(folder):
        with contextlib.suppress(FileNotFoundError):  # another process removes entries too
            about = (folder / name).stat()
            entries.append((max(about.st_atime, about.st_mtime), about.st_size, name))
    total = sum(size for _, size, _ in entries)
    for _, size, name in sorted(entries):
        if total <= MAX_BYTES:
            return
        _remove(folder, name)
        total -= size


def _warn(line: str) -> None:
    if is_first():
        print(f"moejax: warning: {line}", file=sys.stderr, flush=True)
