"""Compiled programs are kept, shared and repaired, and never change a result or end a run."""

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.train import compile_cache, ownership
from moejax.train.compile_cache import kept, machine
from tests.train.runs import ROOT

EXPECTED = np.arange(6.0, dtype=np.float32) * 3 + 1


@pytest.fixture
def keep_everything(monkeypatch) -> Iterator[None]:
    """The cache that the tests switch off, on, also for what compiles fast."""
    fast = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.setitem(compile_cache._SETTINGS, fast, 0.0)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", False)


class Hits(logging.Handler):
    """Programs that were found, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "cache hit for" in record.getMessage():
            self.found.append(record.getMessage().split("'")[1])


@contextmanager
def hits() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("jax._src.compiler"), Hits()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def compiled(factor: float = 3.0) -> np.ndarray:
    """A function of this name compiled as by a new process: jax knows functions by identity."""

    @jax.jit
    def some_program(x: jax.Array) -> jax.Array:
        return x * factor + 1

    return np.asarray(some_program(jnp.arange(6.0)))


def entries(folder: Path) -> list[Path]:
    return sorted((folder / machine()).glob("jit_some_program-*-cache"))


def views(folder: Path) -> list[Path]:
    return list((folder / machine()).glob(".process-*"))


def test_a_program_compiled_by_one_run_is_loaded_by_the_next(keep_everything, tmp_path):
    for expected in (0, 1):
        with kept(str(tmp_path)), hits() as found:
            np.testing.assert_array_equal(compiled(), EXPECTED)
        assert found.count("jit_some_program") == expected
    assert len(entries(tmp_path)) == 1 and not views(tmp_path)
    assert getattr(jax.config, compile_cache._FOLDER) is None, "jax is left as it was"


def test_published_programs_can_be_loaded_while_the_run_continues(keep_everything, tmp_path):
    with kept(str(tmp_path)):
        compiled()
        assert not entries(tmp_path), "what may be half written is seen by nobody"
        compile_cache.publish()
        (entry,) = entries(tmp_path)
        assert len(entry.read_bytes()) > 1000 and len(views(tmp_path)) == 1


def test_a_damaged_entry_is_reported_in_one_line_and_replaced(keep_everything, tmp_path, capsys):
    with kept(str(tmp_path)):
        compiled()
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2])
    with warnings.catch_warnings():  # pytest's own showwarning would take the place of the run's
        warnings.simplefilter("default")
        with kept(str(tmp_path)), hits() as found:
            np.testing.assert_array_equal(compiled(), EXPECTED)
    assert "jit_some_program" not in found
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("moejax: warning: "), said
    assert "jit_some_program" in said and "damaged" in said
    (entry,) = entries(tmp_path)
    assert len(entry.read_bytes()) > len(whole) * 3 // 4
    with kept(str(tmp_path)), hits() as found:
        np.testing.assert_array_equal(compiled(), EXPECTED)
    assert "jit_some_program" in found and not capsys.readouterr().err


@pytest.mark.parametrize("where", ["first", "middle", "last", "digest"])
def test_one_flipped_bit_of_an_entry_or_its_digest_is_a_reported_miss(
    where: str, keep_everything, tmp_path, capsys
):
    with kept(str(tmp_path)):
        compiled()
    (entry,) = entries(tmp_path)
    (digest,) = (tmp_path / machine()).glob("jit_some_program-*-digest")
    file = digest if where == "digest" else entry
    content = bytearray(file.read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1, "digest": 5}[where]] ^= 1
    file.write_bytes(content)
    with kept(str(tmp_path)), hits() as found:
        np.testing.assert_array_equal(compiled(), EXPECTED)
    assert "jit_some_program" not in found
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "jit_some_program" in said and "damaged" in said
    with kept(str(tmp_path)), hits() as found:
        compiled()
    assert "jit_some_program" in found and not capsys.readouterr().err


def test_another_program_in_the_place_of_an_entry_is_not_run(keep_everything, tmp_path, capsys):
    with kept(str(tmp_path)):
        compiled(3.0)
        compile_cache.publish()
        (right,) = entries(tmp_path)
        compiled(4.0)
    (wrong,) = set(entries(tmp_path)) - {right}
    right.write_bytes(wrong.read_bytes())
    wrong_digest = wrong.with_name(wrong.name.replace("-cache", "-digest")).read_text()
    right.with_name(right.name.replace("-cache", "-digest")).write_text(wrong_digest)
    with kept(str(tmp_path)):
        np.testing.assert_array_equal(compiled(3.0), EXPECTED)
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_others_may_write_to_is_not_used(
    mode: int, inner: bool, keep_everything, tmp_path, capsys
):
    cache = tmp_path / "cache"
    with kept(str(cache)):
        compiled()
    (cache / machine() if inner else cache).chmod(mode)
    with kept(str(cache)), hits() as found:
        np.testing.assert_array_equal(compiled(), EXPECTED)
    said = capsys.readouterr().err
    assert "jit_some_program" not in found and said.count("\n") == 1
    assert "written to by others" in said and f"mode {mode:o}" in said
    assert "report.compile_cache" in said


def test_a_folder_below_a_writable_one_is_used_only_if_that_is_sticky(tmp_path):
    shared = tmp_path / "shared"
    (shared / "mine").mkdir(parents=True)
    (shared / "mine").chmod(0o700)
    shared.chmod(0o777)
    with pytest.raises(ownership.Untrusted, match="shared may be written"):
        ownership.check(shared / "mine")
    (tmp_path / "link").symlink_to(shared / "mine")
    with pytest.raises(ownership.Untrusted, match="shared may be written"):
        ownership.check(tmp_path / "link")
    shared.chmod(0o1777)
    ownership.check(shared / "mine")
    ownership.check(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_files_and_folders_of_another_user_are_not_used(keep_everything, tmp_path, capsys):
    cache = tmp_path / "cache"
    with kept(str(cache)):
        compiled()
    (entry,) = entries(cache)
    os.chown(entry, 12345, -1)
    with kept(str(cache)), hits() as found:
        compiled()
    assert "jit_some_program" not in found and "user 12345" in capsys.readouterr().err
    os.chown(cache, 12345, -1)
    with kept(str(cache)):
        compiled()
    assert f"{cache} belongs to user 12345" in capsys.readouterr().err
    cache.chmod(0o755)
    os.chown(cache, 0, -1)
    (tmp_path / "link").symlink_to(cache)
    os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    with pytest.raises(ownership.Untrusted, match="link belongs to user 12345"):
        ownership.check(tmp_path / "link")


def test_an_entry_that_others_may_write_to_or_that_is_a_link_is_not_used(
    keep_everything, tmp_path, capsys
):
    with kept(str(tmp_path)):
        compiled()
    (entry,) = entries(tmp_path)
    entry.chmod(0o622)
    with kept(str(tmp_path)), hits() as found:
        compiled()
    assert "jit_some_program" not in found and "mode 622" in capsys.readouterr().err
    entry.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o600)
    entry.symlink_to(tmp_path / "elsewhere")
    with kept(str(tmp_path)), hits() as found:
        compiled()
    assert "jit_some_program" not in found and "no ordinary file" in capsys.readouterr().err


def test_an_entry_that_a_full_disk_cut_short_is_not_published(keep_everything, tmp_path):
    with kept(str(tmp_path)):
        compiled()
        (view,) = views(tmp_path)
        (entry,) = view.glob("jit_some_program-*-cache")
        entry.write_bytes(entry.read_bytes()[:-10])
    assert not entries(tmp_path)


KILLED = """
import resource, signal, sys
from moejax.train import compile_cache
from tests.train.test_compile_cache import compiled
compile_cache._SETTINGS["jax_persistent_cache_min_compile_time_secs"] = 0.0
with compile_cache.kept(sys.argv[1]):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the kernel kills at byte 1001
    compiled()
"""


@pytest.mark.slow
def test_a_run_killed_while_writing_an_entry_leaves_no_torn_entry(
    keep_everything, tmp_path, capsys
):
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGXFSZ, ended
    (view,) = views(tmp_path)
    assert [entry.stat().st_size for entry in view.glob("*-cache")] == [1000], "a torn entry"
    assert not list((tmp_path / machine()).glob("*-cache"))
    with kept(str(tmp_path)):
        assert not view.exists() and len(views(tmp_path)) == 1
        np.testing.assert_array_equal(compiled(), EXPECTED)
    assert len(entries(tmp_path)) == 1 and not capsys.readouterr().err


def test_the_view_of_a_running_process_is_kept(tmp_path):
    other = compile_cache.Cache(tmp_path)
    compile_cache.Cache(tmp_path).close()
    assert views(tmp_path) == [other.view]
    other.close()


def test_an_unusable_folder_is_reported_in_one_line_and_the_run_continues(
    keep_everything, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    with kept(str(tmp_path / "file" / "cache")):
        np.testing.assert_array_equal(compiled(), EXPECTED)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "report.compile_cache" in said
    assert "Not a directory" in said


def test_a_folder_that_vanishes_during_a_run_is_reported_in_one_line(
    keep_everything, tmp_path, capsys
):
    with kept(str(tmp_path / "cache")):
        compiled()
        (tmp_path / "cache").rename(tmp_path / "moved")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_least_recently_used_entries_are_removed_first(keep_everything, tmp_path, monkeypatch):
    with kept(str(tmp_path)):
        compiled(3.0)
        compile_cache.publish()
        (old,) = entries(tmp_path)
        os.utime(old, (1e9, 1e9))
        monkeypatch.setattr(compile_cache, "MAX_BYTES", int(1.5 * old.stat().st_size))
        compiled(4.0)
    (left,) = entries(tmp_path)
    assert left != old


def test_the_cache_folder_follows_config_and_environment(tmp_path, monkeypatch):
    folder_of = compile_cache.folder_of
    assert folder_of("auto") is None, "off in tests, by jax's own switch"
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert folder_of("auto") == tmp_path / "moejax/jax"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert folder_of("auto") == Path.home() / ".cache/moejax/jax"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert folder_of("auto") == Path.home() / ".cache/moejax/jax"
        home = os.environ["HOME"]
        monkeypatch.setenv("HOME", "")  # as some batch systems have it: `~` would be the root
        assert folder_of("auto") is None
        monkeypatch.setenv("HOME", home)
        assert folder_of("off") is None
        assert folder_of("~/programs") == Path.home() / "programs"
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
        assert folder_of("auto") is None, "a cache that the user has set up stays"
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
        jax.config.update("jax_compilation_cache_dir", None)
