"""Processes of a job, without JAX: threads that each hold one process's end."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moejax.errors import UserError
from moejax.job import Job, JobSpec, member, rendezvous, resolve_address
from moejax.job.rendezvous import await_all, connect


class Processes:
    """A job's processes as threads of this one; exit statuses are recorded instead of exiting."""

    def __init__(self, number: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.specs = [JobSpec(address, number, process, address) for process in range(number)]
        self.statuses: dict[int, int] = {}
        self.ended = threading.Condition()
        self.jobs: dict[int, Job] = {}
        self.made: list[Job] = []

    def _end(self, process: int, status: int) -> None:
        with self.ended:
            self.statuses.setdefault(process, status)
            self.ended.notify_all()
        for job in self.made:
            if job.spec.process == process:
                job._connection.hang_up()

    def close(self) -> None:
        for job in self.made:
            job.announce_end()
            job._connection.hang_up()

    def await_statuses(self, number: int) -> dict[int, int]:
        with self.ended:
            assert self.ended.wait_for(lambda: len(self.statuses) >= number, 10), self.statuses
        return self.statuses

    def begin(self, **changes: Any) -> None:
        """All join, process 0 last."""
        for spec in reversed(self.specs):
            threading.Thread(target=self._join, args=(spec,), daemon=True).start()
        until = time.monotonic() + 10
        while len(self.jobs) < len(self.specs):
            assert time.monotonic() < until
            time.sleep(0.01)

    def _join(self, spec: JobSpec) -> None:
        job = connect(spec)
        await_all(job)
        self.jobs[spec.process] = job

    def everywhere(self, act: Callable[[Job], Any]) -> list[Any]:
        """The result or exception of each process, all at the same time."""
        results: dict[int, Any] = {}

        def one(process: int) -> None:
            try:
                results[process] = act(self.jobs[process])
            except UserError as error:
                results[process] = error

        threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in self.jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(results) == len(self.jobs)
        return [results[r] for r in range(len(self.specs))]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Processes]]:
    monkeypatch.setattr(member, "GRACE", 0.3)
    made: list[Processes] = []
    begin = Job.__init__

    def begins(job: Job, spec: JobSpec, *args: Any, **kwargs: Any) -> None:
        own = next(p for p in made if p.specs[0].coordinator == spec.coordinator)
        own.made.append(job)
        begin(job, spec, *args, **kwargs, end=lambda status: own._end(spec.process, status))

    monkeypatch.setattr(Job, "__init__", begins)

    def of(number: int) -> Processes:
        made.append(Processes(number))
        return made[-1]

    yield of
    for processes in made:
        processes.close()


@pytest.fixture
def three(make: Callable[[int], Processes]) -> Processes:
    processes = make(3)
    processes.begin()
    return processes


def test_every_process_gets_the_result_of_process_0_on_all_values(three: Processes):
    def collect(job: Job) -> Any:
        return job.exchange("x", 10 * job.spec.process, lambda values: ("", sum(values)))

    assert three.everywhere(collect) == [30, 30, 30]
    assert three.everywhere(collect) == [30, 30, 30]  # and again under the same name


def test_a_problem_is_raised_on_every_process(three: Processes):
    said = three.everywhere(lambda job: job.exchange("x", 0, lambda values: ("no", None)))
    assert [str(error) for error in said] == ["no"] * 3


def test_all_stop_at_the_same_step_which_none_has_taken_before(three: Processes):
    """Process 2 is two steps ahead of process 0 when process 1 is asked to stop."""
    for process, job in three.jobs.items():
        assert not any(job.stops_at(step) for step in range(5 + process))
    three.jobs[1].ask_to_stop("SIGTERM")

    def go_on(job: Job) -> int:
        step = 5 + job.spec.process
        while not job.stops_at(step):
            step += 1
            time.sleep(0.01)
        return step

    assert len(set(stopped := three.everywhere(go_on))) == 1, stopped
    assert stopped[0] >= 7


def test_a_request_before_the_first_step_stops_all_there(three: Processes):
    three.jobs[2].ask_to_stop("SIGINT")
    time.sleep(0.2)
    assert three.everywhere(lambda job: job.stops_at(0)) == [True] * 3


def test_the_failure_of_one_process_ends_all_with_its_message_and_status(three: Processes, capfd):
    three.jobs[1].fail("data.path='x' does not exist", 2)
    three.jobs[1].leave(2)
    assert three.await_statuses(3) == {0: 2, 1: 2, 2: 2}
    line = "moejax: error: process 1: data.path='x' does not exist\n"
    assert capfd.readouterr().err == 2 * line  # process 1 prints it itself


@pytest.mark.parametrize("dead", [0, 2])
def test_the_death_of_a_process_is_noticed(three: Processes, dead: int, capfd):
    job = three.jobs[dead]
    if job.hub:
        for key in list(job.hub._selector.get_map().values()):
            if key.data:  # as the kernel does for a dead process
                key.data.hang_up()
    else:
        job._connection.hang_up()
    statuses = three.await_statuses(2)
    assert {statuses[r] for r in range(3) if r in statuses and r != dead} == {1}
    said = capfd.readouterr().err
    assert f"moejax: error: process {dead} " in said and "has died" in said


def test_processes_that_announce_their_end_end_no_other(three: Processes):
    for process in (1, 2):
        three.jobs[process].announce_end()
        time.sleep(0.1)
        three.jobs[process]._connection.hang_up()
    time.sleep(0.3)
    assert not three.jobs[0].other_failed.is_set()


MISTAKES = {
    "another number": ({"processes": 3}, "process 1 has distributed.num_processes=3 and process 0"),
    "a number twice": ({"process": 0}, "process 0 is there twice"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_job_spec_is_refused_at_once(change, words, make, capfd):
    processes = make(2)
    right, wrong = processes.specs
    first = connect(right)
    if "process" in change:
        with pytest.raises(UserError, match=words):
            connect(wrong._replace(**change))
        processes.await_statuses(1)
    else:
        connect(wrong._replace(**change))
        assert processes.await_statuses(2) == {0: 2, 1: 2}
    assert words in capfd.readouterr().err
    assert first.other_failed.is_set()


def test_a_stranger_is_disconnected(make):
    processes = make(2)
    first = connect(processes.specs[0])
    address = processes.specs[0].coordinator.split(":")
    for words in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"submit": "x"}).encode() + b"\n", b"[]\n"):
        with socket.create_connection((address[0], int(address[1])), timeout=5) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
    connect(processes.specs[1])
    assert first.begun.wait(5)


def test_a_missing_process_is_named(make, monkeypatch):
    monkeypatch.setattr(rendezvous, "START", 0.0)
    processes = make(2)
    with pytest.raises(UserError, match="process 1 of 2 did not come to distributed.coordinator="):
        await_all(connect(processes.specs[0]))
    with pytest.raises(UserError, match="process 1 did not find process 0 at distributed.coord"):
        connect(make(2).specs[1], patience=0)


@pytest.mark.slow
def test_a_port_in_use_by_another_program_is_reported(make, monkeypatch):
    monkeypatch.setattr(rendezvous, "PORT_BUSY", 0.0)
    processes = make(2)
    host, port = processes.specs[0].coordinator.split(":")
    with socket.socket() as other:
        other.bind((host, int(port)))
        other.listen()
        with pytest.raises(UserError, match="the port is in use by another program"):
            connect(processes.specs[0])


def test_an_address_of_another_machine_cannot_be_bound(make):
    spec = make(2).specs[0]._replace(bind="192.0.2.1:4000")
    with pytest.raises(UserError, match="process 0 cannot listen at distributed.coordinator="):
        connect(spec)


def test_a_host_name_is_resolved_to_a_number():
    assert resolve_address("localhost:4000") in ("127.0.0.1:4000", "[::1]:4000")
    assert resolve_address("[::1]:4000") == "[::1]:4000"
    with pytest.raises(UserError, match="distributed.coordinator='nowhere.invalid:1'"):
        resolve_address("nowhere.invalid:1")
