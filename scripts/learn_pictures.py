"""Draw the pictures of the documentation's section "Learn".

    python scripts/learn_pictures.py

`PICTURES` draws the files of `docs/images/learn`. They are SVG with two sets of colors: the browser chooses one by the
reader's preference for light or dark. Text is drawn as outlines, so that no font is needed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

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


PICTURES: dict[str, Callable[[], Figure]] = {"computes": computes}


def svg(figure: Figure) -> str:
    """Return the figure as SVG whose colors depend on the reader's preference."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue().decode()
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items()) for i in (0, 1))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return text.replace("<defs>", f"{style}<defs>", 1)


def main() -> None:
    """Draw all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            (FOLDER / f"{name}.svg").write_text(svg(draw()))


if __name__ == "__main__":
    main()
