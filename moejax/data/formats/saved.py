"""Folders that Hugging Face ``datasets`` saves with ``save_to_disk``."""

import json
import os
from collections.abc import Sequence

from moejax.data.documents import Document

STATE, SPLITS = "state.json", "dataset_dict.json"
DESCRIPTIONS = (STATE, "dataset_info.json", SPLITS)


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
