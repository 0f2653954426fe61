"""The recorded routing of the same held-out sequences at each evaluation: WORKDIR/probe/*.npz.

    probe = Probe.read("runs/mixtral")
    probe.steps                       [0, 100, 200, 300]: completed updates
    probe.at(300)["expert"]           int16[M, N, L, K]: which experts each token visited
    probe.tokens["token"]             int32[N, L]: the tokens that were routed

`docs/recorded.md` explains each array. Axes: M MoE layers, N sequences of the probe, L
positions, K columns of a routing, E experts, V tokens of the vocabulary, C labels.
"""

import contextlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.errors import UserError
from moejax.record.files import read_valid_rows, write_whole
from moejax.record.routing import Routed

FORMAT = 1
"""Stored in every file as ``format``; a file with another number is not read."""


class ArrayFormat(NamedTuple):
    """Element type and axes of an array. An ``optional`` one may be absent from a file."""

    dtype: str
    axes: str
    optional: bool = False


TOKENS: dict[str, ArrayFormat] = {
    "token": ArrayFormat("int32", "NL"),
    "target": ArrayFormat("int32", "NL"),
    "valid": ArrayFormat("bool", "NL"),
    "row": ArrayFormat("int32", "N"),
    "token_text": ArrayFormat("str", "V"),
    "label": ArrayFormat("uint8", "NL", optional=True),
    "label_names": ArrayFormat("str", "C", optional=True),
}
"""The arrays of ``tokens.npz``. Only a corpus with labels has the optional ones."""

_STEP_FILE = re.compile(r"step-(\d{8,})\.npz")
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of one file; each is read at its first use and kept.

    Raises:
      UserError: at a read, if the file is damaged or has another format.
    """

    def __init__(self, path: Path):
        self._path, self._read = path, dict[str, np.ndarray]()
        with self._open() as file:
            self._names = [name for name in file.files if name != "format"]
            stored = int(file["format"]) if "format" in file.files else 0
        if stored != FORMAT:
            raise UserError(
                f"{path} has format {stored}, but this version reads {FORMAT}; read it with the "
                "version of moejax that wrote it"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            with self._open() as file:
                self._read[name] = file[name]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with open(self._path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                yield arrays
        except FileNotFoundError as error:
            raise UserError(f"{self._path} does not exist") from error
        except _DAMAGED as error:
            raise UserError(f"{self._path} cannot be read: it is torn or damaged") from error


class Probe:
    """The recordings of a run.

    Attributes:
      tokens: the arrays of ``tokens.npz``.
      steps: the readable steps, in order.
      problems: one line for each missing or damaged file.
    """

    def __init__(self, tokens: Arrays, steps: Mapping[int, Arrays], problems: list[str]):
        self.tokens, self.steps, self.problems = tokens, sorted(steps), problems
        self._steps = steps

    @classmethod
    def read(cls, workdir: str | Path) -> "Probe | None":
        """The probe of a run, which may still be running or have been killed; None without one.

        Raises:
          UserError: ``tokens.npz`` is missing, damaged or of another version.
        """
        at = folder(workdir)
        files = step_files(workdir)
        if not files and not (at / "tokens.npz").exists():
            return None
        tokens = Arrays(at / "tokens.npz")
        steps, problems = {}, []
        for step, path in files.items():
            try:
                steps[step] = Arrays(path)
            except UserError as error:
                problems.append(str(error))
        for step in sorted({0, *_evaluated(Path(workdir))} - files.keys()):
            problems.append(f"{step_path(workdir, step)} is missing")
        return cls(tokens, steps, problems)

    def at(self, step: int) -> Arrays:
        """The arrays recorded after ``step`` completed updates.

        Raises:
          KeyError: nothing was recorded then (see ``steps``).
        """
        return self._steps[step]

    def routed(self, step: int) -> Routed:
        """The routing recorded after ``step`` completed updates; see `at`."""
        arrays = self.at(step)
        return Routed(
            expert_MNLK=arrays["expert"],
            weight_MNLK=arrays["weight"],
            kept_MNLK=arrays["kept"],
            token_NL=self.tokens["token"],
            valid_NL=self.tokens["valid"],
            num_experts=int(arrays["num_experts"]),
            step=step,
        )


def folder(workdir: str | Path) -> Path:
    """The folder of a run's probe."""
    return Path(workdir) / "probe"


def step_path(workdir: str | Path, step: int) -> Path:
    return folder(workdir) / f"step-{step:08d}.npz"


def step_files(workdir: str | Path) -> dict[int, Path]:
    """The files of recorded steps, in order of the steps."""
    at = folder(workdir)
    if not at.is_dir():
        return {}
    matches = ((_STEP_FILE.fullmatch(path.name), path) for path in at.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def save_tokens(workdir: str | Path, arrays: Mapping[str, Any]) -> None:
    """Writes ``tokens.npz`` with the arrays of `TOKENS`, in one rename."""
    _save(folder(workdir) / "tokens.npz", arrays, TOKENS)


def save_step(
    workdir: str | Path, step: int, arrays: Mapping[str, Any], formats: Mapping[str, ArrayFormat]
) -> None:
    """Writes one step's file, in one rename; equal arrays give equal bytes.

    ``formats``: of all arrays, in the order of the file (``train.probe.arrays.formats()``).
    """
    _save(step_path(workdir, step), arrays, formats)


def _save(path: Path, arrays: Mapping[str, Any], formats: Mapping[str, ArrayFormat]) -> None:
    """Checks the arrays against their formats and writes them.

    Raises:
      ValueError: an array is missing, has no format, or has other axes.
      UserError: the disk is full.
    """
    needed = {name for name, known in formats.items() if not known.optional}
    if not needed <= arrays.keys() <= formats.keys():
        raise ValueError(f"{path.name} holds {sorted(formats)}, but {sorted(arrays)} were given")
    sizes: dict[str, int] = {}
    content: dict[str, Any] = {"format": np.int32(FORMAT)}
    for name, (dtype, axes, _) in formats.items():
        if name not in arrays:
            continue
        array = np.asarray(arrays[name]).astype(dtype)
        shape = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=False)
        )
        if array.ndim != len(axes) or array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but its axes {axes} are {sizes}")
        content[name] = array
    whole = io.BytesIO()
    np.savez_compressed(whole, **content)
    write_whole(path, whole.getvalue())


def _evaluated(workdir: Path) -> list[int]:
    """The steps after which the run was evaluated, from the readable rows of its metrics."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return []
    rows, _ = read_valid_rows(path)
    return [row["step"] for row in rows if row.get("split") == "eval"]
