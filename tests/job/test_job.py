"""Processes of a job, without JAX: threads that each hold one process's end."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moejax.errors import UserError
from moejax.job import Job, Place, resolved
from moejax.job import client as member
from moejax.job import rendezvous as connection
from moejax.job.rendezvous import await_all, connect


class Processes:
    """The ends of a job's processes, all in this one; how each ended is told instead of done."""

    def __init__(self, number: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.places = [Place(address, number, process, address) for process in range(number)]
        self.statuses: dict[int, int] = {}
        self.ended = threading.Condition()
        self.jobs: dict[int, Job] = {}
        self.made: list[Job] = []

    def _end(self, process: int, status: int) -> None:
        with self.ended:
            self.statuses.setdefault(process, status)
            self.ended.notify_all()
        for job in self.made:
            if job.place.process == process:
                job._wire.hang_up()

    def close(self) -> None:
        for job in self.made:
            job.part()
            job._wire.hang_up()

    def await_statuses(self, number: int) -> dict[int, int]:
        with self.ended:
            assert self.ended.wait_for(lambda: len(self.statuses) >= number, 10), self.statuses
        return self.statuses

    def begin(self, **changes: Any) -> None:
        """All come together, process 0 last."""
        for place in reversed(self.places):
            threading.Thread(target=self._join, args=(place,), daemon=True).start()
        until = time.monotonic() + 10
        while len(self.jobs) < len(self.places):
            assert time.monotonic() < until
            time.sleep(0.01)

    def _join(self, place: Place) -> None:
        job = connect(place)
        await_all(job)
        self.jobs[place.process] = job

    def everywhere(self, act: Callable[[Job], Any]) -> list[Any]:
        """What each of them returns or raises, all at the same time."""
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
        return [results[r] for r in range(len(self.places))]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Processes]]:
    monkeypatch.setattr(member, "GRACE", 0.3)
    made: list[Processes] = []
    begin = Job.__init__

    def begins(job: Job, place: Place, *args: Any, **kwargs: Any) -> None:
        own = next(p for p in made if p.places[0].coordinator == place.coordinator)
        own.made.append(job)
        begin(job, place, *args, **kwargs, end=lambda status: own._end(place.process, status))

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


def test_every_process_gets_what_process_0_makes_of_all_values(three: Processes):
    def collect(job: Job) -> Any:
        return job.exchange("x", 10 * job.place.process, lambda values: ("", sum(values)))

    assert three.everywhere(collect) == [30, 30, 30]
    assert three.everywhere(collect) == [30, 30, 30]  # and again under the same name


def test_a_problem_is_raised_on_every_process(three: Processes):
    said = three.everywhere(lambda job: job.exchange("x", 0, lambda values: ("no", None)))
    assert [str(error) for error in said] == ["no"] * 3


def test_all_stop_at_one_step_that_none_has_taken_wherever_each_is(three: Processes):
    """Process 2 is two steps ahead of process 0 when process 1 is asked to stop."""
    for process, job in three.jobs.items():
        assert not any(job.stops_at(step) for step in range(5 + process))
    three.jobs[1].ask_to_stop("SIGTERM")

    def go_on(job: Job) -> int:
        step = 5 + job.place.process
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


def test_what_ends_one_process_ends_all_with_its_words_and_status(three: Processes, capfd):
    three.jobs[1].fail("data.path='x' does not exist", 2)
    three.jobs[1].leave(2)
    assert three.await_statuses(3) == {0: 2, 1: 2, 2: 2}
    line = "moejax: error: process 1: data.path='x' does not exist\n"
    assert capfd.readouterr().err == 2 * line  # process 1 has said it by itself


@pytest.mark.parametrize("dead", [0, 2])
def test_a_process_that_dies_is_missed(three: Processes, dead: int, capfd):
    job = three.jobs[dead]
    if job.hub:
        for key in list(job.hub._selector.get_map().values()):
            if key.data:  # as the kernel does for a dead process
                key.data.hang_up()
    else:
        job._wire.hang_up()
    statuses = three.await_statuses(2)
    assert {statuses[r] for r in range(3) if r in statuses and r != dead} == {1}
    said = capfd.readouterr().err
    assert f"moejax: error: process {dead} " in said and "has died" in said


def test_processes_that_part_end_nobody(three: Processes):
    for process in (1, 2):
        three.jobs[process].part()
        time.sleep(0.1)
        three.jobs[process]._wire.hang_up()
    time.sleep(0.3)
    assert not three.jobs[0].told.is_set()


MISTAKES = {
    "another number": ({"processes": 3}, "process 1 has distributed.num_processes=3 and process 0"),
    "a number twice": ({"process": 0}, "process 0 is there twice"),
}


@pytest.mark.parametrize("change, words", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_place_is_refused_in_words_at_once(change, words, make, capfd):
    processes = make(2)
    right, wrong = processes.places
    first = connect(right)
    if "process" in change:
        with pytest.raises(UserError, match=words):
            connect(wrong._replace(**change))
        processes.await_statuses(1)
    else:
        connect(wrong._replace(**change))
        assert processes.await_statuses(2) == {0: 2, 1: 2}
    assert words in capfd.readouterr().err
    assert first.told.is_set()


def test_who_is_no_process_of_the_job_is_sent_away(make):
    processes = make(2)
    first = connect(processes.places[0])
    address = processes.places[0].coordinator.split(":")
    for words in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"say": "x"}).encode() + b"\n", b"[]\n"):
        with socket.create_connection((address[0], int(address[1])), timeout=5) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
    connect(processes.places[1])
    assert first.begun.wait(5)


def test_one_that_is_missing_is_named(make, monkeypatch):
    monkeypatch.setattr(connection, "START", 0.0)
    processes = make(2)
    with pytest.raises(UserError, match="process 1 of 2 did not come to distributed.coordinator="):
        await_all(connect(processes.places[0]))
    with pytest.raises(UserError, match="process 1 did not find process 0 at distributed.coord"):
        connect(make(2).places[1], patience=0)


@pytest.mark.slow
def test_a_port_that_another_program_has_is_said_so(make, monkeypatch):
    monkeypatch.setattr(connection, "TAKEN", 0.0)
    processes = make(2)
    host, port = processes.places[0].coordinator.split(":")
    with socket.socket() as other:
        other.bind((host, int(port)))
        other.listen()
        with pytest.raises(UserError, match="the port is in use by another program"):
            connect(processes.places[0])


def test_an_address_of_another_machine_is_no_place_to_listen(make):
    place = make(2).places[0]._replace(bind="192.0.2.1:4000")
    with pytest.raises(UserError, match="process 0 cannot listen at distributed.coordinator="):
        connect(place)


def test_a_host_becomes_a_number():
    assert resolved("localhost:4000") in ("127.0.0.1:4000", "[::1]:4000")
    assert resolved("[::1]:4000") == "[::1]:4000"
    with pytest.raises(UserError, match="distributed.coordinator='nowhere.invalid:1'"):
        resolved("nowhere.invalid:1")
