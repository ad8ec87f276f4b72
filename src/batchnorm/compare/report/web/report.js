"use strict";
(() => {
  const { charts, short, logTicks } = page;
  const { labels } = charts;
  const dashes = ["6 3", "none", "2 2", "9 3 2 3", "4 2", "12 4", "1 4"];
  const colour = (index) => `var(--series-${index % 7})`;
  const dash = (index) => dashes[(index + Math.floor(index / 7)) % dashes.length];
  const axis = { step: "training step", seconds: "training time (s)" };
  const chosen = new Set(d3.range(charts.drawn));
  const domain = ({ domains }) => domains[[...chosen].some((index) => index >= charts.drawn) ? 1 : 0];
  // The chosen series of a chart, each with its index.
  const series = (chart) => d3.sort(chosen).map((index) => [index, chart.series[index]]);

  function key(index) {
    const sample = document.createElement("span");
    sample.innerHTML = `<svg width="26" height="6" aria-hidden="true"><line x1="0" y1="3" x2="26" y2="3"
      stroke="${colour(index)}" stroke-width="3" stroke-dasharray="${dash(index)}"/></svg>`;
    return sample.firstChild;
  }

  // The parts that all charts of curves share: grid lines, axes and their ends.
  function frame(width, chart, x, ends, marks, options) {
    const [low, high] = ends;
    const ticks = chart.log ? logTicks(ends) : d3.ticks(low, high, 6);
    return page.plot({
      width, height: Math.max(240, Math.min(320, 0.6 * width)),
      ariaLabel: `${chart.label} by ${axis[x]}`,
      x: { label: axis[x], domain: [0, options.end || 1] },
      y: { label: chart.label, domain: ends, ticks, type: chart.log ? "log" : "linear" },
      marks: [Plot.gridY(ticks, { stroke: "var(--rule)", strokeOpacity: 1 }), Plot.ruleY([low], { stroke: "var(--soft)" }), ...marks],
    });
  }

  function curve({ curve: name, x }, width) {
    const chart = charts.curves[name];
    const ends = domain(chart);
    const lines = series(chart).map(([index, of]) => [index, of.map(([step, seconds, mid, low, high, seeds]) =>
      ({ step, seconds, mid, low, high, seeds, index }))]);
    const points = lines.flatMap(([, of]) => of);
    const inside = points.filter(({ mid }) => mid >= ends[0] && mid <= ends[1]);
    const above = (value) => (chart.log ? Math.max(value, ends[0]) : value); // a logarithmic axis cannot show 0
    const marks = name === "accuracy" ? [Plot.ruleY([charts.target], { stroke: "var(--soft)", strokeDasharray: "2 4" })] : [];
    lines.forEach(([index, of]) => {
      marks.push(Plot.areaY(of, {
        x, y1: (d) => above(d.low), y2: (d) => above(d.high), fill: colour(index), fillOpacity: lines.length > 4 ? 0.07 : 0.22, clip: true,
      }));
      marks.push(Plot.lineY(of, { x, y: (d) => above(d.mid), stroke: colour(index), strokeWidth: 2, strokeDasharray: dash(index), clip: true }));
    });
    if (name === "accuracy") {
      marks.push(Plot.text([charts.target], {
        y: (d) => d, text: (d) => `target ${short(d)} %`, frameAnchor: "right", dy: 9, fill: "var(--soft)",
        stroke: "var(--page)", strokeWidth: 4,
      }));
    }
    const pointed = Plot.pointer({ x, y: "mid", maxRadius: 60 });
    marks.push(Plot.dot(inside, { ...pointed, r: 4, fill: (d) => colour(d.index) }));
    marks.push(page.tip(inside, {
      ...pointed,
      title: (d) => [
        labels[d.index], `step ${d.step}, ${short(d.seconds)} s`, `${chart.label}: ${short(d.mid)}`,
        d.seeds > 1 ? `${short(d.low)} to ${short(d.high)} over ${d.seeds} seeds` : "1 seed",
      ].join("\n"),
    }));
    return frame(width, chart, x, ends, marks, { end: d3.max(points, (d) => d[x]) });
  }

  function percentiles({ where }, width) {
    const chart = charts.percentiles[where];
    const ends = domain(chart);
    const lines = series(chart).map(([index, of]) => [index, of.map(([step, ...values]) => ({ step, values, index }))]);
    const points = lines.flatMap(([, of]) => of);
    const marks = lines.flatMap(([index, of]) => [0, 2, 1].map((which) => Plot.lineY(of, {
      x: "step", y: (d) => d.values[which], stroke: colour(index), clip: true,
      strokeWidth: which === 1 ? 2.4 : 1.1, strokeDasharray: dash(index),
    })));
    const pointed = Plot.pointer({ x: "step", y: (d) => d.values[1], maxRadius: 60 });
    const inside = points.filter(({ values }) => values[1] >= ends[0] && values[1] <= ends[1]);
    marks.push(Plot.dot(inside, { ...pointed, r: 4, fill: (d) => colour(d.index) }));
    marks.push(page.tip(inside, {
      ...pointed,
      title: (d) => [labels[d.index], `step ${d.step}`, ...[15, 50, 85].map((p, which) => `${p} %: ${short(d.values[which])}`)].join("\n"),
    }));
    return frame(width, chart, "step", ends, marks, { end: d3.max(points, (d) => d.step) });
  }

  function activations({ label }, width) {
    const { edges, most, panels } = charts.activations;
    const index = labels.indexOf(label);
    const columns = panels[label];
    const cells = columns.flatMap(({ step, begin, end, shares }) =>
      shares.map((share, bin) => ({ step, begin, end, share, low: edges[bin], high: edges[bin + 1] })).filter(({ share }) => share > 0));
    const lines = [15, 50, 85].map((percentile, which) =>
      Plot.lineY(columns, {
        x: "step", y: (d) => d.percentiles[which], stroke: "currentColor", clip: true,
        strokeWidth: percentile === 50 ? 1.8 : 1.2, strokeDasharray: percentile === 50 ? "none" : "4 3",
      }));
    const pointed = Plot.pointer({ x: (d) => (d.begin + d.end) / 2, y: (d) => (d.low + d.high) / 2, maxRadius: 30 });
    return page.plot({
      width, height: Math.max(260, Math.min(340, 0.62 * width)),
      ariaLabel: `distribution of the activations by training step, ${label}`,
      x: { label: axis.step },
      y: { label: "value", domain: [edges[0], edges[edges.length - 1]], ticks: 6 },
      marks: [
        Plot.rect(cells, {
          x1: "begin", x2: "end", y1: "low", y2: "high", fill: colour(index), fillOpacity: (d) => Math.min(1, d.share / most),
          shapeRendering: "crispEdges",
        }),
        ...lines,
        Plot.frame({ stroke: "var(--rule)" }),
        page.tip(cells, {
          ...pointed,
          title: (d) => [
            `step ${d.step}`, `${short(d.low)} to ${short(d.high)}`, `${(100 * d.share).toFixed(1)} % of the values`,
          ].join("\n"),
        }),
      ],
    });
  }

  function grid({ panel }, width) {
    const { x, y, title, rows, columns, squares } = charts.grid[panel];
    const accuracies = charts.grid.flatMap((each) => each.squares.map((d) => d.accuracy)).filter((value) => value !== null);
    const [low, high] = d3.extent(accuracies.length ? accuracies : [0, 1]);
    const text = (d) => (d.accuracy === null ? "diverged" : (100 * d.accuracy).toFixed(1));
    const place = { x: "column", y: "row" };
    const colours = d3.scaleSequential([low, Math.max(high, low + 1e-6)], d3.interpolateCividis);
    return page.plot({
      width, height: 34 * rows.length + 90,
      marginLeft: Math.min(0.4 * width, 24 + 7.2 * d3.max(rows, (row) => row.length)),
      ariaLabel: `final test accuracy by ${x}${y ? ` and ${y}` : ""}${title ? `, ${title}` : ""}`,
      x: { type: "band", domain: columns, label: x, ticks: columns },
      y: { type: "band", domain: rows, label: y || null, labelAnchor: "top", ticks: rows, tickFormat: (row) => row },
      marks: [
        Plot.cell(squares, {
          ...place, inset: 1.5, rx: 3, fill: (d) => (d.accuracy === null ? "var(--panel)" : colours(d.accuracy)),
          stroke: (d) => (d.diverged ? "#d1242f" : "none"), strokeWidth: 2.5,
        }),
        Plot.text(squares, {
          ...place, text, fill: (d) => (d.accuracy === null ? "var(--ink)" : d.accuracy < (low + high) / 2 ? "#ffffff" : "#000000"),
        }),
        page.tip(squares, {
          ...Plot.pointer(place),
          title: (d) => [
            d.label, d.accuracy === null ? "no seed reached the end" : `${(100 * d.accuracy).toFixed(2)} % test accuracy`,
            d.diverged ? `diverged in ${d.diverged} of ${d.seeds} seeds` : `${d.seeds} seed${d.seeds === 1 ? "" : "s"}`,
          ].join("\n"),
        }),
      ],
    });
  }

  const drawn = { curve, percentiles, activations, grid };
  const again = page.draw((figure, width) => drawn[figure.dataset.chart](figure.dataset, width));

  document.querySelectorAll(".key").forEach((place) => place.append(key(Number(place.dataset.series))));

  function entry(label, index) {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: chosen.has(index) });
    box.addEventListener("change", () => {
      chosen[box.checked ? "add" : "delete"](index);
      document.querySelectorAll("[data-chart=curve], [data-chart=percentiles]").forEach(again);
    });
    const whole = document.createElement("label");
    whole.append(box, key(index), label);
    return whole;
  }
  document.querySelectorAll(".legend").forEach((legend) => {
    legend.append(...labels.slice(0, charts.drawn).map(entry));
    const others = labels.slice(charts.drawn);
    if (others.length === 0) return;
    const more = document.createElement("details");
    const list = document.createElement("div");
    more.append(Object.assign(document.createElement("summary"), { textContent: `${others.length} more` }), list);
    list.append(...others.map((label, place) => entry(label, charts.drawn + place)));
    legend.append(more);
  });

  // Sort the rows by the column of a button; rows without a value stay at the end.
  document.querySelectorAll(".sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", ({ currentTarget }) => {
      const before = head.getAttribute("aria-sort");
      const order = before === "none" ? currentTarget.dataset.first : before === "ascending" ? "descending" : "ascending";
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => (row.cells[column].dataset.value === "" ? null : Number(row.cells[column].dataset.value));
      const rows = d3.sort(table.tBodies[0].rows, (a, b) =>
        (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b)));
      table.tBodies[0].append(...rows);
    }));
  });
})();
