"""The config pages that come with moejax, by name: ``lm`` is ``configs/lm.py``.

In a checkout they lie beside the package; a wheel carries them within it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def pages() -> dict[str, Path]:
    """Every existing page by name."""
    folder = next((folder for folder in FOLDERS if (folder / "lm.py").is_file()), None)
    return {} if folder is None else {page.stem: page for page in sorted(folder.glob("[!_]*.py"))}


def path_of(name: str) -> str | None:
    """The file of the page called ``name``; None if there is none."""
    page = pages().get(name)
    return None if page is None else str(page)
