"""One process's end of its connection to process 0."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moejax.errors import UserError
from moejax.job.coordinator import Hub
from moejax.job.messages import Wire

GRACE = 1.0
"""Seconds that a process has to end by its own message, when another says that it has failed."""
TOGETHER = 3.0
"""Seconds that a process which is ready to end waits until all are."""
ABORTED = 128
"""Beyond it exit statuses are of processes that a signal ended: nobody waits for anything then."""
STUCK = 15.0
"""Seconds after which a process that has failed ends, whatever it still waits for."""
PATIENCE = 5.0
"""Seconds that process 0 waits for the others to end: they are aborted if it ends before them."""


class Place(NamedTuple):
    """A process's place in its job."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    process: int
    bind: str
    """host:port where process 0 listens."""


class Job:
    """This process among the others.

    Args:
      place: among them.
      wire: to process 0, to which this process has introduced itself.
      address: this process's own, by which it reaches process 0.
      answer: what has come on the wire.
      hub: in process 0.
      end: ends the process at once.
    """

    def __init__(
        self,
        place: Place,
        wire: Wire,
        address: str,
        answer: Sequence[dict[str, Any]] = (),
        hub: Hub | None = None,
        end: Callable[[int], Any] = os._exit,
    ):
        self.place, self.address, self.hub = place, address, hub
        self.begun = threading.Event()
        """Set once all processes are there."""
        self._wire, self._end = wire, end
        self._changed = threading.Condition()
        self._heard: dict[str, dict[str, Any]] = {}
        self._all_said: dict[str, list[Any]] = {}
        self._count, self._frozen, self._stop_at = -1, False, -1
        self._parted = self._leaving = False
        self._go = threading.Event()
        self._end_once = threading.Lock()
        self._failing = threading.Event()
        self._failure: dict[str, Any] = {}
        self.agreed = False
        """Whether what this process ends for is the same in all, and names them."""
        self.told = threading.Event()
        """Set once another process has failed, which ends this one too."""
        wire.connection.settimeout(None)
        for message in answer:
            self._take(message)
        threading.Thread(target=self._listen, name="moejax job", daemon=True).start()

    # ------------------------------------------------------------ agreeing

    def exchange(self, name: str, value: Any, judge: Callable[[list[Any]], tuple[str, Any]]) -> Any:
        """What `judge` makes of every process's value; all make the same call.

        Args:
          value: anything that JSON can hold.
          judge: called in process 0, with the values by process; a problem or "", and a result.

        Raises:
          UserError: the problem, on every process.
        """
        self._wire.send(say=name, value=value)
        if self.hub:
            values = self._wait_for(self._all_said, name)
            problem, result = judge(values)
            self._wire.send(heard=name, problem=problem, result=result)
        heard = self._wait_for(self._heard, name)
        if heard["problem"]:
            self._failing.set()
            self.agreed = True
            raise UserError(heard["problem"])
        return heard["result"]

    def _wait_for(self, messages: dict[str, Any], name: str) -> Any:
        with self._changed:
            while name not in messages:
                self._changed.wait(1)  # awake now and then: a signal may have come
            return messages.pop(name)

    # ------------------------------------------------------------ stopping

    def ask_to_stop(self, why: str) -> None:
        """Makes all processes stop at a step that none of them has taken yet."""
        self._wire.send(stop=why)

    def stops_at(self, step: int) -> bool:
        """Whether all stop after `step` updates; called after each of them, and before the first.

        Blocks while the step is being agreed on, which the other end of no computation waits for.
        """
        with self._changed:
            while self._frozen and self._stop_at < 0:
                self._changed.wait(1)
            self._count = step
            return 0 <= self._stop_at <= step

    # ------------------------------------------------------------ ending

    def part(self) -> None:
        """Says that this process is about to end, as all of them are."""
        self._parted = True
        self._wire.send(part=True)

    def fail(self, problem: str, status: int) -> None:
        """Ends the other processes, which say what the problem is, with this exit status.

        This process is to `leave`; if something keeps it from that it is ended too.
        """
        if self._failing.is_set():
            return
        self._failing.set()
        self._wire.send(failed=problem, status=status)
        line = f"process {self.place.process}{_sentence(problem)}"
        timer = threading.Timer(STUCK, self._end_with, (line, status))
        timer.daemon = True
        timer.start()

    def leave(self, status: int, patience: float = PATIENCE) -> None:
        """Ends this process of a job that has failed, without waiting for anything it has begun.

        The ordinary way would wait for the other processes in JAX's own shutdown.
        """
        self._leaving = True
        self._failing.set()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # the terminal has gone, or the stream is closed
                pass
        self._wire.send(ready=True)
        self._go.wait(TOGETHER)
        if self.hub:
            self.hub.deserted.wait(patience)
        self._end(status)

    def follow(self) -> None:
        """Ends this process for what another one has failed for."""
        failed = self._failure
        self._end_with(
            f"process {failed['process']}{_sentence(failed['problem'])}", failed["status"]
        )

    def _end_with(self, line: str, status: int) -> None:
        """Says why and ends the process; whoever comes second waits for the first to do so."""
        with self._end_once:
            if not self._leaving:
                say_error(line)
                self.leave(status)

    # ------------------------------------------------------------ listening

    def _listen(self) -> None:
        while True:
            messages = self._wire.receive()
            if messages is None:
                break
            for message in messages:
                self._take(message)
        self._wire.close()
        self._go.set()
        if not (self._parted or self._leaving or self._failing.is_set()):
            # At once: JAX aborts this process as soon as it sees the same.
            problem = "has died, or can no longer be reached"
            self._failure = {"process": 0, "problem": problem, "status": 1}
            self.told.set()
            self.follow()

    def _take(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            # Elsewhere, since it waits and the connection is to be read meanwhile.
            threading.Thread(
                target=self._others_failed, args=(message["failed"],), daemon=True
            ).start()
            return
        with self._changed:
            if "begin" in message:
                self.begun.set()
            elif "heard" in message:
                self._heard[message["heard"]] = message
            elif "all_said" in message:
                self._all_said[message["all_said"]] = message["values"]
            elif "freeze" in message:
                self._frozen = True
                self._wire.send(count=self._count)
                if not message["freeze"].startswith(f"process {self.place.process} "):
                    say(f"{message['freeze']}: stopping after this step and saving")
            elif "go" in message:
                self._go.set()
            elif "stop_at" in message:
                self._stop_at = message["stop_at"]
            self._changed.notify_all()

    def _others_failed(self, failure: dict[str, Any]) -> None:
        if self._failing.is_set():
            return
        self._failure = failure
        self.told.set()
        # What is wrong may be wrong here too, and this process about to say so.
        aborted = failure["status"] > ABORTED
        if aborted or not self._failing.wait(GRACE):
            self.follow()


def _sentence(problem: str) -> str:
    """The end of a line that begins with a process: a predicate, or what it would print alone."""
    words = ("has ", "is ", "was ", "(")
    return f" {problem}" if problem.startswith(words) else f": {problem}"


def say(line: str) -> None:
    """A line on stderr, in one piece, from any thread and in the middle of any print."""
    try:
        os.write(2, f"moejax: {line}\n".encode())
    except OSError:  # the terminal has gone
        pass


def say_error(line: str) -> None:
    say(f"error: {line}")
