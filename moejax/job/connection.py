"""A connection that carries JSON objects, one per line."""

import json
import socket
import threading
from typing import Any

MAX_BYTES = 2**24
"""The largest message; a peer that sends more is not one of ours."""


class Connection:
    """Any thread may send; one thread receives."""

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends one message. If the peer has gone nothing happens; `receive` will report it."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            try:
                self.socket.sendall(line)
            except OSError:
                self.hang_up()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, perhaps none yet; None once the peer has gone.

        Blocks until something arrives or the socket's timeout is over.

        Raises:
          TimeoutError: nothing has arrived in time.
        """
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            raise
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > MAX_BYTES:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # not one of ours
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def hang_up(self) -> None:
        """Ends the connection; a thread that waits in `receive` returns and closes it."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer was faster
            pass

    def close(self) -> None:
        """Ends the connection and frees the socket."""
        self.hang_up()
        self.socket.close()
