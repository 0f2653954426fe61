"""The experts that generated tokens visited: ``generated.json`` in a run's workdir."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.record import files

FILE = "generated.json"


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """A prompt, its continuation as tokens' texts, and their experts by token and layer."""

    prompt: str
    tokens: list[str]
    experts: list[list[list[int]]]
    """The heaviest first."""


@dataclasses.dataclass(frozen=True)
class GeneratedTexts:
    """The texts of one call of ``moejax generate --record-routing``, from checkpoint ``step``."""

    step: int
    num_experts: int
    num_layers: int
    texts: Sequence[GeneratedText]

    def write(self, workdir: Path) -> Path:
        """Writes them in the place of those of an earlier call; the file's path.

        Raises:
          UserError: it cannot be written.
        """
        path = workdir / FILE
        files.write_json(path, files.sealed(dataclasses.asdict(self)))
        return path

    @classmethod
    def read(cls, workdir: Path) -> "GeneratedTexts | None":
        """The texts in a workdir; None without any.

        Raises:
          ValueError: the file is damaged.
        """
        path = workdir / FILE
        if not path.is_file():
            return None
        body: Any = files.unsealed(files.parsed(path.read_bytes()))
        if body is None:
            raise ValueError(f"{path} is damaged: it does not match its digest")
        texts = [GeneratedText(**text) for text in body.pop("texts")]
        return cls(texts=texts, **body)
