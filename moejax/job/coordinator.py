"""Process 0's thread that all processes of a job are connected to."""

import selectors
import socket
import threading
from typing import Any

from moejax.job.messages import Wire


class Hub(threading.Thread):
    """Passes on what processes say, collects what all of them have to say, and misses the dead.

    Whatever ends this thread closes the connections, by which every process learns of it.
    """

    def __init__(self, listener: socket.socket, processes: int, own: socket.socket):
        super().__init__(name="moejax hub", daemon=True)
        self.deserted = threading.Event()
        """Set once all other processes have come and gone."""
        self._listener: socket.socket | None = listener
        self._processes = processes
        self._members: dict[int, Wire] = {}
        self._described: dict[int, str] = {}
        self._said: dict[str, dict[int, Any]] = {}
        self._counts: dict[int, int] = {}
        self._stopping = ""
        self._failure: dict[str, Any] | None = None
        self._parted, self._ready, self._gone = set[int](), set[int](), set[int]()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._watch(own)

    def missing(self) -> list[int]:
        """Processes that have not come yet."""
        return sorted(set(range(self._processes)) - self._described.keys())

    def run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data is None:
                        self._accept()
                    else:
                        self._read(key.data)
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # pyright: ignore[reportAttributeAccessIssue]
            self._selector.close()
            self.deserted.set()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # who called has gone
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._watch(connection)

    def _watch(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        self._selector.register(connection, selectors.EVENT_READ, Wire(connection))

    def _read(self, wire: Wire) -> None:
        process = next((r for r, member in self._members.items() if member is wire), None)
        messages = wire.receive()
        for message in messages or []:
            if process is None:
                process = self._hello(wire, message)
            else:
                self._hear(process, message)
        if messages is None or (messages and process is None):
            self._selector.unregister(wire.connection)
            wire.close()
            if process is not None:
                self._miss(process)

    def _hello(self, wire: Wire, message: dict[str, Any]) -> int | None:
        """The number of a process that introduces itself; None if it is none or has no place."""
        try:
            process, processes = int(message["hello"]), int(message["processes"])
            who = str(message["who"])
        except (KeyError, TypeError, ValueError):
            return None
        if not 0 <= process < processes:
            return None
        wire.send(welcome=True)
        if processes != self._processes and self._failure is None:
            self._fail(
                process,
                f"has distributed.num_processes={processes} and process 0 has "
                f"{self._processes}; give all the same",
                status=2,
            )
        elif process in self._described and self._failure is None:
            self._fail(
                process,
                f"is there twice, as {self._described[process]} and as {who}; give each process "
                "its own distributed.process_id",
                status=2,
            )
        if process not in self._described:
            self._described[process] = who
            self._members[process] = wire
        if message.get("problem") and self._failure is None:
            self._fail(process, message["problem"], message["status"])
        if self._failure:
            wire.send(failed=self._failure)
        elif self._stopping:
            wire.send(freeze=self._stopping)
        if self._failure is None and len(self._members) == self._processes:
            self._stop_listening()
            self._broadcast(begin=True)
        return process if self._members.get(process) is wire else None

    def _stop_listening(self) -> None:
        """Frees the port, at which JAX's own coordinator is to listen."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _hear(self, process: int, message: dict[str, Any]) -> None:
        if "say" in message:
            said = self._said.setdefault(message["say"], {})
            said[process] = message["value"]
            if len(said) == self._processes:
                values = [said[r] for r in range(self._processes)]
                self._members[0].send(all_said=message["say"], values=values)
                del self._said[message["say"]]
        elif "heard" in message:  # what process 0 makes of it
            if message["problem"]:  # of which every process now ends by itself
                self._failure = {}
            self._broadcast(**message)
        elif "stop" in message and not self._stopping:
            self._stopping = f"process {process} got {message['stop']}"
            self._broadcast(freeze=self._stopping)
        elif "count" in message:
            self._counts[process] = message["count"]
            if len(self._counts) == self._processes:
                self._broadcast(stop_at=max(self._counts.values()) + 1)
        elif "failed" in message and self._failure is None:
            self._fail(process, message["failed"], message["status"])
        elif "part" in message:
            self._parted.add(process)
        elif "ready" in message:
            self._ready.add(process)
            self._let_go()

    def _fail(self, process: int, problem: str, status: int) -> None:
        self._failure = {"process": process, "problem": problem, "status": status}
        self._broadcast(failed=self._failure)

    def _miss(self, process: int) -> None:
        """A connection has ended: as it should, or with the process."""
        del self._members[process]
        self._gone.add(process)
        if process not in self._parted and self._failure is None:
            who = self._described[process]
            self._fail(process, f"({who}) has died, or can no longer be reached", status=1)
        self._let_go()
        if self._gone >= set(range(1, self._processes)):
            self.deserted.set()

    def _let_go(self) -> None:
        """Has all end together: gloo may abort a process that waits for one that has gone."""
        if self._ready >= self._members.keys():
            self._broadcast(go=True)

    def _broadcast(self, **message: Any) -> None:
        for member in list(self._members.values()):
            member.send(**message)
