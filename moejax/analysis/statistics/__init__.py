"""Statistics of routing, as pure functions of NumPy arrays; docs/report.md has their formulas.

    balance.py  the distribution of pairs over experts
    choices.py  co-activation, transitions between layers, changes between recordings
    kinds.py    specialisation of experts to kinds of tokens
    values.py   ratios, and means, quantiles and histograms over tokens

Axes: T tokens (without padding), E experts, K columns of a routing, C kinds
of tokens (domains, token ids), Q quantiles, W rows of a window. "..." stands for any leading axes.
Undefined values (a share of nothing) are NaN, never 0.
"""
