"use strict";
(() => {
  const { charts, short, logTicks } = page;
  const { labels } = charts;
  const dashes = ["6 3", "none", "2 2", "9 3 2 3", "4 2", "12 4", "1 4"];
  const colour = (index) => `var(--series-${index % 7})`;
  const dash = (index) => dashes[(index + Math.floor(index / 7)) % dashes.length];
  const names = { step: "training step", epochs: "epoch", seconds: "training time (s)" };
  let axis = charts.axis; // of all charts of the training
  const chosen = new Set(d3.range(charts.drawn));
  const domain = ({ domains }) => domains[[...chosen].some((index) => index >= charts.drawn) ? 1 : 0];
  // The chosen series of a chart, as objects; each record begins with step, epochs and seconds.
  const series = (chart, facet, fields) => d3.sort(chosen).map((index) => [index, chart.facets[facet][index].map((values) =>
    ({ index, ...Object.fromEntries(["step", "epochs", "seconds", ...fields].map((field, place) => [field, values[place]])) }))]);
  // The end of the horizontal axis. Charts of several batch sizes share it, except by step, of which they have different numbers.
  const end = (chart, facet) => d3.max(axis === "step" ? [chart.facets[facet]] : chart.facets, (lines) =>
    d3.max(chosen, (index) => lines[index].at(-1)?.[Object.keys(names).indexOf(axis)]));
  const when = (d) => `step ${d.step}, epoch ${short(d.epochs)}, ${short(d.seconds)} s`;

  function key(index) {
    const sample = document.createElement("span");
    sample.innerHTML = `<svg width="26" height="6" aria-hidden="true"><line x1="0" y1="3" x2="26" y2="3"
      stroke="${colour(index)}" stroke-width="3" stroke-dasharray="${dash(index)}"/></svg>`;
    return sample.firstChild;
  }

  // The parts that all charts of curves share: grid lines, axes and their ends.
  function frame(width, chart, facet, ends, marks) {
    const [low, high] = ends;
    const ticks = chart.log ? logTicks(ends) : d3.ticks(low, high, 6);
    const title = charts.facets[facet];
    return page.plot({
      width, height: Math.max(240, Math.min(320, 0.6 * width)),
      ariaLabel: `${chart.label} by ${names[axis]}${title ? `, ${title}` : ""}`,
      x: { label: names[axis], domain: [0, end(chart, facet) || 1] },
      y: { label: chart.label, domain: ends, ticks, type: chart.log ? "log" : "linear" },
      marks: [Plot.gridY(ticks, { stroke: "var(--rule)", strokeOpacity: 1 }), Plot.ruleY([low], { stroke: "var(--soft)" }), ...marks],
    });
  }

  function curve({ name, facet }, width) {
    const chart = charts.curves[name];
    const ends = domain(chart);
    const lines = series(chart, facet, ["mid", "low", "high", "seeds"]);
    const inside = lines.flatMap(([, of]) => of).filter(({ mid }) => mid >= ends[0] && mid <= ends[1]);
    const above = (value) => (chart.log ? Math.max(value, ends[0]) : value); // a logarithmic axis cannot show 0
    const marks = name === "accuracy" ? [Plot.ruleY([charts.target], { stroke: "var(--soft)", strokeDasharray: "2 4" })] : [];
    lines.forEach(([index, of]) => {
      marks.push(Plot.areaY(of, {
        x: axis, y1: (d) => above(d.low), y2: (d) => above(d.high), fill: colour(index), fillOpacity: lines.length > 4 ? 0.07 : 0.22, clip: true,
      }));
      marks.push(Plot.lineY(of, { x: axis, y: (d) => above(d.mid), stroke: colour(index), strokeWidth: 2, strokeDasharray: dash(index), clip: true }));
    });
    if (name === "accuracy") {
      marks.push(Plot.text([charts.target], {
        y: (d) => d, text: (d) => `target ${short(d)} %`, frameAnchor: "right", dy: 9, fill: "var(--soft)",
        stroke: "var(--page)", strokeWidth: 4,
      }));
    }
    const pointed = Plot.pointer({ x: axis, y: "mid", maxRadius: 60 });
    marks.push(Plot.dot(inside, { ...pointed, r: 4, fill: (d) => colour(d.index) }));
    marks.push(page.tip(inside, {
      ...pointed,
      title: (d) => [
        labels[d.index], when(d), `${chart.label}: ${short(d.mid)}`,
        d.seeds > 1 ? `${short(d.low)} to ${short(d.high)} over ${d.seeds} seeds` : "1 seed",
      ].join("\n"),
    }));
    return frame(width, chart, facet, ends, marks);
  }

  function percentiles({ name, facet }, width) {
    const chart = charts.percentiles[name];
    const ends = domain(chart);
    const fields = ["low", "mid", "high"];
    const lines = series(chart, facet, fields);
    const marks = lines.flatMap(([index, of]) => ["low", "high", "mid"].map((field) => Plot.lineY(of, {
      x: axis, y: field, stroke: colour(index), clip: true, strokeWidth: field === "mid" ? 2.4 : 1.1, strokeDasharray: dash(index),
    })));
    const pointed = Plot.pointer({ x: axis, y: "mid", maxRadius: 60 });
    const inside = lines.flatMap(([, of]) => of).filter(({ mid }) => mid >= ends[0] && mid <= ends[1]);
    marks.push(Plot.dot(inside, { ...pointed, r: 4, fill: (d) => colour(d.index) }));
    marks.push(page.tip(inside, {
      ...pointed,
      title: (d) => [labels[d.index], when(d), ...[15, 50, 85].map((p, which) => `${p} %: ${short(d[fields[which]])}`)].join("\n"),
    }));
    return frame(width, chart, facet, ends, marks);
  }

  function activations({ label }, width) {
    const { edges, most, panels } = charts.activations;
    const { series: index, columns, epoch_steps: epoch, step_seconds: seconds } = panels[label];
    const scale = { step: 1, epochs: 1 / epoch, seconds }[axis];
    const cells = columns.flatMap(({ step, begin, end: last, shares }) => shares.map((share, bin) =>
      ({ step, begin: scale * begin, end: scale * last, share, low: edges[bin], high: edges[bin + 1] })).filter(({ share }) => share > 0));
    const lines = [15, 50, 85].map((percentile, which) =>
      Plot.lineY(columns, {
        x: (d) => scale * d.step, y: (d) => d.percentiles[which], stroke: "currentColor", clip: true,
        strokeWidth: percentile === 50 ? 1.8 : 1.2, strokeDasharray: percentile === 50 ? "none" : "4 3",
      }));
    const pointed = Plot.pointer({ x: (d) => (d.begin + d.end) / 2, y: (d) => (d.low + d.high) / 2, maxRadius: 30 });
    return page.plot({
      width, height: Math.max(260, Math.min(340, 0.62 * width)),
      ariaLabel: `distribution of the activations by ${names[axis]}, ${label}`,
      x: { label: names[axis] },
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

  // Distributions after training, as outlines of histograms.
  function site({ site: number, stage }, width) {
    const { ends: [low, high], series: shown, title } = charts.sites[number][stage];
    const bins = shown[0][1].length;
    const bin = (high - low) / bins;
    const points = shown.flatMap(([index, shares]) => shares.map((share, place) => ({ index, share, value: low + (place + 0.5) * bin })));
    const top = d3.max(points, (d) => d.share) || 1;
    // Ticks that are far enough from the next higher one.
    const ticks = [100, 50, 20, 10, 5, 2, 1, 0.5, 0].filter((tick) => tick <= top)
      .filter((tick, place, all) => place === 0 || Math.sqrt(all[place - 1] / top) - Math.sqrt(tick / top) > 0.08);
    const marks = shown.flatMap(([index]) => {
      const of = points.filter((d) => d.index === index);
      return [
        Plot.areaY(of, { x: "value", y: "share", curve: "step", fill: colour(index), fillOpacity: 0.13 }),
        Plot.lineY(of, { x: "value", y: "share", curve: "step", stroke: colour(index), strokeWidth: 1.6, strokeDasharray: dash(index) }),
      ];
    });
    const pointed = Plot.pointer({ x: "value", y: "share", maxRadius: 60 });
    return page.plot({
      width, height: Math.max(200, Math.min(260, 0.62 * width)),
      ariaLabel: `distribution of the values ${title}`,
      x: { label: "value", domain: [low, high] },
      y: { label: "share (%)", type: "sqrt", domain: [0, 1.05 * top], ticks },
      marks: [
        Plot.gridY(ticks, { stroke: "var(--rule)", strokeOpacity: 1 }), Plot.ruleY([0], { stroke: "var(--soft)" }), ...marks,
        page.tip(points, {
          ...pointed,
          title: (d) => [charts.outcomes[d.index], `${short(d.value - bin / 2)} to ${short(d.value + bin / 2)}`, `${short(d.share)} % of the values`].join("\n"),
        }),
      ],
    });
  }

  function grid({ panel }, width) {
    const { x, y, title, rows, columns, squares } = charts.grid[panel];
    const accuracies = charts.grid.flatMap((each) => each.squares.map((d) => d.accuracy)).filter((value) => value !== null);
    const [low, high] = d3.extent(accuracies.length ? accuracies : [0, 1]);
    const text = (d) => d.text || "diverged";
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

  const drawn = { curves: curve, percentiles, activations, site, grid };
  const again = page.draw((figure, width) => drawn[figure.dataset.chart](figure.dataset, width));

  document.querySelectorAll(".key").forEach((place) => place.append(key(Number(place.dataset.series))));

  const redraw = (kinds) => kinds.forEach((kind) => document.querySelectorAll(`[data-chart=${kind}]`).forEach(again));

  document.querySelectorAll(".axes").forEach((choice, number) => choice.querySelectorAll("input").forEach((radio) => {
    Object.assign(radio, { name: `axis-${number}`, checked: radio.value === axis });
    radio.addEventListener("change", () => {
      axis = radio.value;
      document.querySelectorAll(".axes input").forEach((other) => { other.checked = other.value === axis; });
      redraw(["curves", "percentiles", "activations"]);
    });
  }));

  function entry(label, index) {
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: chosen.has(index) });
    box.addEventListener("change", () => {
      chosen[box.checked ? "add" : "delete"](index);
      redraw(["curves", "percentiles"]);
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
