"""The routed scaling law of Clark et al. 2022, fitted to published curves or to a sweep.

runs.py      a table of curves or a sweep's folder to runs: router, size, experts, seed, loss
law.py       the law, its fit by least squares, effective parameter count and cutoff
checks.py    bootstrap intervals of the coefficients, errors on runs that were held out
order.py     which router comes out lower in each cell of size and experts, and how surely
study.py     all of it for every router of one source, as values for text and JSON
table.py     a study as text
figure.py    fits and runs as a picture, two sources beside each other
command.py   the ``moejax scaling`` command
"""
