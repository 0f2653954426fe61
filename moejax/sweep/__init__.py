"""Sweeps: one experiment file, many runs of ``moejax train``, one table and one picture.

    definition.py  an experiment file to trials, each with its resolved config and id
    folder.py      the sweep's folder: sweep.json, a folder per trial, what is finished
    runner.py      trials as fresh processes, one after the other; signals, failures, resuming
    results.py     the files of finished trials to numbers, and results.csv
    table.py       the numbers as text
    figure.py      the numbers as sweep.png
    command.py     the ``moejax sweep`` command

No JAX device is started here: each trial is a process of its own, and the devices are its.
"""
