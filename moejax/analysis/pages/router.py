"""The router's probabilities and logits, and its certainty about the first choice."""

import math

import numpy as np

from moejax.analysis import figures
from moejax.analysis.figures import Panel, Scale, fan, panels
from moejax.analysis.html import plain
from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.pages.load import by_layer
from moejax.analysis.probed import at_tokens, over_steps
from moejax.analysis.run import RunData
from moejax.analysis.statistics.values import histogram, spread
from moejax.record.probe import Probe
from moejax.train import scales

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
ROUNDING = 1e-3
"""A log z below this is that of probabilities, whose sum is 1."""


QUANTITIES = ("entropy", "margin", "log_z", "max_logit")
"""Numbers that the probe has of each token."""


def scales_of(experts: int) -> dict[str, Scale]:
    """The scales of the quantities; probabilities are bounded, logits are not."""
    return {
        "entropy": Scale("entropy of p", "nats", bounds=(0.0, 1.05 * math.log(max(experts, 2)))),
        "margin": Scale("margin", "p first - second", bounds=(0.0, 1.02)),
        "log_z": Scale("log z", "nats", LOGIT),
        "max_logit": Scale("largest |logit|", "nats", LOGIT, start=0.0),
    }


LOGIT = 1.0
"""The least span of logits: a factor e of odds."""

MEANING = (
    "Each token of the probe gives four numbers per layer. Entropy of the router's probabilities: "
    "0 when it is certain, log E when it is indifferent. Margin: the largest probability minus the "
    "second largest; tokens near 0 change expert at the next small update. log z, the log of the "
    "sum of exp(logits): the router z-loss is the mean of its square, and values far from 0 lose "
    "precision in bfloat16. Largest |logit|: unbounded growth precedes saturation of the router."
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
                str(layer): [_fan(probe, steps, spread_SQMX, layer), _histograms(probe, layer)]
                for layer in range(spread_SQMX.shape[2])
            },
        ),
        *_gate(run),
    ]
    return Page("Router", blocks)


def _without_logits(spread_SQMX: np.ndarray) -> list[Block]:
    """A note if log z is 0 in every layer and at every step, as for probabilities."""
    log_z_SMX = spread_SQMX[:, QUANTITIES.index("log_z")]
    if not (np.abs(log_z_SMX) < ROUNDING).all():
        return []
    return [
        Text(
            "Log z is 0 throughout: this gate has no logits, or normalised ones. Its log "
            "probabilities take their place; log z and the largest |logit| carry no information."
        )
    ]


def summaries(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and spreads [S, Q, M, 1 + levels] of the quantities: mean, then quantiles."""

    def at(step: int) -> np.ndarray:
        return np.stack([spread(at_tokens(probe, step, name), LEVELS) for name in QUANTITIES])

    return over_steps(probe, at)


def _means(probe: Probe, steps: np.ndarray, spread_SQMX: np.ndarray) -> Figure:
    charts, experts = [], _experts(probe)
    for index, (name, scale) in enumerate(scales_of(experts).items()):
        traces = by_layer("", steps, spread_SQMX[:, index, :, 0])
        if name == "entropy":
            traces.append(figures.level("log E", probe.steps, math.log(experts)))
        charts.append(Panel("step", scale, traces))
    caption = "Means over the probe's tokens at each recording. Dotted: entropy of even odds."
    return Figure(panels(charts), caption, height=560, name="router-means")


def _experts(probe: Probe) -> int:
    return int(probe.at(probe.steps[-1])["num_experts"])


def _fan(probe: Probe, steps: np.ndarray, spread_SQMX: np.ndarray, layer: int) -> Figure:
    """On the same axes for all layers."""
    charts = []
    for index, scale in enumerate(scales_of(_experts(probe)).values()):
        _, low, quarter, middle, three, high = spread_SQMX[:, index, layer].T
        bands = {"5% to 95% of tokens": (low, high), "25% to 75%": (quarter, three)}
        axis = scale.axis(spread_SQMX[:, index, :, 1:].ravel())
        charts.append(Panel("step", scale, fan(steps, bands, ("median", middle)), axis))
    caption = f"The spread of the tokens of layer {layer} around their median, by step."
    return Figure(panels(charts), caption, height=560, name=f"router-spread-{layer}")


def _histograms(probe: Probe, layer: int) -> Figure:
    """Intervals divide the whole axis: values that are all but equal are one bar."""
    step, charts = probe.steps[-1], []
    for name, scale in scales_of(_experts(probe)).items():
        value_MT = at_tokens(probe, step, name).astype(np.float64)
        value_T = value_MT[layer][np.isfinite(value_MT[layer])]
        axis = scale.axis(value_MT.ravel())
        low, high = axis["range"]
        edges = np.linspace(low, high, BINS + 1)
        bars = {
            "type": "bar",
            "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
            "y": histogram(value_T, edges).tolist(),
            "width": float(edges[1] - edges[0]),
            "marker": {"color": "C0"},
        }
        charts.append(Panel(scale, figures.share("tokens", "share"), [bars], x_axis=axis))
    caption = f"Layer {layer} at step {step}: the share of tokens in each of {BINS} intervals."
    return Figure(panels(charts), caption, height=560, name=f"router-distribution-{layer}")


def _last(spread_QMX: np.ndarray) -> Table:
    rows = []
    for layer in range(spread_QMX.shape[1]):
        cells = [str(layer)]
        for mean, low, *_, high in spread_QMX[:, layer]:
            cells += [f"{mean:z.3f}", f"{low:z.3f} to {high:z.3f}"]
        rows.append(cells)
    names = ("entropy", "margin", "log z", "largest |logit|")
    header = ["layer", *(text for name in names for text in (name, "5% to 95%"))]
    return Table(header, rows, "At the last recording: means over tokens, and quantiles.")


def _gate(run: RunData) -> list[Block]:
    """Metrics that only this gate measures."""
    start = "moe/gate/"
    keys = sorted({k for row in run.train for k in row if k.startswith(start)})
    lines = {key.removeprefix(start): run.series("train", key) for key in keys}
    charts = [
        Panel(
            "step",
            Scale(plain(name), "mean over tokens", scales.least_relative(values)),
            [figures.line(name, steps, values)],
        )
        for name, (steps, values) in lines.items()
        if len(steps)
    ]
    if not charts:
        return []
    spec = panels(charts, columns=min(2, len(charts)))
    spec["layout"]["showlegend"] = False
    caption = "What this gate alone measures, in training, mean over layers: see docs/gates.md."
    return [Figure(spec, caption, height=90 + 240 * -(-len(charts) // 2), name="router-gate")]
