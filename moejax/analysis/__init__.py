"""What runs and sweeps say about their gates: statistics, the report, scaling-law fits.

    page.py      what a page of the report is made of
    pages/       one page a file: a function of what was recorded
    command.py   the ``moejax report`` command
    scaling/     the routed scaling law, and the ``moejax scaling`` command

Everything here reads files that runs wrote; training imports none of it.
"""
