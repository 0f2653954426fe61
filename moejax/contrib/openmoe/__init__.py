"""OpenMoE's three findings about a run (Xue et al. 2024, arXiv 2402.01739, section 4).

    texts.py        the rows of the texts that are routed
    routed.py       how a checkpoint routed the rows of a text
    interval.py     an interval over rows, for any statistic of them
    tokens.py       1. context-independent specialisation
    early.py        2. early routing learning
    drops.py        3. drop towards the end
    verdict.py      which findings appear, by stated criteria
    measure.py      what has to be evaluated for them
    findings.py     the numbers together, and as JSON
    page.py         the page of the report
    flags.py        the flags of ``moejax report RUN --openmoe``
    report.py       what the command does

docs/openmoe.md has the procedure, the criteria and where they deviate from the paper.
"""
