"""The default corpus: the source of the running Python's standard library, without its tests.

About 11 MB of code, comments, docstrings and English, available wherever Python is, under the PSF
licence. The text differs between Python versions (and distributions that ship only a part of the
library), so a run records the fingerprint of the corpus; compare numbers only where it is equal.
"""

import functools
import os
import platform
import sysconfig

from moejax.data.documents import Document, list_documents
from moejax.data.duplicates import Related, without_copies
from moejax.errors import UserError

TOPICS = "pydoc_data/topics.py"  # the language reference in English, as string literals

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)


def builtin_name() -> str:
    """Name of the built-in corpus, e.g. "python-3.11.7-stdlib"."""
    return f"python-{platform.python_version()}-stdlib"


def builtin_documents(root: str = "") -> list[Document]:
    """The `.py` files of the standard library below `root` (default: the running Python's).

    Without tests, installed packages, and the records of how this Python was built, which differ
    between two builds of one version. Raises UserError if nothing is left.
    """
    root = root or sysconfig.get_path("stdlib")
    files = list_documents(root, skip_folders=_EXCLUDED_FOLDERS) if os.path.isdir(root) else []
    documents = [document for document in files if _is_library_source(document.name)]
    if not documents:
        raise UserError(
            f"data.path: this Python ships no library source in {root!r} to train on; "
            "set data.path to a file or folder of text"
        )
    return documents


@functools.cache
def builtin_text() -> Related:
    """The documents without near copies, most of which are tables of encodings, and their groups:
    the files of a package, and files with much in common, stay on one side of a split."""
    return without_copies(builtin_documents())


def _is_library_source(name: str) -> bool:
    *folders, file = name.split("/")
    return (
        file.endswith(".py")
        and not file.startswith("_sysconfigdata")
        and not any(folder.startswith("config-") for folder in folders)
    )
