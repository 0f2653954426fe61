"""Numbers about routing, as pure functions of NumPy arrays; docs/report.md has their formulas.

    selection.py       which experts a token chose, and its first choice
    balance.py         how evenly pairs are spread over experts
    coactivation.py    which experts are chosen together
    transitions.py     first choices in one layer against those in the next
    specialisation.py  which kinds of tokens an expert gets, against what all experts get
    information.py     how much a token's kind says about its expert, and chance's share of that
    stability.py       how routing moves between two recordings
    spread.py          means, quantiles and histograms over tokens
    similarity.py      how alike experts, or rows of a router, are

Axes: T tokens (valid ones: padding is taken out before), E experts, K columns of a routing, C kinds
of tokens (domains, token ids), Q quantiles, W rows of a window. "..." stands for any leading axes.
What is undefined (a share of nothing) is NaN, never 0.
"""
