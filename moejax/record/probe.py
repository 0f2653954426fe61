"""How a run routed the same held-out sequences at each of its evaluations: WORKDIR/probe/*.npz.

    probe = Probe.read("runs/mixtral")
    probe.steps                       [0, 100, 200, 300]: completed updates
    probe.at(300)["expert"]           int16[M, N, L, K]: which experts each token visited
    probe.tokens["token"]             int32[N, L]: the tokens that were routed

`docs/recorded.md` says what each array means. Axes: M MoE layers, N sequences of the probe, L
positions, K columns of a routing, E experts, V tokens of the vocabulary, C labels.
"""

import contextlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.record.files import read_what_can_be, replaced

FORMAT = 1
"""Kept in every file as ``format``; a file with another number is not read."""

OF_TOKENS: dict[str, tuple[str, str]] = {
    "token": ("int32", "NL"),
    "target": ("int32", "NL"),
    "valid": ("bool", "NL"),
    "row": ("int32", "N"),
    "token_text": ("str", "V"),
}
"""Element type and axes of each array of ``tokens.npz``."""

OF_LABELS: dict[str, tuple[str, str]] = {"label": ("uint8", "NL"), "label_names": ("str", "C")}
"""Arrays of ``tokens.npz`` that only a corpus with labels has."""

OF_STEP: dict[str, tuple[str, str]] = {
    "expert": ("int16", "MNLK"),
    "weight": ("float32", "MNLK"),
    "kept": ("bool", "MNLK"),
    "entropy": ("float32", "MNL"),
    "margin": ("float32", "MNL"),
    "log_z": ("float32", "MNL"),
    "max_logit": ("float32", "MNL"),
    "nats": ("float32", "NL"),
    "expert_similarity": ("float32", "MEE"),
    "collapse": ("float32", "M"),
    "participation": ("float32", "M"),
    "num_experts": ("int32", ""),
}
"""Element type and axes of each array of ``step-*.npz``."""

OF_ROUTER: dict[str, tuple[str, str]] = {"router_similarity": ("float32", "MEE")}
"""Arrays of ``step-*.npz`` that only a gate with one vector per expert has."""

_STEP_FILE = re.compile(r"step-(\d{8,})\.npz")
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class Arrays(Mapping[str, np.ndarray]):
    """The arrays of one file, each read when it is first asked for and kept.

    Raises:
      UserError: when read: it is damaged, or of another version.
    """

    def __init__(self, path: Path):
        self._path, self._read = path, dict[str, np.ndarray]()
        with self._open() as file:
            self._names = [name for name in file.files if name != "format"]
            found = int(file["format"]) if "format" in file.files else 0
        if found != FORMAT:
            raise UserError(
                f"{path} has format {found}, but this version reads {FORMAT}; read it with the "
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
    """What a run's probe recorded.

    Attributes:
      tokens: the arrays of ``tokens.npz``.
      steps: the steps that can be read, in order.
      problems: what is missing or damaged, a line each.
    """

    def __init__(self, tokens: Arrays, steps: Mapping[int, Arrays], problems: list[str]):
        self.tokens, self.steps, self.problems = tokens, sorted(steps), problems
        self._steps = steps

    @classmethod
    def read(cls, workdir: str | Path) -> "Probe | None":
        """The probe of a run, also of one that still goes on or was killed; None without one.

        Raises:
          UserError: ``tokens.npz`` is missing, damaged or of another version.
        """
        at = folder(workdir)
        found = step_files(workdir)
        if not found and not (at / "tokens.npz").exists():
            return None
        tokens = Arrays(at / "tokens.npz")
        steps, problems = {}, []
        for step, path in found.items():
            try:
                steps[step] = Arrays(path)
            except UserError as error:
                problems.append(str(error))
        for step in sorted({0, *_evaluated(Path(workdir))} - found.keys()):
            problems.append(f"{step_path(workdir, step)} is missing")
        return cls(tokens, steps, problems)

    def at(self, step: int) -> Arrays:
        """The arrays that were recorded after ``step`` completed updates.

        Raises:
          KeyError: none were (see ``steps``).
        """
        return self._steps[step]


def folder(workdir: str | Path) -> Path:
    """Where a run's probe is."""
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
    """Writes ``tokens.npz``, in one rename. ``arrays``: those of `OF_TOKENS`, with `OF_LABELS`."""
    labels = OF_LABELS if "label" in arrays else {}
    _save(folder(workdir) / "tokens.npz", arrays, OF_TOKENS | labels)


def save_step(workdir: str | Path, step: int, arrays: Mapping[str, Any]) -> None:
    """Writes one step's file, in one rename; equal arrays give equal bytes.

    ``arrays``: those of `OF_STEP`, with `OF_ROUTER`.
    """
    router = OF_ROUTER if "router_similarity" in arrays else {}
    _save(step_path(workdir, step), arrays, OF_STEP | router)


def _save(path: Path, arrays: Mapping[str, Any], table: dict[str, tuple[str, str]]) -> None:
    """Checks the arrays against a table and writes them.

    Raises:
      ValueError: an array is missing, is not in the table, or has other axes.
      UserError: the disk takes no more.
    """
    if arrays.keys() != table.keys():
        raise ValueError(f"{path.name} holds {sorted(table)}, but {sorted(arrays)} were given")
    sizes: dict[str, int] = {}
    content: dict[str, Any] = {"format": np.int32(FORMAT)}
    for name, (dtype, axes) in table.items():
        array = np.asarray(arrays[name]).astype(dtype)
        shape = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=False)
        )
        if array.ndim != len(axes) or array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but its axes {axes} are {sizes}")
        content[name] = array
    whole = io.BytesIO()
    np.savez_compressed(whole, **content)
    with replaced(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def _evaluated(workdir: Path) -> list[int]:
    """The steps after which the run was evaluated, as far as its metrics can be read."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return []
    found, _ = read_what_can_be(path)
    return [row["step"] for row in found if row.get("split") == "eval"]
