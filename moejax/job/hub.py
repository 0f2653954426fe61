"""The thread in process 0 that all processes of a job are connected to."""

import selectors
import socket
import threading
from typing import Any

from moejax.job.connection import Connection


class Hub(threading.Thread):
    """Relays messages, collects values from all processes, and notices the death of one.

    However this thread ends, it closes the connections, which every process notices.
    """

    def __init__(self, listener: socket.socket, processes: int, own: socket.socket):
        super().__init__(name="moejax hub", daemon=True)
        self.deserted = threading.Event()
        """Set once all other processes have joined and left."""
        self._listener: socket.socket | None = listener
        self._processes = processes
        self._members: dict[int, Connection] = {}
        self._described: dict[int, str] = {}
        self._values: dict[str, dict[int, Any]] = {}
        self._counts: dict[int, int] = {}
        self._stopping = ""
        self._failure: dict[str, Any] | None = None
        self._leaving, self._ready, self._gone = set[int](), set[int](), set[int]()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._register(own)

    def missing(self) -> list[int]:
        """Numbers of the processes that have not joined yet."""
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
            accepted, _ = self._listener.accept()
        except OSError:  # the caller has gone
            return
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._register(accepted)

    def _register(self, accepted: socket.socket) -> None:
        accepted.settimeout(10)
        self._selector.register(accepted, selectors.EVENT_READ, Connection(accepted))

    def _read(self, connection: Connection) -> None:
        process = next((r for r, member in self._members.items() if member is connection), None)
        messages = connection.receive()
        for message in messages or []:
            if process is None:
                process = self._hello(connection, message)
            else:
                self._handle(process, message)
        if messages is None or (messages and process is None):
            self._selector.unregister(connection.socket)
            connection.close()
            if process is not None:
                self._lost(process)

    def _hello(self, connection: Connection, message: dict[str, Any]) -> int | None:
        """The number of a process that introduces itself; None if it is not of this job."""
        try:
            process, processes = int(message["hello"]), int(message["processes"])
            who = str(message["who"])
        except (KeyError, TypeError, ValueError):
            return None
        if not 0 <= process < processes:
            return None
        connection.send(welcome=True)
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
            self._members[process] = connection
        if message.get("problem") and self._failure is None:
            self._fail(process, message["problem"], message["status"])
        if self._failure:
            connection.send(failed=self._failure)
        elif self._stopping:
            connection.send(freeze=self._stopping)
        if self._failure is None and len(self._members) == self._processes:
            self._stop_listening()
            self._broadcast(begin=True)
        return process if self._members.get(process) is connection else None

    def _stop_listening(self) -> None:
        """Frees the port, where JAX's own coordinator will listen."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        if "submit" in message:
            values = self._values.setdefault(message["submit"], {})
            values[process] = message["value"]
            if len(values) == self._processes:
                ordered = [values[r] for r in range(self._processes)]
                self._members[0].send(collected=message["submit"], values=ordered)
                del self._values[message["submit"]]
        elif "outcome" in message:  # from process 0
            if message["problem"]:  # every process now ends by itself
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
        elif "leaving" in message:
            self._leaving.add(process)
        elif "ready" in message:
            self._ready.add(process)
            self._release()

    def _fail(self, process: int, problem: str, status: int) -> None:
        self._failure = {"process": process, "problem": problem, "status": status}
        self._broadcast(failed=self._failure)

    def _lost(self, process: int) -> None:
        """Handles the end of a connection, in an orderly way or with the process."""
        del self._members[process]
        self._gone.add(process)
        if process not in self._leaving and self._failure is None:
            who = self._described[process]
            self._fail(process, f"({who}) has died, or can no longer be reached", status=1)
        self._release()
        if self._gone >= set(range(1, self._processes)):
            self.deserted.set()

    def _release(self) -> None:
        """Lets all processes end together: gloo may abort one that waits for one that has gone."""
        if self._ready >= self._members.keys():
            self._broadcast(go=True)

    def _broadcast(self, **message: Any) -> None:
        for member in list(self._members.values()):
            member.send(**message)
