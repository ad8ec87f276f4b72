"use strict";
// Shared by the charts of all pages: draw each figure of class "chart" with Observable Plot at its full width, and again
// when the width changes.
const page = (() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))).replace("-", "−"));

  function logTicks([low, high]) {
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    const factors = powers.length > 4 ? [1] : [1, 2, 5];
    return powers.flatMap((power) => factors.map((factor) => factor * 10 ** power)).filter((tick) => tick >= low && tick <= high);
  }

  // Plot a chart of this width; `x` and `y` extend the options of the axes.
  function plot({ width, x, y, marks, ...options }) {
    const scales = {
      x: { labelArrow: "none", labelAnchor: "center", ticks: Math.max(3, width / 110), ...x },
      y: { labelArrow: "none", tickFormat: short, ...y },
    };
    // The default axis of a logarithmic scale leaves some ticks without a number.
    const axes = [["x", Plot.axisX], ["y", Plot.axisY]].filter(([name]) => scales[name].type === "log").map(([name, axis]) => {
      const { ticks, tickFormat, label, labelArrow, labelAnchor } = scales[name];
      return axis(ticks, { text: tickFormat, label, labelArrow, labelAnchor });
    });
    return Plot.plot({
      width, marginLeft: 52, marginBottom: 40, marginTop: 28, marginRight: 16,
      style: { background: "transparent", fontSize: "13px" },
      ...scales, marks: [...axes, ...marks], ...options,
    });
  }
  const tip = (data, options) => Plot.tip(data, { stroke: "var(--rule)", lineHeight: 1.3, ...options });

  // Draw each figure by `drawn(figure, width)`; return a function that redraws one figure.
  function draw(drawn) {
    const shown = new Map();
    function again(figure) {
      const width = Math.floor(figure.clientWidth);
      if (width === 0) return;
      figure.dataset.width = width;
      shown.get(figure)?.remove();
      shown.set(figure, drawn(figure, width));
      figure.append(shown.get(figure));
    }
    const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => {
      if (target.dataset.width !== String(Math.floor(target.clientWidth))) again(target);
    }));
    document.querySelectorAll(".chart").forEach((figure) => {
      again(figure);
      resized.observe(figure);
    });
    return again;
  }

  return { charts, short, logTicks, plot, tip, draw };
})();
