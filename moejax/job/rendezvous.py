"""The rendezvous of a job's processes at the coordinator's address."""

import errno
import os
import socket
import time
from typing import Any

from moejax.errors import UserError
from moejax.job.connection import Connection
from moejax.job.hub import Hub
from moejax.job.member import Job, JobSpec, say

START = 300.0
"""Seconds that processes wait for each other."""
QUIET = 2.0
"""Seconds after which a waiting process prints a line."""
PORT_BUSY = 10.0
"""Seconds that process 0 waits for a busy port: a job that is just ending may still have it."""


def resolve_address(address: str) -> str:
    """host:port with the host as a number.

    Raises:
      UserError: no such host.
    """
    host, port = _split(address)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"distributed.coordinator={address!r}: {error.strerror}; name a host that this machine "
            "can resolve, or its number"
        ) from error
    number = min(addresses, key=lambda entry: entry[0] != socket.AF_INET)[4][0]
    return f"[{number}]:{port}" if ":" in str(number) else f"{number}:{port}"


def connect(
    spec: JobSpec, problem: str = "", status: int = 0, patience: float | None = None
) -> Job:
    """Connects to the job, whose other processes may still be missing (see `await_all`).

    With a `problem` the connection only reports that this process fails, and the others end.

    Raises:
      UserError: process 0 does not answer, or cannot listen.
    """
    about = {
        "hello": spec.process,
        "processes": spec.processes,
        "who": f"pid {os.getpid()} on {socket.gethostname()}",
        "problem": problem,
        "status": status,
    }
    if spec.process == 0:
        connection, hub = _listen(spec, about)
        return Job(spec, connection, _split(spec.bind)[0], hub=hub)
    deadline = time.monotonic() + (START if patience is None else patience)
    connection, answer = _call(spec, about, deadline)
    return Job(spec, connection, connection.socket.getsockname()[0], answer=answer)


def await_all(job: Job) -> None:
    """Blocks until all processes have joined.

    Raises:
      UserError: in process 0, if some do not join in time.
    """
    spec, hub, began = job.spec, job.hub, time.monotonic()
    printed = False
    while not job.begun.wait(0.5):
        waited = time.monotonic() - began
        if hub is None:
            continue
        late = f"process {', '.join(map(str, hub.missing()))}"
        if waited > START:
            raise UserError(
                f"{late} of {spec.processes} did not come to distributed.coordinator="
                f"{spec.coordinator} within {START:.0f} s; start it, or correct "
                "distributed.num_processes"
            )
        if waited > QUIET and not printed:
            printed = True
            say(f"process 0 waits for {late} at {spec.coordinator}")


def _listen(spec: JobSpec, about: dict[str, object]) -> tuple[Connection, Hub]:
    host, port = _split(spec.bind)
    until = time.monotonic() + PORT_BUSY
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(spec.processes + 16)
            break
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"process 0 cannot listen at distributed.coordinator={spec.coordinator} "
                    f"({error.strerror}); name an address and a free port of the machine that "
                    "process 0 is on"
                ) from error
            _check_no_other_hub(spec, about)
            if time.monotonic() > until:
                raise UserError(
                    f"distributed.coordinator={spec.coordinator}: the port is in use by another "
                    "program; choose a free one, or end that program"
                ) from error
            time.sleep(0.3)
    own, other = socket.socketpair()
    hub = Hub(listener, spec.processes, other)
    hub.start()
    connection = Connection(own)
    connection.send(**about)
    return connection, hub


def _check_no_other_hub(spec: JobSpec, about: dict[str, object]) -> None:
    """Introduces this process to a hub at its own port, which then reports two processes 0.

    Raises:
      UserError: there are two.
    """
    introduced = _introduced(_split(spec.bind), about)
    if introduced is None:
        return
    connection, answer = introduced
    connection.close()
    for message in answer:
        if "failed" in message:
            failure = message["failed"]
            raise UserError(f"process {failure['process']} {failure['problem']}")


def _call(
    spec: JobSpec, about: dict[str, object], deadline: float
) -> tuple[Connection, list[dict[str, Any]]]:
    """A connection to process 0, which may start later, and its answer."""
    quiet_until = time.monotonic() + QUIET
    while True:
        introduced = _introduced(_split(spec.coordinator), about)
        if introduced:
            return introduced
        now = time.monotonic()
        if now > deadline:
            raise UserError(
                f"process {spec.process} did not find process 0 at distributed.coordinator="
                f"{spec.coordinator}; start it, or correct the address"
            )
        if now > quiet_until:
            quiet_until = deadline
            say(f"process {spec.process} waits for process 0 to listen at {spec.coordinator}")
        time.sleep(0.2)


def _introduced(
    address: tuple[str, int], about: dict[str, object]
) -> tuple[Connection, list[dict[str, Any]]] | None:
    """A connection to the hub at an address, and its answer; None if there is no hub."""
    try:
        connected = socket.create_connection(address, timeout=5)
    except OSError:
        return None
    connection = Connection(connected)
    # While a socket looks for a free local port it may connect to itself.
    if connected.getsockname() != connected.getpeername():
        connection.send(**about)
        try:
            answer = connection.receive()
        except TimeoutError:
            answer = None
        if answer and "welcome" in answer[0]:
            return connection, answer[1:]
    connection.close()
    return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
