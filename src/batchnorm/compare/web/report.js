"use strict";
// Draws the charts of the page with Observable Plot, each as wide as its place, and again when that changes.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dashes = ["6 3", "none", "2 2", "9 3 2 3", "4 2", "12 4", "1 4"];
  const colour = (index) => `var(--series-${index % 7})`;
  const dash = (index) => dashes[index % dashes.length];
  const short = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
  const axis = { step: "training step", seconds: "training time (s)" };

  function logTicks([low, high]) {
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    const factors = powers.length > 4 ? [1] : [1, 2, 5];
    return powers.flatMap((power) => factors.map((factor) => factor * 10 ** power)).filter((tick) => tick >= low && tick <= high);
  }

  function key(index) {
    const sample = document.createElement("span");
    sample.innerHTML = `<svg width="26" height="6" aria-hidden="true"><line x1="0" y1="3" x2="26" y2="3"
      stroke="${colour(index)}" stroke-width="3" stroke-dasharray="${dash(index)}"/></svg>`;
    return sample.firstChild;
  }

  function curve(name, x, width) {
    const { label, log, domain, series } = charts.curves[name];
    const inside = (point) => point.mid >= domain[0] && point.mid <= domain[1];
    const points = series.flatMap((of, index) => of.map((point) => ({ ...point, index, norm: charts.norms[index] })));
    const ticks = log ? logTicks(domain) : d3.ticks(...domain, 6);
    const above = (value) => (log ? Math.max(value, domain[0]) : value); // a logarithmic axis has no place for 0
    const marks = [Plot.gridY(ticks, { stroke: "var(--rule)", strokeOpacity: 1 }), Plot.ruleY([domain[0]], { stroke: "var(--soft)" })];
    if (name === "accuracy") {
      marks.push(Plot.ruleY([charts.target], { stroke: "var(--soft)", strokeDasharray: "2 4" }));
    }
    series.forEach((of, index) => {
      marks.push(Plot.areaY(of, { x, y1: (d) => above(d.low), y2: (d) => above(d.high), fill: colour(index), fillOpacity: 0.22, clip: true }));
      marks.push(Plot.lineY(of, { x, y: (d) => above(d.mid), stroke: colour(index), strokeWidth: 2, strokeDasharray: dash(index), clip: true }));
    });
    if (name === "accuracy") {
      marks.push(Plot.text([charts.target], {
        y: (d) => d, text: (d) => `target ${short(d)} %`, frameAnchor: "right", dy: 9, fill: "var(--soft)",
        stroke: "var(--page)", strokeWidth: 4,
      }));
    }
    const pointed = Plot.pointer({ x, y: "mid", maxRadius: 60 });
    marks.push(Plot.dot(points.filter(inside), { ...pointed, r: 4, fill: (d) => colour(d.index) }));
    marks.push(Plot.tip(points.filter(inside), {
      ...pointed,
      stroke: "var(--rule)",
      lineHeight: 1.3,
      title: (d) => [
        d.norm, `step ${d.step}, ${short(d.seconds)} s`, `${label}: ${short(d.mid)}`,
        d.seeds > 1 ? `${short(d.low)} to ${short(d.high)} over ${d.seeds} seeds` : "1 seed",
      ].join("\n"),
    }));
    return Plot.plot({
      width, height: Math.max(240, Math.min(320, 0.6 * width)), marginLeft: 52, marginBottom: 40, marginTop: 28, marginRight: 16,
      ariaLabel: `${label} by ${axis[x]}`,
      style: { background: "transparent", fontSize: "13px" },
      x: { label: axis[x], labelArrow: "none", labelAnchor: "center", ticks: Math.max(3, width / 110), domain: [0, d3.max(points, (d) => d[x])] },
      y: { label, labelArrow: "none", domain, ticks, type: log ? "log" : "linear", tickFormat: short },
      marks,
    });
  }

  function activations(norm, width) {
    const { edges, most, panels } = charts.activations;
    const index = charts.norms.indexOf(norm);
    const columns = panels[norm];
    const cells = columns.flatMap(({ step, begin, end, shares }) =>
      shares.map((share, bin) => ({ step, begin, end, share, low: edges[bin], high: edges[bin + 1] })));
    const lines = [15, 50, 85].map((percentile, which) =>
      Plot.lineY(columns, {
        x: "step", y: (d) => d.percentiles[which], stroke: "currentColor", clip: true,
        strokeWidth: percentile === 50 ? 1.8 : 1.2, strokeDasharray: percentile === 50 ? "none" : "4 3",
      }));
    const pointed = Plot.pointer({ x: (d) => (d.begin + d.end) / 2, y: (d) => (d.low + d.high) / 2, maxRadius: 30 });
    return Plot.plot({
      width, height: Math.max(260, Math.min(340, 0.62 * width)), marginLeft: 52, marginBottom: 40, marginTop: 28, marginRight: 16,
      ariaLabel: `distribution of the activations by training step, ${norm}`,
      style: { background: "transparent", fontSize: "13px" },
      x: { label: axis.step, labelArrow: "none", labelAnchor: "center", ticks: Math.max(3, width / 110) },
      y: { label: "value", labelArrow: "none", domain: [edges[0], edges[edges.length - 1]], ticks: 6, tickFormat: short },
      marks: [
        Plot.rect(cells, {
          x1: "begin", x2: "end", y1: "low", y2: "high", fill: colour(index), fillOpacity: (d) => Math.min(1, d.share / most),
          shapeRendering: "crispEdges",
        }),
        ...lines,
        Plot.frame({ stroke: "var(--rule)" }),
        Plot.tip(cells, {
          ...pointed,
          stroke: "var(--rule)",
          lineHeight: 1.3,
          title: (d) => [
            `step ${d.step}`, `${short(d.low)} to ${short(d.high)}`, `${(100 * d.share).toFixed(1)} % of the values`,
          ].join("\n"),
        }),
      ],
    });
  }

  function draw(figure) {
    const width = Math.floor(figure.clientWidth);
    if (width === 0 || figure.dataset.width === String(width)) return;
    figure.dataset.width = width;
    const { chart, curve: name, x, norm } = figure.dataset;
    figure.querySelectorAll(":scope > svg").forEach((old) => old.remove());
    figure.append(chart === "curve" ? curve(name, x, width) : activations(norm, width));
  }

  const resized = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target)));
  document.querySelectorAll(".chart").forEach((figure) => {
    draw(figure);
    resized.observe(figure);
  });
  document.querySelectorAll(".key").forEach((place) => place.append(key(Number(place.dataset.series))));
  document.querySelectorAll(".legend").forEach((legend) => {
    charts.norms.forEach((norm, index) => {
      const entry = document.createElement("span");
      entry.append(key(index), norm);
      legend.append(entry);
    });
  });
})();
