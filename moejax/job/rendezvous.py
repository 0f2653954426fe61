"""How the processes of a job meet, at the coordinator's address."""

import errno
import os
import socket
import time
from typing import Any

from moejax.errors import UserError
from moejax.job.client import Job, Place, say
from moejax.job.coordinator import Hub
from moejax.job.messages import Wire

START = 300.0
"""Seconds that processes wait for each other."""
QUIET = 2.0
"""Seconds after which one that waits says so."""
TAKEN = 10.0
"""Seconds that process 0 waits for the port: a job that is just ending may still have it."""


def resolved(address: str) -> str:
    """host:port with the host as a number.

    Raises:
      UserError: no such host.
    """
    host, port = _split(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"distributed.coordinator={address!r}: {error.strerror}; name a host that this machine "
            "knows, or its number"
        ) from error
    number = min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0]
    return f"[{number}]:{port}" if ":" in str(number) else f"{number}:{port}"


def connect(place: Place, problem: str = "", status: int = 0, patience: float | None = None) -> Job:
    """This process's end of the job, before the other processes are there (see `await_all`).

    With a `problem` it has come to say that it fails, and the others end.

    Raises:
      UserError: nobody is there, or process 0 cannot listen.
    """
    about = {
        "hello": place.process,
        "processes": place.processes,
        "who": f"pid {os.getpid()} on {socket.gethostname()}",
        "problem": problem,
        "status": status,
    }
    if place.process == 0:
        wire, hub = _listen(place, about)
        return Job(place, wire, _split(place.bind)[0], hub=hub)
    wire, answer = _call(place, about, time.monotonic() + (START if patience is None else patience))
    return Job(place, wire, wire.connection.getsockname()[0], answer=answer)


def await_all(job: Job) -> None:
    """Blocks until all processes are there.

    Raises:
      UserError: in process 0, if they do not come.
    """
    place, hub, began = job.place, job.hub, time.monotonic()
    said = False
    while not job.begun.wait(0.5):
        waited = time.monotonic() - began
        if hub is None:
            continue
        late = f"process {', '.join(map(str, hub.missing()))}"
        if waited > START:
            raise UserError(
                f"{late} of {place.processes} did not come to distributed.coordinator="
                f"{place.coordinator} within {START:.0f} s; start it, or correct "
                "distributed.num_processes"
            )
        if waited > QUIET and not said:
            said = True
            say(f"process 0 waits for {late} at {place.coordinator}")


def _listen(place: Place, about: dict[str, object]) -> tuple[Wire, Hub]:
    host, port = _split(place.bind)
    until = time.monotonic() + TAKEN
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(place.processes + 16)
            break
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"process 0 cannot listen at distributed.coordinator={place.coordinator} "
                    f"({error.strerror}); name an address and a free port of the machine that "
                    "process 0 is on"
                ) from error
            _ask_who_is_there(place, about)
            if time.monotonic() > until:
                raise UserError(
                    f"distributed.coordinator={place.coordinator}: the port is in use by another "
                    "program; choose a free one, or end that program"
                ) from error
            time.sleep(0.3)
    own, other = socket.socketpair()
    hub = Hub(listener, place.processes, other)
    hub.start()
    wire = Wire(own)
    wire.send(**about)
    return wire, hub


def _ask_who_is_there(place: Place, about: dict[str, object]) -> None:
    """Lets a hub at the port that this process wants find out that there are two processes 0.

    Raises:
      UserError: there are.
    """
    found = _introduced(_split(place.bind), about)
    if found is None:
        return
    wire, answer = found
    wire.close()
    for message in answer:
        if "failed" in message:
            failure = message["failed"]
            raise UserError(f"process {failure['process']} {failure['problem']}")


def _call(
    place: Place, about: dict[str, object], deadline: float
) -> tuple[Wire, list[dict[str, Any]]]:
    """A connection to process 0, which may start later, and its answer."""
    quiet_until = time.monotonic() + QUIET
    while True:
        found = _introduced(_split(place.coordinator), about)
        if found:
            return found
        now = time.monotonic()
        if now > deadline:
            raise UserError(
                f"process {place.process} did not find process 0 at distributed.coordinator="
                f"{place.coordinator}; start it, or correct the address"
            )
        if now > quiet_until:
            quiet_until = deadline
            say(f"process {place.process} waits for process 0 to listen at {place.coordinator}")
        time.sleep(0.2)


def _introduced(
    address: tuple[str, int], about: dict[str, object]
) -> tuple[Wire, list[dict[str, Any]]] | None:
    """A connection to the hub at an address, and its answer; None if there is no hub."""
    try:
        connection = socket.create_connection(address, timeout=5)
    except OSError:
        return None
    wire = Wire(connection)
    # A socket that looks for a free port among those of its own kind may find itself.
    if connection.getsockname() != connection.getpeername():
        wire.send(**about)
        try:
            answer = wire.receive()
        except TimeoutError:
            answer = None
        if answer and "welcome" in answer[0]:
            return wire, answer[1:]
    wire.close()
    return None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
