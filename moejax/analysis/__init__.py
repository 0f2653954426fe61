"""The analysis of recorded runs and sweeps: statistics of routing and the report.

    run.py, sweep.py   readers of a run and of a sweep, complete or not
    several.py         several runs, or sweeps, prepared for a comparison
    statistics/        statistics of routing, as functions of arrays
    probed.py          the probe's arrays at its valid tokens
    variants.py        the variants of a sweep in words
    health.py          warnings
    traffic.py         rows computed and bytes sent, derived from counts
    page.py, html.py   the blocks of a page, and the HTML file
    figures.py         plotly figures as plain lists
    pages/             one page a file: a function of the recorded data
    report.py          the list of pages
    plot.py            the report's figures as plotly objects
    tensorboard.py     an export to TensorBoard

Everything here reads files that runs wrote; training does not import it.
"""
