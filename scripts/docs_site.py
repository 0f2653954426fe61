"""Hooks of `make docs`: the site is made of the files that GitHub shows, without copies of them.

* A link that leaves `docs/` works on GitHub as it stands. For the site, the file it names becomes a
  page: the README of an experiment as text, a source file as code.
* A line `[modules: moejax.gating]` in `docs/api` becomes the reference of that module, or of every
  module of that package, so that a new file needs no new line.
* Equations in docstrings (`.. math::`) become text, as `moejax gates NAME` shows them.

A link to a file that does not exist fails the build, which is strict.
"""

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File
from mkdocs.structure.files import Files as SiteFiles

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")
MODULES = re.compile(r"^\[modules: ([\w.]+)\]$", re.MULTILINE)
README = "overview.md"  # MkDocs would take the site's README.md for its index
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}


def _load_readable() -> Any:
    """The function that turns LaTeX into text, without importing moejax and with it JAX."""
    file = ROOT / "moejax" / "cli" / "equations.py"
    spec = importlib.util.spec_from_file_location("equations", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.readable


class Equations(griffe.Extension):
    """Docstrings with their equations as text."""

    def __init__(self) -> None:
        super().__init__()
        self._readable = _load_readable()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        docstring = obj.docstring
        if docstring and "math:" in docstring.value:
            docstring.value = self._readable(docstring.value)


def site_path(path: str) -> str:
    """The path on the site of a file of the repository."""
    if path == "README.md":
        return README
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("experiments/") and path.endswith("/README.md"):
        return path.removesuffix("/README.md") + ".md"
    return path if path.endswith(".md") else f"source/{path}.md"


def repository_path(page: str) -> str:
    """The inverse of ``site_path`` for pages of text."""
    if page == README:
        return "README.md"
    if (ROOT / "docs" / page).is_file():
        return f"docs/{page}"
    readme = f"{page.removesuffix('.md')}/README.md"
    return readme if (ROOT / readme).is_file() else page


def linked_files(text: str, path: str) -> set[str]:
    """Files of the repository, other than pages of `docs/`, that the text of ``path`` links to."""
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
             for link in LINK.finditer(text)}  # fmt: skip
    return {file for file in found if not file.startswith("docs/") and (ROOT / file).is_file()}


def page_text(path: str) -> str:
    """A file of the repository as a page."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# `{path}`\n\n````{language}\n{text}````\n"


def on_files(files: SiteFiles, config: Any) -> SiteFiles:
    """Adds a page for every file outside `docs/` that a page links to, and for experiments."""
    wanted = {f"experiments/{file.parent.name}/README.md"
              for file in (ROOT / "experiments").glob("*/README.md")}  # fmt: skip
    for page in files.documentation_pages():
        wanted |= linked_files(page.content_string, f"docs/{page.src_uri}")
    done: set[str] = set()
    while wanted - done:
        path = min(wanted - done)
        text = page_text(path)
        files.append(File.generated(config, site_path(path), content=text))
        done.add(path)
        if path.endswith(".md"):
            wanted |= linked_files(text, path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: SiteFiles) -> str:
    """Rewrites links between files of the repository, and expands the lists of modules."""
    site = page.file.src_uri
    if site.startswith("source/"):
        return markdown
    path, folder = repository_path(site), posixpath.dirname(site) or "."

    def on_site(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if not (ROOT / file).is_file():
            return link[0]  # unknown to MkDocs too, which fails
        return f"]({posixpath.relpath(site_path(file), folder)}{link[2] or ''})"

    markdown = LINK.sub(on_site, markdown)
    if site.startswith("api/"):
        return MODULES.sub(lambda line: modules(line[1]), markdown)
    return without_references(markdown)


def without_references(markdown: str) -> str:
    """The text with axes such as [M][E] kept from being read as links to the reference."""
    lines, in_code = [], False
    for line in markdown.split("\n"):
        in_code ^= line.startswith("```")
        lines.append(line if in_code else line.replace("][", "]\\["))
    return "\n".join(lines)


def modules(name: str) -> str:
    """The directives for a module, or for all modules of a package that are not empty."""
    path = ROOT / Path(*name.split("."))
    if path.with_suffix(".py").is_file():
        return f"::: {name}\n"
    files = sorted(path.rglob("*.py"), key=lambda file: (file.name != "__init__.py", str(file)))
    if not files:
        raise ValueError(f"docs/api: there is no module {name}")
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
        if len(file.read_text(encoding="utf-8").splitlines()) > 5 and file.name != "__main__.py"
    ]
    return "\n".join(f"::: {name}\n" for name in names)
