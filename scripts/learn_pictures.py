"""Draw the pictures of the documentation's section "Learn".

    python scripts/learn_pictures.py

`PICTURES` draws the files of `docs/images/learn`. They are SVG with two sets of colors: the browser chooses one by the
reader's preference for light or dark. Text is drawn as outlines, so that no font is needed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parents[1] / "docs" / "images" / "learn"
# name: (light, dark). The colors of data are from Okabe and Ito's palette, which colour-blind people can distinguish.
COLORS = {
    "paper": ("#ffffff", "#1e2129"),
    "ink": ("#202124", "#e4e6eb"),
    "faint": ("#9aa0a6", "#7d828c"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#e69f00"),
    "green": ("#007a5a", "#2fc79a"),
    "pink": ("#a8457f", "#e08bbd"),
}
PAPER, INK, FAINT, BLUE, ORANGE, GREEN, PINK = (light for light, _ in COLORS.values())
STYLE = {
    "font.size": 11,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "batchnorm",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
}
X = np.array([1.0, 7.0, 9.0, 15.0])


def computes() -> Figure:
    """The four numbers on one line for each step."""
    centered = X - X.mean()
    x_hat = centered / X.std()
    rows = [
        ("x", X, "the batch"),
        ("x − μ", centered, "minus the mean, 8"),
        ("x̂", x_hat, "divided by σ = 5"),
        ("y", 2 * x_hat + 1, "times γ = 2, plus β = 1"),
    ]
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for height, (name, values, text) in zip(range(len(rows), 0, -1), rows, strict=True):
        axes.plot([-8.5, 16.5], [height, height], color=FAINT, linewidth=1, zorder=1)
        axes.plot([0, 0], [height - 0.1, height + 0.1], color=FAINT, linewidth=1)
        axes.scatter(values, [height] * 4, s=46, color=[BLUE, GREEN, PINK, ORANGE], zorder=2)
        axes.text(-9.2, height, name, ha="right", va="center", style="italic", fontsize=13)
        axes.text(17.2, height, text, ha="left", va="center")
        if np.ptp(values) > 6:
            for value in values:
                axes.text(value, height + 0.17, f"{value:g}".replace("-", "−"), ha="center", fontsize=9)
        else:
            axes.text(
                values.max() + 0.8, height + 0.17, ", ".join(f"{v:g}" for v in values).replace("-", "−"), fontsize=9
            )
    axes.text(0, 0.62, "0", ha="center", color=FAINT, fontsize=9)
    axes.set(xlim=(-11.5, 27.5), ylim=(0.5, 4.5))
    axes.axis("off")
    return figure


def backward() -> Figure:
    """The graph of the computation, with the gradients of the example."""
    places = {"x": (0.6, 2), "μ": (3.2, 3.4), "σ²": (3.2, 0.6), "x̂": (6.2, 2), "y": (9.0, 2)}
    colors = {"x": BLUE, "μ": GREEN, "σ²": GREEN, "x̂": PINK, "y": ORANGE}
    gradients = {
        "x": "dx =\n0.104\n−0.128\n−0.072\n0.096",
        "μ": "dμ = −0.4",
        "σ²": "dσ² = 0.056",
        "x̂": "dx̂ = 2, 0, 0, 0",
        "y": "dy = 1, 0, 0, 0",
    }
    figure = Figure(figsize=(7.4, 3.5), layout="constrained")
    axes = figure.subplots()
    for start, end in (("x", "μ"), ("x", "σ²"), ("μ", "σ²"), ("x", "x̂"), ("μ", "x̂"), ("σ²", "x̂"), ("x̂", "y")):
        (x0, y0), (x1, y1) = places[start], places[end]
        length = np.hypot(x1 - x0, y1 - y0)
        shift = 0.42 * np.array([x1 - x0, y1 - y0]) / length
        axes.annotate(
            "",
            (x1 - shift[0], y1 - shift[1]),
            (x0 + shift[0], y0 + shift[1]),
            arrowprops={"arrowstyle": "-|>", "color": FAINT, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0},
        )
    for name, (x, y) in places.items():
        axes.add_patch(Circle((x, y), 0.4, facecolor=PAPER, edgecolor=colors[name], linewidth=2, zorder=2))
        axes.text(x, y, name, ha="center", va="center", fontsize=14, style="italic", zorder=3)
        below = y - 0.55 if name != "μ" else y + 0.75
        axes.text(x, below, gradients[name], ha="center", va="top", color=colors[name], fontsize=10)
    axes.text(7.6, 2.15, "γ, β", ha="center", fontsize=10)
    axes.set(xlim=(-1.1, 10.4), ylim=(-0.5, 4.3), aspect="equal")
    axes.axis("off")
    return figure


def running() -> Figure:
    """The running mean of random batches of four, for three values of momentum."""
    means = np.random.default_rng(1).normal(8, 5, (100, 4)).mean(axis=1)
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(8, color=FAINT, linewidth=1, linestyle="--")
    for momentum, color in ((0.99, PINK), (0.1, BLUE), (0.01, ORANGE)):
        average = [0.0]
        for mean in means:
            average.append((1 - momentum) * average[-1] + momentum * mean)
        axes.plot(average, color=color, linewidth=1 if momentum > 0.5 else 2, label=f"momentum {momentum}")
    axes.set(xlabel="step", ylabel="running mean", xlim=(0, 100), ylim=(0, None))
    axes.text(101, 8, "μ = 8", va="center", clip_on=False)
    axes.legend(loc="lower right")
    return figure


def placement() -> Figure:
    """The values that the next layer gets, with batch normalization before and after a ReLU."""
    x = np.random.default_rng(0).normal(1.0, 2.0, 20_000)
    rows = {
        "linear → batch normalization → ReLU": np.maximum((x - x.mean()) / x.std(), 0),
        "linear → ReLU → batch normalization": (np.maximum(x, 0) - np.maximum(x, 0).mean()) / np.maximum(x, 0).std(),
    }
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    for axes, (title, values), color in zip(
        figure.subplots(1, 2, sharey=True), rows.items(), (BLUE, ORANGE), strict=True
    ):
        axes.hist(values, bins=np.arange(-1.2, 4.01, 0.1), weights=np.full(len(x), 100 / len(x)), color=color)
        axes.axvline(values.mean(), color=INK, linewidth=1.2, linestyle="--")
        axes.text(values.mean() + 0.1, 42, f"mean {abs(values.mean()):.1f}")
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("value that the next layer gets")
    figure.axes[0].set_ylabel("share of the samples, %")
    return figure


def inputs() -> Figure:
    """Gradient descent on the loss of a line, with the raw and with the standardized feature."""
    y = np.array([2.0, 3.0, 5.0, 6.0])
    figure = Figure(figsize=(7.4, 3.5), layout="constrained")
    features = {"raw: rate 0.011, 100 steps": (X, 1 / 90, 100), "standardized: rate 1, 1 step": ((X - 8) / 5, 1.0, 1)}
    for axes, (title, (x, rate, steps)) in zip(figure.subplots(1, 2), features.items(), strict=True):
        columns = np.stack([x, np.ones(4)], axis=1)
        best = np.linalg.lstsq(columns, y, rcond=None)[0]
        half = np.array([0.55, 4.5]) if steps > 1 else np.array([4.5, 4.5])
        path = [best + 0.8 * half * [1, -1]]
        for _ in range(steps):
            path.append(path[-1] - rate * columns.T @ (columns @ path[-1] - y) / 4)
        w, b = (np.linspace(middle - size, middle + size, 100) for middle, size in zip(best, half, strict=True))
        excess = ((columns[:, 0, None, None] * (w - best[0]) + (b - best[1])[:, None]) ** 2).mean(axis=0)
        axes.contour(w, b, excess, levels=np.geomspace(0.05, excess.max(), 9), colors=FAINT, linewidths=0.8)
        axes.plot(*np.transpose(path), color=ORANGE, marker="o", markersize=3 if steps > 1 else 6, linewidth=1.5)
        axes.plot(*best, marker="*", markersize=14, color=BLUE)
        axes.set_title(title, fontsize=10.5)
        axes.set(xlabel="w", ylabel="b")
    return figure


def noise() -> Figure:
    """The noise of one sample's normalized value, measured and by the formula."""
    sizes = 2 ** np.arange(2, 11)
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for value, color, marker in ((0.0, BLUE, "o"), (2.0, ORANGE, "s")):
        measured = []
        for m in sizes:
            x = np.random.default_rng(0).normal(size=(m, 4000))
            x[0] = value
            measured.append(((x[0] - x.mean(axis=0)) / x.std(axis=0)).std())
        axes.plot(sizes, measured, marker, color=color, label=f"x̂ = {value:g}, measured")
        axes.plot(sizes, np.sqrt((1 + value**2 / 2) / sizes), color=color, label=f"x̂ = {value:g}, formula")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{m:,}" for m in sizes])
    axes.set_yticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    axes.minorticks_off()
    axes.set(xlabel="batch size", ylabel="standard deviation of x̂")
    axes.legend()
    return figure


def failures() -> Figure:
    """Two sources on one line: raw, normalized together, and normalized apart."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(2, 1, 30), rng.normal(102, 1, 30)
    both = np.concatenate([first, second])
    rows = [
        ("x", both),
        ("together", (both - both.mean()) / both.std()),
        ("apart", np.concatenate([(part - part.mean()) / part.std() for part in (first, second)])),
    ]
    figure = Figure(figsize=(7.4, 3.0), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(3, 1), rows, strict=True):
        axes.scatter(values[:30], np.full(30, 0.12), s=22, color=BLUE, alpha=0.7, label="source 1")
        axes.scatter(values[30:], np.full(30, -0.12), s=22, color=ORANGE, alpha=0.7, label="source 2")
        axes.set(ylim=(-0.4, 0.4), yticks=[], xlim=(-5, 110) if name == "x" else (-3, 3))
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.axes[0].legend(loc="upper center", ncols=2, fontsize=9)
    return figure


def fusing() -> Figure:
    """Three operations become two."""
    figure = Figure(figsize=(7.4, 2.7), layout="constrained")
    axes = figure.subplots()

    def chain(height: float, boxes: list[tuple[float, float, str, str]]) -> None:
        for x, width, text, color in boxes:
            box = FancyBboxPatch(
                (x, height - 0.45), width, 0.9, boxstyle="round,pad=0.05", facecolor=PAPER, edgecolor=color, linewidth=2
            )
            axes.add_patch(box)
            axes.text(x + width / 2, height, text, ha="center", va="center", fontsize=10.5)
        ends = [(-0.9, boxes[0][0]), *((a[0] + a[1], b[0]) for a, b in pairwise(boxes))]
        for start, end in [*ends, (boxes[-1][0] + boxes[-1][1], boxes[-1][0] + boxes[-1][1] + 0.9)]:
            axes.annotate(
                "", (end - 0.08, height), (start + 0.08, height), arrowprops={"arrowstyle": "-|>", "color": FAINT}
            )

    relu = (8.2, 1.4, "ReLU", GREEN)
    chain(
        2.1,
        [
            (0, 2.6, "convolution\nw = 3, b = 1", BLUE),
            (3.5, 3.8, "batch normalization\nγ = 2, β = 1, μ = 8, σ = 5", ORANGE),
            relu,
        ],
    )
    chain(0.4, [(2.0, 3.6, "convolution\nw′ = 1.2, b′ = −1.8", PINK), relu])
    axes.text(-1.1, 2.1, "x", ha="right", va="center", style="italic", fontsize=13)
    axes.text(-1.1, 0.4, "x", ha="right", va="center", style="italic", fontsize=13)
    axes.set(xlim=(-1.6, 10.8), ylim=(-0.25, 2.8))
    axes.axis("off")
    return figure


def variants() -> Figure:
    """The values that share a mean, as blocks: rows are samples, columns are channels."""
    samples, channels = 8, 6
    blocks = {  # samples and channels that share a mean
        "batch": (samples, 1),
        "layer": (1, channels),
        "group, 3 groups": (1, 2),
        "instance": (1, 1),
        "ghost, parts of 4": (4, 1),
        "synchronized": (samples, 1),
    }
    figure = Figure(figsize=(7.4, 5.0), layout="constrained")
    for axes, (title, (height, width)) in zip(figure.subplots(2, 3).flat, blocks.items(), strict=True):
        corners = [(n, c) for n in range(0, samples, height) for c in range(0, channels, width)]
        for n, c in corners:
            color = BLUE if (n // height + c // width) % 2 == 0 else ORANGE
            axes.add_patch(Rectangle((c + 0.04, n + 0.04), width - 0.08, height - 0.08, facecolor=color))
        for line in range(1, samples):
            axes.plot([0, channels], [line, line], color=PAPER, linewidth=0.5)
        for line in range(1, channels):
            axes.plot([line, line], [0, samples], color=PAPER, linewidth=0.5)
        axes.set(xlim=(-0.2, channels + 0.2), ylim=(samples + 0.2, -0.2), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(f"{title}: {len(corners)} means", fontsize=10.5)
        axes.set(xlabel="channels", ylabel="samples")
    axes.plot([-0.2, channels + 0.2], [4, 4], color=INK, linestyle="--", linewidth=1.5)
    axes.set_ylabel("process 2    process 1")
    return figure


PICTURES: tuple[Callable[[], Figure], ...] = (
    computes,
    backward,
    running,
    placement,
    inputs,
    noise,
    failures,
    fusing,
    variants,
)


def svg(draw: Callable[[], Figure]) -> str:
    """Return a picture as SVG whose colors depend on the reader's preference."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue().decode()
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items()) for i in (0, 1))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return text.replace("<defs>", f"{style}<defs>", 1)


def main() -> None:
    """Draw all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        (FOLDER / f"{draw.__name__}.svg").write_text(svg(draw))


if __name__ == "__main__":
    main()
