"""The files that a path of the config names: a file, a folder, a glob, or several of these."""

import glob
import os

from moejax.data.documents import Document, list_documents
from moejax.errors import UserError


def expand(path: str, field: str = "data.path") -> list[Document]:
    """The non-empty files that ``path`` names, each once, in the order of their names.

    A path that exists is that file or folder (see ``list_documents``). Any other is a list with
    commas between, of such paths and of globs, in which ``**`` stands for any folders; its parts
    keep their order. The names of files are those below a folder, or below the part of a glob
    that has no wildcard.

    Raises:
      UserError: nothing is there, or cannot be read.
    """
    is_one = "," not in path and not glob.has_magic(path)
    if is_one or os.path.lexists(os.path.expanduser(path)):
        return list_documents(path, field=field)
    parts = [part.strip() for part in path.split(",")] if "," in path else [path]
    found: dict[str, Document] = {}
    for part in filter(None, parts):
        for file in _matches(part, path, field):
            found.setdefault(os.path.realpath(file.path), file)
    return _with_own_names(list(found.values()))


def name_of(path: str) -> str:
    """The name of the data at a path: of a file or folder its own, of others what was written."""
    where = os.path.expanduser(path)
    return os.path.basename(os.path.abspath(where)) if os.path.lexists(where) else path


def _matches(part: str, path: str, field: str) -> list[Document]:
    where = os.path.expanduser(part)
    if os.path.lexists(where):
        return list_documents(part, field=field)
    if not glob.has_magic(where):
        of = f" (of {path!r})" if part != path else ""
        raise UserError(f"{field}={part!r}{of} does not exist")
    root = os.path.dirname(where[: min(where.index(c) for c in "*?[" if c in where)])
    files = []
    for match in sorted(glob.glob(where, recursive=True), key=os.fsencode):
        below = os.path.relpath(match, root or ".")
        inside = os.path.isdir(match) and not where.endswith("**")
        if os.path.isfile(match):
            size = os.stat(match).st_size
            files += [Document(below, match, size, field=field)] if size else []
        elif inside:
            own = list_documents(match, field=field)
            files += [Document(f"{below}/{d.name}", d.path, d.size, field=field) for d in own]
    if not files:
        raise UserError(f"{field}={part!r} matches no file with anything in it")
    return files


def _with_own_names(files: list[Document]) -> list[Document]:
    """The files; where two have the same name, all have their paths as names."""
    if len({file.name for file in files}) == len(files):
        return files
    return [Document(f.path.lstrip("/"), f.path, f.size, field=f.field) for f in files]
