"use strict";
(() => {
  const { layers, batch_size: batchSize } = page.charts;
  const { short } = page;
  let chosen = page.charts.chosen;
  const colour = { error: "var(--error)", warning: "var(--warning)", note: "var(--note)", ok: "var(--ok)" };
  const height = (width) => Math.max(240, Math.min(320, 0.6 * width));
  const background = { fill: "var(--ink)", stroke: "var(--page)", strokeWidth: 4 };

  const channels = (number) => `${number} channel${number === 1 ? "" : "s"}`;

  function nothing(text) {
    const line = document.createElement("p");
    line.className = "none";
    line.textContent = text;
    return line;
  }

  // Through depth: a dot for each layer, and a line through them.
  function depth(width) {
    const found = layers.map((layer, index) => ({ ...layer, index })).filter((layer) => layer.divergence !== null && layer.order !== null);
    found.sort((a, b) => a.order - b.order);
    const floor = 1e-4; // less is nothing, and has no place on a logarithmic axis
    const y = (layer) => Math.max(layer.divergence, floor);
    const domain = [floor, Math.max(1, 1.5 * d3.max(found, y))];
    const here = found.filter((layer) => layer.index === chosen);
    const chart = page.plot({
      width, height: Math.max(220, Math.min(300, 0.35 * width)), ariaLabel: "divergence of each layer by its place in the network",
      x: { label: "layer, in the order of the calls", domain: [-0.5, found.length - 0.5], ticks: d3.ticks(1, found.length, Math.max(3, width / 110)).filter(Number.isInteger).map((n) => n - 1), tickFormat: (n) => String(n + 1) },
      y: { label: "divergence (nats)", type: "log", domain, ticks: page.logTicks(domain) },
      marks: [
        Plot.gridY(page.logTicks(domain), { stroke: "var(--rule)", strokeOpacity: 1 }),
        Plot.lineY(found, { x: (d, i) => i, y, stroke: "var(--soft)", strokeWidth: 1 }),
        Plot.dot(found, { x: (d, i) => i, y, r: Math.min(4.5, Math.max(2, width / found.length / 2)), fill: (d) => colour[d.health] }),
        Plot.dot(here, { x: (d) => found.indexOf(d), y, r: 8, stroke: "var(--ink)", strokeWidth: 2 }),
        page.tip(found, Plot.pointerX({
          x: (d, i) => i, y, title: (d) => [
            d.path, `divergence ${short(d.divergence)} nats`, `running mean off by ${short(d.shift)}σ`,
            `running σ off by a factor of ${short(Math.exp(d.log_scale))}`,
          ].join("\n"),
        })),
      ],
    });
    chart.addEventListener("click", () => chart.value && choose(chart.value.index));
    return chart;
  }

  // The law is known, so one measured batch size gives the whole line.
  function noise(width) {
    const measured = layers.filter((layer) => layer.noise !== null);
    const sizes = d3.range(1, 12).map((power) => 2 ** power);
    if (batchSize > sizes[sizes.length - 1]) sizes.push(4 * batchSize);
    const at = (value, size) => value * Math.sqrt(batchSize / size);
    const [low, mid, high] = [d3.min, d3.median, d3.max].map((of) => of(measured, (layer) => layer.noise));
    const layer = layers[chosen];
    const lines = [{ name: "median layer", value: mid, dash: "6 3", width: 1.5 }];
    if (layer.noise !== null) lines.push({ name: layer.path, value: layer.noise, dash: "none", width: 2.5 });
    const aim = 0.1;
    const bottom = Math.max(1e-3, Math.min(0.01, at(low, sizes[sizes.length - 1]))); // less is nothing; of dead layers it is 0
    const domain = [bottom, Math.max(0.5, at(high, 2))];
    const points = lines.flatMap((line) => sizes.map((size) => ({ ...line, size, y: at(line.value, size) })));
    const names = lines.map((line, index) => ({ ...line, size: sizes[0], y: at(line.value, sizes[0]), index }));
    return page.plot({
      width, height: Math.max(240, Math.min(320, 0.4 * width)), ariaLabel: "noise of the batch statistics by batch size",
      x: { label: "samples in a batch", type: "log", base: 2, domain: [2, sizes[sizes.length - 1]], ticks: sizes.filter((size, index) => width > 600 || index % 2 === 0), tickFormat: String },
      y: { label: "noise (σ)", type: "log", domain, ticks: page.logTicks(domain) },
      marks: [
        Plot.gridY(page.logTicks(domain), { stroke: "var(--rule)", strokeOpacity: 1 }),
        Plot.areaY(sizes, { x: (size) => size, y1: (size) => Math.max(bottom, at(low, size)), y2: (size) => Math.max(bottom, at(high, size)), fill: "var(--series-1)", fillOpacity: 0.18, clip: true }),
        Plot.ruleX([batchSize], { stroke: "var(--soft)", strokeDasharray: "2 4" }),
        Plot.ruleY([aim], { stroke: "var(--soft)", strokeDasharray: "2 4" }),
        ...lines.map((line) => Plot.lineY(sizes, {
          x: (size) => size, y: (size) => at(line.value, size), stroke: "var(--series-1)", strokeWidth: line.width, strokeDasharray: line.dash, clip: true,
        })),
        Plot.text([batchSize], { x: (d) => d, text: (d) => `these data: ${d}`, frameAnchor: "top", textAnchor: batchSize > 64 ? "end" : "start", dx: batchSize > 64 ? -6 : 6, dy: 4, ...background }),
        Plot.text([aim], { y: (d) => d, text: () => "0.1σ", frameAnchor: "right", dy: -9, ...background }),
        page.tip(points, Plot.pointer({
          x: "size", y: "y", title: (d) => [
            d.name, `${d.size} samples: ${short(d.y)}σ`, `0.1σ takes ${Math.max(2, Math.ceil(batchSize * (d.value / aim) ** 2))} samples`,
          ].join("\n"),
        })),
      ],
    });
  }

  // Running against population, channel by channel; points on the diagonal fit.
  function against(which, width) {
    const held = layers[chosen].channels;
    if (held === null) return nothing("Not measured for this layer: see what was not checked.");
    const points = held.index.map((channel, i) => ({
      channel, x: held[which][i], y: held[`running_${which}`][i], sigma: Math.sqrt(Math.max(held.var[i] ?? 0, 0)),
    })).filter((point) => point.x !== null && point.y !== null);
    if (points.length === 0) return nothing("No channel of this layer has finite statistics.");
    const values = points.flatMap((point) => [point.x, point.y]);
    const log = which === "var";
    let domain = d3.extent(values);
    if (log) {
      const top = Math.max(domain[1], 1e-30);
      const bottom = d3.min(values.filter((value) => value > 1e-9 * top)) ?? top / 10;
      domain = [bottom / 1.5, top * 1.5];
    } else {
      const margin = 0.06 * (domain[1] - domain[0]) || 0.1 * Math.abs(domain[0]) || 1;
      domain = [domain[0] - margin, domain[1] + margin];
    }
    const inside = (value) => Math.min(Math.max(value, domain[0]), domain[1]); // zeros, on a logarithmic axis
    const many = points.length > 300;
    const ticks = log ? page.logTicks(domain) : undefined;
    const scale = { type: log ? "log" : "linear", domain, tickFormat: short, ...(ticks?.length >= 2 ? { ticks: ticks.length > 8 ? ticks.filter((t, i) => i % Math.ceil(ticks.length / 6) === 0) : ticks } : { ticks: 5 }) };
    const chart = page.plot({
      width, height: height(width), ariaLabel: `running against population ${log ? "variance" : "mean"} of ${layers[chosen].path}`,
      x: { label: `${log ? "variance" : "mean"} of these data`, ...scale },
      y: { label: `running ${log ? "variance" : "mean"}`, ...scale },
      marks: [
        Plot.frame({ stroke: "var(--rule)" }),
        Plot.line([[domain[0], domain[0]], [domain[1], domain[1]]], { stroke: "var(--soft)", strokeDasharray: "4 3" }),
        Plot.dot(points, { x: (d) => inside(d.x), y: (d) => inside(d.y), r: many ? 2.2 : 3.5, fill: "var(--series-1)", fillOpacity: many ? 0.45 : 0.75 }),
        page.tip(points, Plot.pointer({
          x: (d) => inside(d.x), y: (d) => inside(d.y), title: (d) => [
            `channel ${d.channel}`, `these data ${short(d.x)}`, `running ${short(d.y)}`,
            log ? `σ off by a factor of ${d.x > 0 && d.y > 0 ? short(Math.sqrt(d.y / d.x)) : "–"}` : `off by ${d.sigma > 0 ? short((d.y - d.x) / d.sigma) : "–"}σ`,
          ].join("\n"),
        })),
      ],
    });
    if (points.length === held.number) return chart;
    const whole = document.createElement("div");
    const left = held.number - held.index.length;
    const lost = held.index.length - points.length;
    const words = left ? [`The ${held.index.length} of ${held.number} channels that are farthest off.`] : [];
    if (lost) words.push(`Left out: ${channels(lost)} with statistics that are not finite.`);
    whole.append(chart, nothing(words.join(" ")));
    return whole;
  }

  function distribution(which, width) {
    const held = layers[chosen][which];
    if (held === null) return nothing(`This layer has no ${which === "gamma" ? "γ" : "β"}.`);
    if (held.counts.length === 0) return nothing("No value is finite.");
    const step = (held.high - held.low) / held.counts.length;
    const bars = held.counts.map((count, i) => ({ count, x1: held.low + i * step, x2: held.low + (i + 1) * step }));
    const name = which === "gamma" ? "γ" : "β";
    const reach = [Math.min(0, held.low), Math.max(0, held.high)];
    const zero = reach[1] - reach[0] < 4 * (held.high - held.low); // shown where that does not squeeze the bars
    const chart = page.plot({
      width, height: height(width), ariaLabel: `distribution of ${name} in ${layers[chosen].path}`,
      x: { label: name, tickFormat: short, ...(zero ? { domain: reach } : {}) },
      y: { label: "channels", ticks: d3.ticks(0, d3.max(held.counts), 6).filter(Number.isInteger) },
      marks: [
        Plot.rectY(bars, { x1: "x1", x2: "x2", y: "count", fill: "var(--series-1)", insetLeft: 0.5, insetRight: 0.5 }),
        Plot.ruleY([0], { stroke: "var(--soft)" }),
        ...(zero ? [Plot.ruleX([0], { stroke: "var(--soft)", strokeDasharray: "2 4" })] : []),
        page.tip(bars, Plot.pointerX({ x: (d) => (d.x1 + d.x2) / 2, y: "count", title: (d) => `${short(d.x1)} to ${short(d.x2)}\n${channels(d.count)}` })),
      ],
    });
    if (held.not_finite === 0) return chart;
    const whole = document.createElement("div");
    whole.append(chart, nothing(`Left out: ${channels(held.not_finite)} of ${held.number} where it is not finite.`));
    return whole;
  }

  const drawings = {
    depth, noise,
    mean: (width) => against("mean", width), var: (width) => against("var", width),
    gamma: (width) => distribution("gamma", width), beta: (width) => distribution("beta", width),
  };
  const drawAgain = page.draw((figure, width) => drawings[figure.dataset.chart](width));

  // The strip: one tab stop, with arrow keys inside. The facts of the layer under the pointer or the focus are below.
  const boxes = [...document.querySelectorAll(".strip button")];
  const table = document.getElementById("layers");
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const facts = document.getElementById("facts");
  const select = document.getElementById("layer");
  let shown = null;

  function tell(index) {
    if (shown === index) return;
    shown = index;
    const row = table.tBodies[0].rows[index];
    const title = document.createElement("h3");
    title.textContent = row.cells[0].textContent;
    const list = document.createElement("dl");
    [...row.cells].slice(1).forEach((cell, number) => {
      const pair = document.createElement("div");
      const [name, value] = ["dt", "dd"].map((tag) => document.createElement(tag));
      name.textContent = heads[number + 1];
      value.append(...[...cell.childNodes].map((node) => node.cloneNode(true)));
      pair.append(name, value);
      list.append(pair);
    });
    facts.replaceChildren(title, list);
  }

  function choose(index) {
    chosen = index;
    boxes.forEach((box, number) => {
      box.setAttribute("aria-pressed", String(number === index));
      box.tabIndex = number === index ? 0 : -1;
    });
    select.value = String(index);
    tell(index);
    document.querySelectorAll(".chart").forEach(drawAgain);
  }

  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  boxes.forEach((box, index) => {
    box.addEventListener("click", () => choose(index));
    box.addEventListener("focus", () => tell(index));
    box.addEventListener("mouseenter", () => tell(index));
    box.addEventListener("keydown", (event) => {
      const to = event.key in moves ? index + moves[event.key] : { Home: 0, End: boxes.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = Math.min(Math.max(to, 0), boxes.length - 1);
      boxes.forEach((other, number) => { other.tabIndex = number === next ? 0 : -1; });
      boxes[next].focus();
    });
  });
  const strip = document.querySelector(".strip");
  strip.addEventListener("mouseleave", () => tell(strip.contains(document.activeElement) ? boxes.indexOf(document.activeElement) : chosen));
  select.addEventListener("change", () => choose(Number(select.value)));
  tell(chosen);

  // Without access to the clipboard the code is selected, and the keyboard can copy it.
  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) done = "Selected: press Ctrl+C";
    }
    const name = button.dataset.name ??= button.ariaLabel;
    [button.textContent, button.ariaLabel] = [done, done];
    setTimeout(() => { [button.textContent, button.ariaLabel] = ["Copy", name]; }, 2500);
  }
  document.querySelectorAll(".copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  });
})();
