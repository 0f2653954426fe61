"""What the router computed: probabilities, logits, and how sure it is of its first choice."""

import numpy as np

from moejax.analysis import figures
from moejax.analysis.html import plain
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.pages.load import by_layer
from moejax.analysis.panels import Panel, fan, panels
from moejax.analysis.probed import at_tokens, over_steps
from moejax.analysis.run import RunData
from moejax.analysis.statistics.spread import histogram, spread
from moejax.probe import Probe

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
ROUNDING = 1e-3
"""A log z below this is that of probabilities, whose sum is 1."""


QUANTITIES = {
    "entropy": "entropy of p, nats",
    "margin": "margin, p first - second",
    "log_z": "log z",
    "max_logit": "largest |logit|",
}
"""Numbers that the probe has of each token, with the titles of their axes."""

MEANING = (
    "Each token of the probe gives four numbers per layer. Entropy of the router's probabilities: "
    "0 when it is certain, log E when it does not know. Margin: the largest probability minus the "
    "second largest; tokens near 0 change expert at the next small update. log z, the log of the "
    "sum of exp(logits): the router z-loss is the mean of its square, and values far from 0 lose "
    "precision in bfloat16. Largest |logit|: growth without end announces a router that saturates."
)


def page(run: RunData) -> Page:
    probe = run.probe
    if probe is None or not probe.steps:
        return Page("Router", [])
    steps, spread_SQMX = summaries(probe)
    blocks: list[Block] = [
        Text(MEANING),
        *_without_logits(spread_SQMX),
        _means(probe, steps, spread_SQMX),
        _last(spread_SQMX[-1]),
        Choice(
            "spread over tokens, layer",
            {
                str(layer): [_fan(steps, spread_SQMX, layer), _histograms(probe, layer)]
                for layer in range(spread_SQMX.shape[2])
            },
        ),
        *_gate(run),
    ]
    return Page("Router", blocks)


def _without_logits(spread_SQMX: np.ndarray) -> list[Block]:
    """Whether log z is that of probabilities, 0, in every layer and at every step."""
    log_z_SMX = spread_SQMX[:, list(QUANTITIES).index("log_z")]
    if not (np.abs(log_z_SMX) < ROUNDING).all():
        return []
    return [
        Text(
            "Log z is 0 throughout: this gate has no logits, or normalised ones. Those of its "
            "probabilities stand in, and log z and the largest |logit| say nothing here."
        )
    ]


def summaries(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and spreads [S, Q, M, 1 + levels] of the quantities: mean, then quantiles."""

    def at(step: int) -> np.ndarray:
        return np.stack([spread(at_tokens(probe, step, name), LEVELS) for name in QUANTITIES])

    return over_steps(probe, at)


def _means(probe: Probe, steps: np.ndarray, spread_SQMX: np.ndarray) -> Figure:
    found = []
    for index, (name, axis) in enumerate(QUANTITIES.items()):
        traces = by_layer("", steps, spread_SQMX[:, index, :, 0])
        if name == "entropy":
            largest = float(np.log(int(probe.at(probe.steps[-1])["num_experts"])))
            traces.append(figures.level("log E", probe.steps, largest))
        found.append(Panel("step", axis, traces))
    caption = "Means over the probe's tokens at each recording. Dotted: entropy of even odds."
    return Figure(panels(found), caption, height=560, name="router-means")


def _fan(steps: np.ndarray, spread_SQMX: np.ndarray, layer: int) -> Figure:
    found = []
    for index, axis in enumerate(QUANTITIES.values()):
        _, low, quarter, middle, three, high = spread_SQMX[:, index, layer].T
        bands = {"5% to 95% of tokens": (low, high), "25% to 75%": (quarter, three)}
        found.append(Panel("step", axis, fan(steps, bands, ("median", middle))))
    caption = f"How the tokens of layer {layer} spread around their median, by step."
    return Figure(panels(found), caption, height=560, name=f"router-spread-{layer}")


def _histograms(probe: Probe, layer: int) -> Figure:
    step, found = probe.steps[-1], []
    for name, axis in QUANTITIES.items():
        value_T = at_tokens(probe, step, name)[layer].astype(np.float64)
        value_T = value_T[np.isfinite(value_T)]
        edges = np.histogram_bin_edges(value_T, BINS)
        bars = {
            "type": "bar",
            "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "y": histogram(value_T, edges).tolist(),
            "width": float(edges[1] - edges[0]),
            "marker": {"color": "C0"},
        }
        found.append(Panel(axis, "share of tokens", [bars], {"tickformat": ".0%"}))
    caption = f"Layer {layer} at step {step}: the share of tokens in each of {BINS} intervals."
    return Figure(panels(found), caption, height=560, name=f"router-distribution-{layer}")


def _last(spread_QMX: np.ndarray) -> Table:
    rows = []
    for layer in range(spread_QMX.shape[1]):
        cells = [str(layer)]
        for mean, low, *_, high in spread_QMX[:, layer]:
            cells += [f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append(cells)
    names = ("entropy", "margin", "log z", "largest |logit|")
    header = ["layer", *(text for name in names for text in (name, "5% to 95%"))]
    return Table(header, rows, "At the last recording: means over tokens, and quantiles.")


def _gate(run: RunData) -> list[Block]:
    """What only this gate measures and the trainer logs."""
    start = "moe/gate/"
    keys = sorted({k for row in run.train for k in row if k.startswith(start)})
    lines = {key.removeprefix(start): run.series("train", key) for key in keys}
    found = [
        Panel("step", plain(name), [figures.line(name, steps, values)])
        for name, (steps, values) in lines.items()
        if len(steps)
    ]
    if not found:
        return []
    spec = panels(found, columns=min(2, len(found)))
    spec["layout"]["showlegend"] = False
    caption = "What this gate alone measures, in training, mean over layers: see docs/gates.md."
    return [Figure(spec, caption, height=90 + 240 * -(-len(found) // 2), name="router-gate")]
