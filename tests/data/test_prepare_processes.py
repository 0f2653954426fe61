"""`moejax data prepare` as a program: killed, interrupted, twice at once, without room."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moejax.data import encode, prepare, unfinished, units
from moejax.data.prepare import prepare as prepare_shards
from moejax.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import moejax.data.encode, moejax.data.units, moejax.data.unfinished
from moejax import cli

if __name__ in ("__main__", "__mp_main__"):
    moejax.data.units.UNIT = 100_000
    moejax.data.unfinished.WORTH_KEEPING = 1
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def text(tmp_path) -> Path:
    """Lines for ten units of the program above."""
    path = tmp_path / "text.jsonl"
    line = "a document of some words, which a tokenizer needs a while for. " * 60
    path.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i in range(260)))
    return path


def lines(tmp_path, count: int = 300) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count)))
    return path


def start(tmp_path, text: Path, *more: str, **options) -> subprocess.Popen:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, program, "data", "prepare", f"--path={text}"]
    return subprocess.Popen(
        [*map(str, command), f"--out={tmp_path / 'out'}", *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(found, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def done_files(tmp_path) -> dict[str, int]:
    folder = tmp_path / ".out.unfinished"
    found = {}
    for path in folder.glob("*.done"):
        with contextlib.suppress(FileNotFoundError):  # removed at the end of the run
            found[path.name] = path.stat().st_mtime_ns
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- in this process


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    path = lines(tmp_path)
    monkeypatch.setattr(units, "UNIT", 1000)
    monkeypatch.setattr(unfinished, "WORTH_KEEPING", 1)
    count, encoded = 0, []

    def once(unit, *arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise UserError("data.path: stopped here")
        encoded.append(unit.spans)
        return encode.encode_unit(unit, *arguments)

    monkeypatch.setattr(prepare, "encode_unit", once)
    with pytest.raises(
        UserError, match=r"stopped here \(what is done is kept in '.*\.out\.unfinis"
    ):
        prepare_shards(str(path), "", str(tmp_path / "out"))
    assert len(encoded) == 3
    prepare_shards(str(path), "", str(tmp_path / "out"))
    assert len(encoded) == len(set(encoded)) > 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lines.jsonl", "out"]
    prepare_shards(str(path), "", str(tmp_path / "again"))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_text_that_changed_is_read_again_and_its_old_tokens_are_removed(tmp_path, monkeypatch):
    path = lines(tmp_path)
    monkeypatch.setattr(unfinished, "WORTH_KEEPING", 1)
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda *_: (_ for _ in ()).throw(UserError("stop")))
    with pytest.raises(UserError, match="stop"):
        prepare_shards(str(path), "", str(tmp_path / "out"))
    before = set(done_files(tmp_path))
    data = path.read_text().replace("document 7", "DOCUMENT 7", 1)
    path.write_text(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="stop"):
        prepare_shards(str(path), "", str(tmp_path / "out"))
    after = set(done_files(tmp_path))
    assert len(before) == len(after) == 1 and not before & after
    monkeypatch.setattr(prepare, "_write", write)
    prepare_shards(str(path), "", str(tmp_path / "out"))
    train = (tmp_path / "out" / "train.bin").read_bytes()[::2]
    assert b"DOCUMENT 7" in train + (tmp_path / "out" / "heldout.bin").read_bytes()[::2]


def test_text_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    path = lines(tmp_path)

    def changing(*arguments):
        yield from encode.encode_unit(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(prepare, "encode_unit", changing)
    with pytest.raises(
        UserError, match="data.path: 'lines.jsonl' was changed meanwhile; run again"
    ):
        prepare_shards(str(path), "", str(tmp_path / "out"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lines.jsonl"]


def test_a_second_preparation_is_refused_and_leaves_the_first_alone(tmp_path):
    path, out = lines(tmp_path), str(tmp_path / "deep" / "out")
    with unfinished.working_folder(out) as folder:
        kept = Path(folder, "work")
        kept.write_text("of the first")
        for _ in range(2):
            with pytest.raises(UserError, match="out_dir: another process is preparing '.*out'"):
                prepare_shards(str(path), "", out)
        assert kept.read_text() == "of the first"
    assert not list((tmp_path / "deep").iterdir())


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    path = lines(tmp_path, 30_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError) as raised:
            prepare_shards(str(path), "", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(raised.value) == f"out_dir: cannot write '{tmp_path / 'out'}': File too large"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lines.jsonl"]


def test_no_process_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="workers=0 must be at least 1 process"):
        prepare_shards(str(lines(tmp_path)), "", str(tmp_path / "out"), workers=0)


# ---------------------------------------------------------------- as a program


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, text, count):
    first = start(tmp_path, text, f"--workers={count}", start_new_session=True)
    wait_for(lambda: len(done_files(tmp_path)) >= 2, first)
    first.kill()
    first.communicate()
    before = done_files(tmp_path)
    assert 2 <= len(before), "it was killed while it worked"
    folder = tmp_path / ".out.unfinished"
    wait_for_end(first.pid)
    # Without WORTH_KEEPING of this run, what was there is looked at before it is removed.
    seen: dict[str, int] = {}
    second = start(tmp_path, text, f"--workers={count}")
    while second.poll() is None:
        seen |= done_files(tmp_path)
        time.sleep(0.002)
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert {name: seen.get(name) for name in before} == before
    assert not folder.exists()
    (tmp_path / "out").rename(tmp_path / "resumed")
    whole = start(tmp_path, text, "--workers=1")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "out")


def wait_for_end(session: int) -> None:
    """Wait for the end of all processes of a session, which must come without a signal."""
    end = time.monotonic() + 30
    while processes_of(session):
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_of(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_process_ends_in_one_line(tmp_path, text):
    run = start(tmp_path, text, "--workers=2", start_new_session=True)
    wait_for(lambda: len(done_files(tmp_path)) >= 1, run)
    children = [pid for pid in processes_of(run.pid) if is_worker(pid)]
    assert children
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    _, errors = run.communicate()
    assert run.returncode == 2
    assert errors.startswith("moejax: error: a process of the preparation ended (signal 9)")
    assert errors.count("\n") == 1 and "with fewer workers" in errors


def is_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupted_preparation_ends_at_once(tmp_path, text, count):
    run = start(tmp_path, text, f"--workers={count}", start_new_session=True)
    wait_for(lambda: len(done_files(tmp_path)) >= 1, run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to all processes
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    wait_for_end(run.pid)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.unfinished").exists(), "what was done is worth keeping here"
