"""Sweeps: one experiment file, many runs of ``moejax train``, one table and one picture.

    definition.py  an experiment file to trials, each with its resolved config and id
    match.py       what it claims about costs; widths that make them equal
    count.py       parameters and FLOPs of configs, counted in a process of its own
    budget.py      what the trials will cost and what their seeds can find, said before they run
    folder.py      the sweep's folder: sweep.json, a folder per trial, what is finished
    runner.py      a sweep from its first line to its table; dry runs
    choose.py      --filter: some of the trials
    pool.py        the trials that run: started, looked at, stopped, noted
    launch.py      where they run: launchers and jobs; processes on this machine
    slurm.py       the launcher for SLURM, with slurm_options.py, slurm_queue.py, slurm_job.py
    journal.py     journal.sqlite: what was tried, where, when, how it ended
    signals.py     Ctrl-C and SIGTERM, to be passed on once
    progress.py    how far a run is, off the ends of its files
    status.py      the state of every trial as text
    live.py        the same as a live table on a terminal
    results.py     the files of finished trials to numbers, and results.csv
    statistics.py  intervals, paired differences, Holm's correction, power
    noise.py       how much seeds vary, from a pilot or the trials at hand
    comparison.py  variants against the baseline: differences, true costs, marks, verdicts
    table.py       the comparison as text
    figure.py      the comparison as sweep.png, with forest.py (differences) and labels.py (names)
    summary.py     all that a sweep leaves, with summary.json
    command.py     the ``moejax sweep`` command

No JAX device is started here: each trial is a process of its own, and the devices are its.
"""
