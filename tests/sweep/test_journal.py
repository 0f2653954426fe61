"""The journal alone, read back with SQL by hand, and with kills, damage and a sweep around it."""

import dataclasses
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.errors import UserError
from moejax.sweep import journal
from moejax.sweep.definition import Sweep, expand
from moejax.sweep.journal import Journal
from tests.sweep.small import ALL, Small

TORN = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("pragma cache_size = 1")  # pages go to the file before the commit
connection.execute("begin immediate")
connection.execute("update trials set state = 'failed', handle = hex(zeroblob(20000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return expand(str(Small(tmp_path, "a", "b").page))


def sql(folder: Path, statement: str) -> list[tuple]:
    connection = sqlite3.connect(folder / journal.NAME, isolation_level=None)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def unfinished(sweep: Sweep, **finished: bool) -> dict[str, bool]:
    return {trial.name: finished.get(trial.variant, False) for trial in sweep.trials}


def begun(folder: Path, sweep: Sweep) -> None:
    """Trial a is running and b is waiting."""
    with Journal(folder) as record:
        record.reconcile(sweep.trials, unfinished(sweep))
        record.begin(sweep.trials[0], "local")
        record.locate(sweep.trials[0], "here:7", "here")


def test_what_happened_to_a_trial_can_be_read_with_sql(tmp_path: Path, sweep: Sweep):
    first, second = sweep.trials
    begun(tmp_path, sweep)
    columns = "name, id, state, attempts, launcher, host, handle, status, seconds, ended is null"
    assert sql(tmp_path, f"select {columns} from trials order by rowid") == [
        ("a-seed0", first.id, "running", 1, "local", "here", "here:7", None, 0.0, 1),
        ("b-seed0", second.id, "pending", 0, "", "", "", None, 0.0, 1),
    ]
    with Journal(tmp_path) as record:
        record.end(first, journal.PREEMPTED, 75, 2.5)
        assert sql(tmp_path, f"select {columns} from trials")[0][2:] == (
            "preempted", 1, "local", "here", "here:7", 75, 2.5, 0,
        )  # fmt: skip
        record.begin(first, "other")  # the host and handle before are no longer true
        assert sql(tmp_path, f"select {columns} from trials")[0][2:] == (
            "running", 2, "other", "", "", None, 2.5, 1,
        )  # fmt: skip
        record.end(first, journal.DONE, 0, 1.5)
        assert sql(tmp_path, "select state, seconds, status from trials")[0] == ("done", 4.0, 0)
        ((order,),) = sql(tmp_path, "select julianday(ended) >= julianday(started) from trials "
                          "where name = 'a-seed0'")  # fmt: skip
        assert order == 1 and record.entries() == journal.read(tmp_path)


def test_workdirs_decide_what_is_done_and_the_history_is_kept(tmp_path: Path, sweep: Sweep):
    begun(tmp_path, sweep)
    with Journal(tmp_path) as record:
        record.end(sweep.trials[0], journal.FAILED, 1, 3.0)
        record.reconcile(sweep.trials, unfinished(sweep, a=True))
        entry = record.entries()["a-seed0"]
        assert (entry.state, entry.attempts, entry.seconds) == ("done", 1, 3.0)
        record.reconcile(sweep.trials, unfinished(sweep, b=True))
        assert [e.state for e in record.entries().values()] == ["pending", "done"]


def test_rows_of_other_trials_with_the_same_names_are_removed(tmp_path: Path, sweep: Sweep):
    """As when sweep.json was removed and the variants were renamed crosswise."""
    begun(tmp_path, sweep)
    first, second = sweep.trials
    crossed = [dataclasses.replace(first, variant="b"), dataclasses.replace(second, variant="a")]
    with Journal(tmp_path) as record:
        record.reconcile(crossed, unfinished(sweep))
        found = {(entry.name, entry.id, entry.attempts) for entry in record.entries().values()}
    assert found == {("b-seed0", first.id, 0), ("a-seed0", second.id, 0)}


def test_an_interrupted_write_is_rolled_back(tmp_path: Path, sweep: Sweep):
    begun(tmp_path, sweep)
    before, path = journal.read(tmp_path), tmp_path / journal.NAME
    killed = subprocess.run([sys.executable, "-c", TORN, path])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / f"{journal.NAME}-journal").stat().st_size, "the file was being changed"
    with pytest.raises(journal.Unreadable, match="cannot be read"):
        journal.read(tmp_path)
    with Journal(tmp_path) as record:
        assert record.entries() == before and not record.repaired
    assert journal.read(tmp_path) == before


def test_the_journal_can_be_read_while_it_is_written(tmp_path: Path, sweep: Sweep):
    begun(tmp_path, sweep)
    writer = sqlite3.connect(tmp_path / journal.NAME, isolation_level=None)
    writer.execute("begin immediate")
    writer.execute("update trials set state = 'failed'")
    assert journal.read(tmp_path)["a-seed0"].state == "running"
    writer.execute("commit")
    writer.close()
    assert journal.read(tmp_path)["a-seed0"].state == "failed"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "other file":
        path.write_bytes(b"trial,state\n" * 100)
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:4096] + bytes(len(content) - 4096))


@pytest.mark.parametrize("how", ["other file", "cut", "zeros"])
def test_a_corrupt_journal_is_moved_aside_and_replaced(how: str, tmp_path: Path, sweep: Sweep):
    begun(tmp_path, sweep)
    path, torn = tmp_path / journal.NAME, tmp_path / f"{journal.NAME}-journal"
    damage(path, how)
    damaged = path.read_bytes()
    torn.write_bytes(b"of the old one")
    with pytest.raises(journal.Unreadable):
        journal.read(tmp_path)
    with Journal(tmp_path) as record:
        assert record.repaired and record.entries() == {}
        record.reconcile(sweep.trials, unfinished(sweep, a=True))
    assert [entry.state for entry in journal.read(tmp_path).values()] == ["done", "pending"]
    assert (tmp_path / journal.DAMAGED).read_bytes() == damaged and not torn.exists()


def test_another_versions_journal_is_refused_and_left_alone(tmp_path: Path, sweep: Sweep):
    begun(tmp_path, sweep)
    sql(tmp_path, "pragma user_version = 9")
    before = (tmp_path / journal.NAME).read_bytes()
    with pytest.raises(UserError, match=r"another version of moejax \(9, this one writes 1\)"):
        Journal(tmp_path)
    assert (tmp_path / journal.NAME).read_bytes() == before
    with pytest.raises(journal.Unreadable, match="another version"):
        journal.read(tmp_path)


def test_no_journal_and_one_that_is_just_being_made_have_no_rows(tmp_path: Path):
    assert journal.read(tmp_path) == {} and not (tmp_path / journal.NAME).exists()
    (tmp_path / journal.NAME).touch()
    assert journal.read(tmp_path) == {}
    with Journal(tmp_path) as record:
        assert record.entries() == {} and not record.repaired


def test_a_journal_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path, sweep: Sweep):
    with Journal(tmp_path) as record:
        sql(tmp_path, "drop table trials")
        with pytest.raises(UserError, match="cannot be written .*; running trials continue"):
            record.begin(sweep.trials[0], "local")
    (tmp_path / "folder" / journal.NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "folder")


# With a sweep around it.


@pytest.mark.multiprocess
@pytest.mark.usefixtures("small_trials")
@pytest.mark.parametrize("what", ["lost", "damaged"])
def test_a_sweep_without_its_journal_resumes_and_runs_nothing_twice(what: str, tmp_path: Path):
    """Also a sweep that was begun before there were journals."""
    small = Small(tmp_path, "quick_1", "bad_then_good", "quick_2")
    assert small.run().status == 1
    path = small.folder / journal.NAME
    if what == "lost":
        path.unlink()
    else:
        damage(path, "other file")
    ended = small.run()
    assert ended.status == 0 and "2 of 3 trials are already finished" in ended.out
    assert ("journal.sqlite was corrupt" in ended.out) == (what == "damaged")
    assert small.log("quick_1").count("begins") == 1
    assert set(small.states().values()) == {"done"}
    assert [entry.attempts for entry in small.entries().values()] == [0, 1, 0]


@pytest.mark.multiprocess
@pytest.mark.usefixtures("small_trials")
def test_a_trial_whose_workdir_was_removed_is_not_done(tmp_path: Path):
    small = Small(tmp_path, "quick_1", "quick_2")
    assert small.run().status == 0
    shutil.rmtree(small.workdir("quick_2"))
    assert small.run().status == 0
    assert small.steps("quick_2") == ALL and small.log("quick_1").count("begins") == 1
    assert [entry.attempts for entry in small.entries().values()] == [1, 2]
