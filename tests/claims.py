"""Several named claims about one subject in one test: all are checked, failures are named."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest


class Claims:
    """Claims about ``subject``, such as a gate in training.

    A claim is a function that asserts; its name states the claim. One that raises is kept, and the
    ones after it are tried all the same: ``settle`` fails the test with all of them.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.broken: list[str] = []

    def check(self, claim: Callable[..., None], *args: Any, name: str = "") -> None:
        """Try one claim, under its own name if none is given."""
        try:
            claim(*args)
        except Exception as error:
            name = name or claim.__name__.replace("_", " ")
            last = traceback.extract_tb(error.__traceback__)[1:]
            places = "\n".join(f"    {f.filename}:{f.lineno}: {f.line}" for f in last[:4])
            self.broken.append(
                f"{self.subject}: {name}\n  {type(error).__name__}: {error}\n{places}"
            )

    def settle(self) -> None:
        """Fail if a claim did."""
        if self.broken:
            pytest.fail("\n\n".join(self.broken), pytrace=False)
