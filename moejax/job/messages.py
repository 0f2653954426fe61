"""A connection that carries JSON objects, one a line."""

import json
import socket
import threading
from typing import Any

LONGEST = 2**24
"""Bytes of a message; who sends more is not one of ours."""


class Wire:
    """Sends from any thread; one thread receives."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends one message; does nothing if the other end has gone, which its reader will see."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            try:
                self.connection.sendall(line)
            except OSError:
                self.hang_up()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, perhaps none yet; None once the other end has gone.

        Blocks for as long as the connection does.

        Raises:
          TimeoutError: nothing has arrived in the connection's time.
        """
        try:
            data = self.connection.recv(2**16)
        except TimeoutError:
            raise
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # not one of ours
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def hang_up(self) -> None:
        """Ends the connection, also for a thread that waits for it and is to close it."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was faster
            pass

    def close(self) -> None:
        """Ends the connection and frees it."""
        self.hang_up()
        self.connection.close()
