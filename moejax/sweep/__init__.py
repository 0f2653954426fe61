"""Sweeps: one experiment file, many runs of ``moejax train``, one table and one picture.

    definition.py     an experiment file expanded to trials, with resolved configs and ids
    match.py          matched costs: what an experiment claims, and the widths that satisfy it
    count.py          parameters and FLOPs of configs, counted in a separate process
    budget.py         the cost of a sweep and the power of its seeds, printed before it runs
    folder.py         the sweep's folder: sweep.json, a folder per trial, finished trials
    runner.py         a sweep from start to report; dry runs
    pool.py           the running trials: started, polled, stopped, recorded
    launch.py         the launcher interface; processes on this machine
    slurm/            the launcher for SLURM
    journal.py        journal.sqlite: attempts, hosts, times and exit statuses
    signals.py        Ctrl-C and SIGTERM, forwarded to the trials
    status.py         the state and progress of every trial as text
    screen.py         the same as a live table on a terminal
    results.py        numbers of finished trials, and results.csv
    statistics.py     intervals, paired differences, Holm's correction, power
    seed_variance.py  the variance over seeds and the smallest detectable difference
    comparison.py     variants against the baseline: differences, costs, marks, verdicts
    table.py          the comparison as text
    picture.py        the contents of the comparison's pictures
    figure.py         the comparison as sweep.png
    summary.py        everything that a sweep writes at its end

Nothing here starts a JAX device: each trial runs in its own process and owns its devices.
"""
