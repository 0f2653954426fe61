"""A process as a member of its job: its end of the connection to process 0."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moejax.errors import UserError
from moejax.job.connection import Connection
from moejax.job.hub import Hub

GRACE = 1.0
"""Seconds that a process has to end by its own error after another one has failed."""
END_TOGETHER = 3.0
"""Seconds that a process which is ready to end waits for the others."""
ABORTED = 128
"""Larger exit statuses belong to processes that a signal ended: then nothing is waited for."""
STUCK = 15.0
"""Seconds after which a failed process ends, whatever it is waiting for."""
PATIENCE = 5.0
"""Seconds that process 0 waits for the others to end: JAX aborts them if it ends first."""


class JobSpec(NamedTuple):
    """The address and size of a job, and the number of this process."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    process: int
    bind: str
    """host:port that process 0 binds."""


class Job:
    """The job, as this process sees it.

    Args:
      connection: to process 0, to which this process has introduced itself.
      address: the address of this process on the network to process 0.
      answer: messages that have arrived already.
      hub: in process 0.
      end: ends the process at once.
    """

    def __init__(
        self,
        spec: JobSpec,
        connection: Connection,
        address: str,
        answer: Sequence[dict[str, Any]] = (),
        hub: Hub | None = None,
        end: Callable[[int], Any] = os._exit,
    ):
        self.spec, self.address, self.hub = spec, address, hub
        self.begun = threading.Event()
        """Set once all processes have joined."""
        self._connection, self._end = connection, end
        self._changed = threading.Condition()
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._collected: dict[str, list[Any]] = {}
        self._count, self._frozen, self._stop_at = -1, False, -1
        self._leaving = self._ending = False
        self._released = threading.Event()
        self._end_once = threading.Lock()
        self._failing = threading.Event()
        self._failure: dict[str, Any] = {}
        self.agreed = False
        """True if this process fails with a problem that all share and that names processes."""
        self.other_failed = threading.Event()
        """Set once another process has failed, which ends this one too."""
        connection.socket.settimeout(None)
        for message in answer:
            self._handle(message)
        threading.Thread(target=self._listen, name="moejax job", daemon=True).start()

    # ------------------------------------------------------------ agreeing

    def exchange(self, name: str, value: Any, judge: Callable[[list[Any]], tuple[str, Any]]) -> Any:
        """The result of `judge` on the values of all processes, which all make the same call.

        Args:
          value: anything that JSON can hold.
          judge: called in process 0 with the values by process; returns a problem or "", and a
            result.

        Raises:
          UserError: the problem, on every process.
        """
        self._connection.send(submit=name, value=value)
        if self.hub:
            values = self._wait_for(self._collected, name)
            problem, result = judge(values)
            self._connection.send(outcome=name, problem=problem, result=result)
        outcome = self._wait_for(self._outcomes, name)
        if outcome["problem"]:
            self._failing.set()
            self.agreed = True
            raise UserError(outcome["problem"])
        return outcome["result"]

    def _wait_for(self, messages: dict[str, Any], name: str) -> Any:
        with self._changed:
            while name not in messages:
                self._changed.wait(1)  # wakes regularly, for signals
            return messages.pop(name)

    # ------------------------------------------------------------ stopping

    def ask_to_stop(self, why: str) -> None:
        """Requests that all processes stop at a step that none of them has taken yet."""
        self._connection.send(stop=why)

    def stops_at(self, step: int) -> bool:
        """True if all stop after `step` updates; called after each update, and before the first.

        Blocks while the processes agree on the step; no collective is under way then.
        """
        with self._changed:
            while self._frozen and self._stop_at < 0:
                self._changed.wait(1)
            self._count = step
            return 0 <= self._stop_at <= step

    # ------------------------------------------------------------ ending

    def announce_end(self) -> None:
        """Announces that this process is about to end normally, as all of them are."""
        self._leaving = True
        self._connection.send(leaving=True)

    def fail(self, problem: str, status: int) -> None:
        """Ends the other processes with this exit status; they print the problem.

        This process has to `leave`; if something prevents that, it is ended too.
        """
        if self._failing.is_set():
            return
        self._failing.set()
        self._connection.send(failed=problem, status=status)
        line = f"process {self.spec.process}{_sentence(problem)}"
        timer = threading.Timer(STUCK, self._end_with, (line, status))
        timer.daemon = True
        timer.start()

    def leave(self, status: int, patience: float = PATIENCE) -> None:
        """Ends this process of a failed job, without waiting for computations under way.

        A normal exit would wait for the other processes in JAX's own shutdown.
        """
        self._ending = True
        self._failing.set()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # the terminal has gone, or the stream is closed
                pass
        self._connection.send(ready=True)
        self._released.wait(END_TOGETHER)
        if self.hub:
            self.hub.deserted.wait(patience)
        self._end(status)

    def follow(self) -> None:
        """Ends this process because another one has failed, with that one's problem."""
        failed = self._failure
        self._end_with(
            f"process {failed['process']}{_sentence(failed['problem'])}", failed["status"]
        )

    def _end_with(self, line: str, status: int) -> None:
        """Prints a line and ends the process; a second caller waits for the first to do so."""
        with self._end_once:
            if not self._ending:
                say_error(line)
                self.leave(status)

    # ------------------------------------------------------------ listening

    def _listen(self) -> None:
        while True:
            messages = self._connection.receive()
            if messages is None:
                break
            for message in messages:
                self._handle(message)
        self._connection.close()
        self._released.set()
        if not (self._leaving or self._ending or self._failing.is_set()):
            # At once: JAX aborts this process as soon as it notices the same.
            problem = "has died, or can no longer be reached"
            self._failure = {"process": 0, "problem": problem, "status": 1}
            self.other_failed.set()
            self.follow()

    def _handle(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            # In another thread, since it waits and the connection must be read meanwhile.
            threading.Thread(
                target=self._others_failed, args=(message["failed"],), daemon=True
            ).start()
            return
        with self._changed:
            if "begin" in message:
                self.begun.set()
            elif "outcome" in message:
                self._outcomes[message["outcome"]] = message
            elif "collected" in message:
                self._collected[message["collected"]] = message["values"]
            elif "freeze" in message:
                self._frozen = True
                self._connection.send(count=self._count)
                if not message["freeze"].startswith(f"process {self.spec.process} "):
                    say(f"{message['freeze']}: stopping after this step and saving")
            elif "go" in message:
                self._released.set()
            elif "stop_at" in message:
                self._stop_at = message["stop_at"]
            self._changed.notify_all()

    def _others_failed(self, failure: dict[str, Any]) -> None:
        if self._failing.is_set():
            return
        self._failure = failure
        self.other_failed.set()
        # The same problem may exist here, and this process may be about to report it.
        aborted = failure["status"] > ABORTED
        if aborted or not self._failing.wait(GRACE):
            self.follow()


def _sentence(problem: str) -> str:
    """The rest of a line that begins with a process: a predicate, or ": " and a message."""
    words = ("has ", "is ", "was ", "(")
    return f" {problem}" if problem.startswith(words) else f": {problem}"


def say(line: str) -> None:
    """Writes a line to stderr in one piece, from any thread and in the middle of any print."""
    try:
        os.write(2, f"moejax: {line}\n".encode())
    except OSError:  # the terminal has gone
        pass


def say_error(line: str) -> None:
    say(f"error: {line}")
