"""The tiny run of ``runs``, once per process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train import sharing
from tests.train.sharing import Shared, Whole


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of the tiny runs."""
    return sharing.the_text(tmp_path_factory)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    """While a module has it, its runs share what they compile."""
    with sharing.sharing() as shared:
        yield shared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared: Shared) -> Whole:
    """A run that was left alone."""
    return sharing.the_whole_run(tmp_path_factory)
