"""What runs and sweeps say about their gates: statistics, the report, scaling-law fits.

    run.py, sweep.py   what a run and a sweep have written, also half of it
    statistics/        numbers about routing, of arrays
    probed.py          the probe as the statistics take it: valid tokens in a row
    health.py          what to warn of
    page.py, html.py   what a page of the report is made of, and the file made of pages
    pages/             one page a file: a function of what was recorded
    report.py          the list of pages
    command.py         the ``moejax report`` command
    scaling/           the routed scaling law, and the ``moejax scaling`` command

Everything here reads files that runs wrote; training imports none of it.
"""
