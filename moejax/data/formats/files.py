"""The files of a folder that hold data, without those that describe it."""

import json
import os
from collections.abc import Sequence

from moejax.data.documents import Document
from moejax.data.formats.format import Format
from moejax.data.formats.plain import CompressedText
from moejax.data.formats.table import formats_of

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = (STATE, "dataset_info.json", SPLITS)
"""Files that ``datasets.Dataset.save_to_disk`` writes beside the data."""


def data_files(files: Sequence[Document]) -> Sequence[tuple[Document, Format | None]]:
    """The files that hold data, with their formats; None: plain text.

    Text beside files of records, such as a README, is left out, and so are the descriptions and
    caches of saved datasets.

    Raises:
      UserError: a file that is neither text nor in a format that is read.
    """
    files = without_descriptions(files)
    field = files[0].field if files else "data.path"
    return data_only(
        list(zip(files, formats_of([file.path for file in files], field), strict=True))
    )


def data_only(
    files: Sequence[tuple[Document, Format | None]],
) -> Sequence[tuple[Document, Format | None]]:
    """Without the text that lies beside files of records."""
    return [
        (f, kind) for f, kind in files if kind and not isinstance(kind, CompressedText)
    ] or files


def without_descriptions(files: Sequence[Document]) -> list[Document]:
    """The files without those that describe a saved dataset, and without its caches.

    The file ``state.json`` of such a folder names the files with the data; others that end in
    .arrow hold results of ``datasets.Dataset.map``.
    """
    by_folder: dict[str, list[Document]] = {}
    for file in files:
        by_folder.setdefault(os.path.dirname(file.path), []).append(file)
    dropped: set[str] = set()
    for folder, inside in by_folder.items():
        names = {os.path.basename(file.path) for file in inside}
        data = _data_files(os.path.join(folder, STATE)) if STATE in names else []
        if SPLITS in names and _object(os.path.join(folder, SPLITS)).get("splits") is not None:
            dropped.add(os.path.join(folder, SPLITS))
        if not names & set(data):
            continue
        for name in names:
            if name in DESCRIPTIONS or (name.endswith(".arrow") and name not in data):
                dropped.add(os.path.join(folder, name))
    return [file for file in files if file.path not in dropped]


def _data_files(path: str) -> list[str]:
    listed = _object(path).get("_data_files")
    if not isinstance(listed, list):
        return []
    return [str(item.get("filename")) for item in listed if isinstance(item, dict)]


def _object(path: str) -> dict[str, object]:
    """The JSON object in a small file; empty if there is none: then the file is a document."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
