"""One picture of a run, ``summary.png``, from its ``config.json`` and ``metrics.jsonl`` alone.

Above: the loss with the baselines, the share of dropped pairs and the imbalance of the load; below:
the load of every expert over time. A run without MoE layers shows its gradient norm, learning rate
and accuracy instead.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config.saved import METRICS, read_config
from moejax.errors import UserError
from moejax.record.files import read_rows, replaced
from moejax.train import scales
from moejax.train.cost import units

Row = dict[str, Any]

# Okabe and Ito's palette, distinguishable with every common colour blindness.
TRAIN, HELD_OUT, QUIET, ALERT = "#0072B2", "#D55E00", "#595959", "#B00020"
HEATMAP_COLUMNS = 240
"""The most columns of a curve: more logged steps are averaged into as many."""
HEATMAP_PANELS = 8
"""With more MoE layers than this an even selection is shown, including the first and the last."""

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#808080",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": QUIET,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def write_summary_png(workdir: str) -> None:
    """Draws ``<workdir>/summary.png``, 1320 x 880 pixels, and replaces an older one.

    Raises:
      UserError: the workdir holds no run, or one that has not logged a step yet; or the disk is
        full.
    """
    import matplotlib

    path = Path(workdir) / "summary.png"
    with matplotlib.rc_context(STYLE):
        figure = summary_figure(workdir)
        with replaced(path) as temporary:
            figure.savefig(temporary, format="png")


def summary_figure(workdir: str) -> Any:
    """The picture as a ``matplotlib.figure.Figure``, without pyplot's windows and global state."""
    from matplotlib.figure import Figure

    run = _read(Path(workdir))
    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.12, 1))
    top, bottom = halves
    _title(figure, run)
    grid = top.add_gridspec(2, 2, width_ratios=(2.1, 1))
    _loss(top.add_subplot(grid[:, 0]), run)
    if run.load is None:
        _accuracy(top.add_subplot(grid[0, 1]), run)
        for axes, key, title, what in (
            (top.add_subplot(grid[1, 1]), "learning_rate", "Learning rate", "per step"),
            (bottom.subplots(), "grad_norm", "Gradient norm", "L2, before clipping"),
        ):
            _lines(axes, run, key, title, what)
            _scale(axes, scales.least_relative(run.series("train", key)[1]), start=0.0)
    else:
        _drops(top.add_subplot(grid[0, 1]), run)
        _balance(top.add_subplot(grid[1, 1]), run)
        _heatmaps(bottom, run)
    return figure


@dataclasses.dataclass(frozen=True)
class _Run:
    name: str
    config: dict[str, Any]
    baselines: dict[str, float]
    item: str
    unit: str
    train: list[Row]
    held_out: list[Row]

    def series(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a metric; a value that is not finite becomes a gap."""
        rows = [row for row in getattr(self, split) if key in row]
        values = np.asarray([row[key] for row in rows], np.float64)
        steps = np.asarray([row["step"] for row in rows], np.float64)
        return steps, np.where(np.isfinite(values), values, np.nan)

    @property
    def load(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Steps [N] and pair counts [N, MoE layers, E]; None for a model without experts."""
        rows = [row for row in self.train if row.get("moe/load")]
        if not rows:
            return None
        return (
            np.asarray([row["step"] for row in rows], np.float64),
            np.asarray([row["moe/load"] for row in rows], np.float64),
        )


def _read(workdir: Path) -> _Run:
    saved = read_config(workdir, ("config", "baselines"))
    rows = read_rows(workdir / METRICS)
    train = [row for row in rows if row["split"] == "train"]
    if not train:
        raise UserError(f"{workdir}/metrics.jsonl holds no training step yet; train first")
    held_out = [row for row in rows if row["split"] == "eval"]
    return _Run(
        workdir.resolve().name,
        saved["config"],
        saved["baselines"],
        # Runs older than tasks are of text.
        saved.get("units", {"item": "token"})["item"],
        units.loss_unit(saved),
        train,
        held_out,
    )


def _title(figure: Any, run: _Run) -> None:
    """Run name, gate, mesh and final loss; leaks of information in red."""
    model, moe, mesh = (run.config[section] for section in ("model", "moe", "mesh"))
    axes = [f"{axis}={mesh[axis]}" for axis in ("data", "fsdp", "expert", "tensor")]
    axes = [axis for axis in axes if not axis.endswith("=1")]
    gate = "dense_ffn" if run.load is None else f"gate {moe['gate']['name']}"
    facts = [gate, "mesh " + (" x ".join(axes) or "1 device")]
    facts += [f"{model['num_layers']} layers"] if "num_layers" in model else []
    if run.load is not None:
        facts.append(f"{moe['num_experts']} experts")
        facts += [f"transport {moe['transport']}"] if "transport" in moe else []
    facts.append(_final_loss(run))
    name = run.name.replace("$", r"\$")  # matplotlib would read it as mathematics
    figure.text(0.012, 0.968, name, va="center", fontsize=15, fontweight="bold")
    line = "   |   ".join(facts)
    size = min(9.5, 9.5 * 165 / len(line))
    figure.text(0.012, 0.93, line, va="center", color=QUIET, fontsize=size)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.91), w_pad=0.08, wspace=0.03)
    leak = run.train[-1].get("leak") or ""
    if leak:
        box = {"boxstyle": "round,pad=0.4", "facecolor": ALERT, "edgecolor": "none"}
        style = {"color": "white", "fontsize": 11, "fontweight": "bold", "bbox": box}
        figure.text(0.985, 0.965, f"leaks: {leak}", ha="right", va="center", **style)


def _final_loss(run: _Run) -> str:
    row = (run.held_out or run.train)[-1]
    what = "held-out" if run.held_out else "training"
    bits = f" ({row['bits_per_byte']:.4f} bits/byte)" if "bits_per_byte" in row else ""
    right = f", accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
    return f"{what} loss {row['loss']:.4f} {run.unit}{bits}{right} at step {row['step']}"


def _loss(axes: Any, run: _Run) -> None:
    """Training and held-out loss; horizontal lines for the baselines."""
    steps, loss = run.series("train", "loss")
    half = len(loss) // 100
    if half:
        axes.plot(steps, loss, color=TRAIN, alpha=0.35, linewidth=1)
        window = 2 * half + 1
        steps, smooth = steps[half:-half], np.convolve(loss, np.ones(window) / window, "valid")
        label = f"training, mean of {window} logged steps"
    else:
        smooth, label = loss, "training"
    axes.plot(steps, smooth, color=TRAIN, linewidth=1.8, label=label, **_mark(steps))
    eval_steps, eval_loss = run.series("held_out", "loss")
    if eval_steps.size:
        style = {"color": HELD_OUT, "markersize": 4, "linewidth": 1.4}
        axes.plot(eval_steps, eval_loss, "o-", label="held out", **style)
    for (name, value), dashes in zip(run.baselines.items(), ((5, 2), (1.5, 1.5)), strict=False):
        axes.axhline(value, color=QUIET, linewidth=1.1, dashes=dashes)
        text = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"{name} {value:.3f}", (1, value), (-4, 3), ha="right", color=QUIET, **text)
    # The first few steps lie far above the rest and would flatten it.
    settled = loss[min(len(loss) // 25, len(loss) - 1) :]
    shown = np.concatenate([settled, eval_loss, list(run.baselines.values())])
    axes.set_ylim(scales.span(shown, scales.least_loss(run.unit, shown)))
    _label(axes, run, "Loss", run.unit)
    legend = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "borderaxespad": 0.1}
    axes.legend(**legend)


def _lines(axes: Any, run: _Run, key: str, title: str, what: str) -> None:
    """A metric over steps, training and held out."""
    for split, color, label in (("train", TRAIN, "training"), ("held_out", HELD_OUT, "held out")):
        steps, values = run.series(split, key)
        if steps.size:
            axes.plot(steps, values, color=color, linewidth=1.4, label=label, **_mark(steps))
    _label(axes, run, title, what)


def _label(axes: Any, run: _Run, title: str, what: str) -> None:
    """Title in bold with the unit beside it, and the run's whole length as x axis."""
    heading = axes.set_title(title)
    axes.annotate(
        what, (1, 0), (8, 0), xycoords=heading, textcoords="offset points", va="bottom", color=QUIET
    )
    axes.set(xlabel="step", xlim=(0, run.train[-1]["step"] * 1.01))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _drops(axes: Any, run: _Run) -> None:
    _lines(axes, run, "moe/drop_rate", "Dropped pairs", "share of all pairs")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _scale(axes, scales.SHARE, start=0.0)
    axes.legend(loc="best", fontsize=8)
    axes.set_xlabel("")
    axes.tick_params(labelbottom=False)


def _balance(axes: Any, run: _Run) -> None:
    _lines(axes, run, "moe/max_vio", "Imbalance", "max load / mean load - 1")
    _scale(axes, scales.IMBALANCE, start=0.0)


def _accuracy(axes: Any, run: _Run) -> None:
    _lines(axes, run, "accuracy", "Accuracy", f"share of {run.item}s")
    _scale(axes, scales.SHARE, bounds=(0.0, 1.0))


def _scale(axes: Any, least: float, **ends: Any) -> None:
    """A y axis that spans at least ``least``, so that a line of noise looks flat."""
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    axes.set_ylim(scales.span(values, least, **ends))


def _mark(steps: np.ndarray) -> dict[str, Any]:
    """Markers, if a line is too short to be visible."""
    return {"marker": "o", "markersize": 4} if len(steps) < 4 else {}


def _heatmaps(figure: Any, run: _Run) -> None:
    """Load of every expert over steps, relative to the layer's mean; one panel a layer."""
    import matplotlib
    from matplotlib.colors import LogNorm

    assert run.load is not None
    edges, relative = _relative_load(*run.load)
    num_layers, num_experts = relative.shape[1:]
    layers = np.unique(np.linspace(0, num_layers - 1, HEATMAP_PANELS).round().astype(int))
    columns = min(4, len(layers))
    panels = figure.subplots(
        -(-len(layers) // columns), columns, sharex=True, sharey=True, squeeze=False
    )
    limit = 2.0**scales.LOAD_OCTAVES
    # No tokens at all differs from few: near-black lies outside the scale.
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#1A1A1A")
    for panel, layer in zip(panels.flat, layers, strict=False):
        mesh = panel.pcolormesh(
            edges,
            np.arange(num_experts + 1) - 0.5,
            np.ma.masked_equal(relative[:, layer].T, 0.0),
            norm=LogNorm(1 / limit, limit),
            cmap=colours,
        )
        panel.set_facecolor("#1A1A1A")
        _label(panel, run, f"MoE layer {layer}", "load per expert")
        panel.set(xlabel="", xlim=(0, edges[-1]))
        panel.grid(False)
    for panel in panels.flat[len(layers) :]:
        panel.remove()
    for panel in panels[:, 0]:
        panel.set_ylabel("expert")
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.xaxis.get_major_locator().set_params(nbins=4)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    ticks = [2.0**i for i in range(-int(math.log2(limit)), int(math.log2(limit)) + 1)]
    bar = figure.colorbar(mesh, ax=panels, ticks=ticks, extend="both", pad=0.01, aspect=28)
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    bar.outline.set_visible(False)
    empty = "; black: no tokens" if (relative == 0).any() else ""
    bar.set_label(f"load / mean load{empty}")


def _relative_load(steps: np.ndarray, load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load / mean load [N, layers, E] in N <= HEATMAP_COLUMNS columns, and their N + 1 edges.

    A logged step stands for the steps since the one before it.
    """
    groups = np.array_split(np.arange(len(steps)), min(len(steps), HEATMAP_COLUMNS))
    summed = np.stack([load[group].sum(axis=0) for group in groups])
    mean = summed.mean(axis=-1, keepdims=True)
    ends = [steps[group[-1]] for group in groups]
    return np.asarray([0.0, *ends]), summed / np.maximum(mean, 1e-9)
