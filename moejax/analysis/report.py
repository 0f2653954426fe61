"""The pages of a report, in order, and the file made of them."""

from collections.abc import Callable

from moejax import __version__
from moejax.analysis.html import render
from moejax.analysis.page import Page
from moejax.analysis.pages import cost, curves, drops, load, overview
from moejax.analysis.run import RunData

PAGES: tuple[Callable[[RunData], Page], ...] = (
    overview.page,
    curves.page,
    load.page,
    drops.page,
    cost.page,
)


def of_run(run: RunData) -> str:
    """The report of one run, as HTML."""
    about = (
        f"step {run.last_step} of {run.field('train.steps', '?')}, report of moejax {__version__}"
    )
    return render(run.name, about, [page(run) for page in PAGES])
