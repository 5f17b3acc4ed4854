// Draws the charts as SVG in the page's own colours, which CSS alone changes in the dark and in print.
(() => {
  "use strict";
  const { recipes, groups, panels } = JSON.parse(document.getElementById("charts").textContent);
  const DASHES = { "-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3" };
  const MARKS = {
    o: "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z", s: "M-3.5-3.5H3.5V3.5H-3.5Z", "^": "M0-4.5L4.5 3.5H-4.5Z",
    D: "M0-5L5 0L0 5L-5 0Z", v: "M0 4.5L4.5-3.5H-4.5Z", P: "M-1.5-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
  };
  const hidden = new Set();
  const drawn = [];
  const pen = document.createElement("canvas").getContext("2d");

  const colour = (recipe) => `var(--series-${recipe})`;
  const known = (value) => value !== null && value !== undefined;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const extent = (values) => [Math.min(...values), Math.max(...values)];

  function html(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function svg(parent, tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function width(text) {
    pen.font = `12px ${getComputedStyle(document.body).getPropertyValue("--plain")}`;
    return pen.measureText(text).width;
  }

  function said(value, digits = 4) {
    if (!known(value)) return "–";
    const size = Math.abs(value);
    const text = size && (size >= 1e5 || size < 1e-4) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
    return text.replace("-", "\u2212");
  }

  // A scale from values to pixels, linear or logarithmic, and its ticks.
  function scale([low, high], [start, end], log, whole) {
    const to = log ? Math.log10 : (value) => value;
    const from = log ? (value) => 10 ** value : (value) => value;
    const [a, b] = [to(low), to(high)];
    const at = (value) => start + ((to(value) - a) / (b - a || 1)) * (end - start);
    const back = (pixel) => from(a + ((pixel - start) / (end - start)) * (b - a));
    let ticks = [];
    const room = Math.max(2, Math.abs(end - start) / (whole === undefined ? 45 : 70));
    if (log && b - a > 0.7) {
      for (const steps of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 5]]) {
        const finer = [];
        for (let power = Math.floor(a); power <= b; power++) steps.forEach((step) => finer.push(step * 10 ** power));
        const inside = finer.filter((tick) => tick >= low && tick <= high);
        if (inside.length <= room || !ticks.length) ticks = inside;
      }
      ticks = ticks.filter((_, index) => index % Math.ceil(ticks.length / room) === 0);
    } else {
      const raw = (high - low) / room;
      const power = 10 ** Math.floor(Math.log10(raw || 1));
      let step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
      if (whole) step = Math.max(1, Math.round(step));
      for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) {
        ticks.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
      }
    }
    return { at, back, ticks };
  }

  class Chart {
    constructor(place, group) {
      this.panel = panels[place];
      this.group = group;
      this.root = document.getElementById(place);
      this.views = this.panel.close ? { "end of training": this.panel.close, "whole training": null } : {};
      this.view = this.panel.close || null;
      if (this.panel.lines.length) this.addLegend();
      if (this.panel.close) this.addViews();
      this.plot = html("div", { class: "plot" });
      this.tip = html("div", { class: "tip", hidden: "" });
      this.root.append(this.plot);
      this.addPointer();
      this.draw();
      new ResizeObserver(() => this.draw()).observe(this.root);
    }

    addLegend() {
      if (this.group.length > 1 && this.group[0] !== this.root.id) return;
      const bar = html("div", { class: "legend" });
      for (const recipe of new Set(this.panel.lines.map((line) => line.recipe))) {
        const name = recipes[recipe].name;
        const button = html("button", { type: "button", "aria-pressed": "true", "data-recipe": recipe });
        const sign = svg(button, "svg", { viewBox: "0 0 30 12", width: 30, height: 12, "aria-hidden": "true" });
        this.line(sign, "M1 6H29", recipe, DASHES[recipes[recipe].line], 2);
        this.mark(sign, 15, 6, recipe, 0.8);
        button.append(name);
        button.addEventListener("click", () => {
          hidden.has(recipe) ? hidden.delete(recipe) : hidden.add(recipe);
          document.querySelectorAll(`.legend [data-recipe="${recipe}"]`).forEach((each) =>
            each.setAttribute("aria-pressed", String(!hidden.has(recipe))));
          drawn.forEach((chart) => chart.draw(true));
        });
        bar.append(button);
      }
      const parent = this.root.closest(".row");
      parent ? parent.before(bar) : this.root.append(bar);
    }

    addViews() {
      this.bar = html("div", { class: "views" });
      for (const [label, view] of Object.entries(this.views)) {
        const button = html("button", { type: "button" }, label);
        button.addEventListener("click", () => this.look(view));
        this.bar.append(button);
      }
      this.root.append(this.bar);
    }

    look(view) {
      this.view = view;
      this.draw(true);
    }

    lines() {
      return this.panel.lines.filter((line) => !hidden.has(line.recipe));
    }

    // Whether a value can be drawn.
    fits(value) {
      const { log, limit } = this.panel;
      return known(value) && (!log || value > 0) && (!known(limit) || value <= limit);
    }

    whole() {
      const { log, ticks } = this.panel;
      const together = this.group.map((place) => panels[place].lines).flat().filter((line) => !hidden.has(line.recipe));
      const xs = this.lines().flatMap((line) => line.x);
      const ys = together.flatMap((line) => [...line.y, ...line.low, ...line.high]).filter((value) => this.fits(value));
      if (!xs.length || !ys.length) return null;
      let x = extent(ticks.length ? ticks : xs);
      const over = (x[1] - x[0]) * 0.02 || 0.5;
      x = ticks.length ? [x[0] / 1.25, x[1] * 1.25] : [x[0] - over, x[1] + over];
      let [low, high] = extent(ys);
      if (log) {
        const room = Math.max(high / low, 1.2) ** 0.06;
        return [x, [low / room, high * room]];
      }
      const room = (high - low) * 0.05 || 0.01;
      return [x, [low - room, high + room]];
    }

    draw(again) {
      const full = this.fixed || this.plot.clientWidth;
      if (!full || (full === this.width && !again)) return;
      this.width = full;
      this.plot.replaceChildren();
      this.tip.hidden = true;
      this.panel.rows.length || !this.panel.lines.length ? this.drawRows() : this.drawLines();
      this.plot.append(this.tip);
      this.bar?.childNodes.forEach((button) =>
        button.setAttribute("aria-pressed", String(this.views[button.textContent] === this.view)));
    }

    frame(height, left, right, top, bottom) {
      this.box = { left, right: this.width - right, top, bottom: height - bottom };
      const root = svg(this.plot, "svg", { viewBox: `0 0 ${this.width} ${height}`, class: "drawing" });
      const clip = svg(svg(root, "clipPath", { id: `clip-${this.root.id}` }), "rect", {});
      const size = { x: left, y: top - 6, width: Math.max(0, this.width - left - right + 6), height: height - top - bottom + 7 };
      for (const [name, value] of Object.entries(size)) clip.setAttribute(name, value);
      this.svg = root;
      return root;
    }

    axis(root, xs, labels, title) {
      const { left, right, bottom, top } = this.box;
      let free = -Infinity;
      for (const tick of xs.ticks) {
        const [x, text] = [xs.at(tick), labels(tick)];
        svg(root, "line", { x1: x, x2: x, y1: this.panel.rows.length ? top - 4 : bottom, y2: bottom + 4, class: "grid" });
        const half = width(text) / 2;
        const place = clamp(x, half, this.width - half);
        if (place - half < free) continue;
        free = place + half + 8;
        svg(root, "text", { x: place, y: bottom + 18, "text-anchor": "middle" }, text);
      }
      const lines = this.wrapped(title, this.width - 8);
      const half = Math.max(...lines.map(width)) / 2;
      const x = clamp((left + right) / 2, half, this.width - half);
      lines.forEach((line, row) => svg(root, "text", { x, y: bottom + 36 + 15 * row, "text-anchor": "middle", class: "title" }, line));
    }

    wrapped(text, room) {
      const lines = [""];
      for (const word of text.split(" ")) {
        const longer = `${lines.at(-1)} ${word}`.trim();
        width(longer) <= room || !lines.at(-1) ? (lines[lines.length - 1] = longer) : lines.push(word);
      }
      return lines;
    }

    drawLines() {
      const { x, y, log, target, ticks, note, title } = this.panel;
      const range = this.view || this.whole();
      const height = this.group.length > 1 ? 290 : this.width < 500 ? 300 : 380;
      const heads = this.wrapped(this.group.length > 1 ? title : y, this.width - 8);
      const top = 14 + 15 * heads.length;
      if (!range) return this.nothing(height);
      const up = scale(range[1], [height - 46, top], log);
      const left = Math.max(...up.ticks.map((tick) => width(said(tick)))) + 12;
      const root = this.frame(height, left, 12, top, 46);
      heads.forEach((line, row) => svg(root, "text", { x: 0, y: 12 + 15 * row, class: "title" }, line));
      const along = scale(range[0], [left, this.width - 12], ticks.length > 0, x === "epoch");
      if (ticks.length) along.ticks = ticks;
      this.xs = along;
      this.ys = up;
      for (const tick of up.ticks) {
        svg(root, "line", { x1: left, x2: this.width - 12, y1: up.at(tick), y2: up.at(tick), class: "grid" });
        svg(root, "text", { x: left - 7, y: up.at(tick) + 4, "text-anchor": "end" }, said(tick));
      }
      this.axis(root, along, (tick) => said(tick), x);
      const inside = svg(root, "g", { "clip-path": `url(#clip-${this.root.id})` });
      if (known(target)) {
        svg(inside, "line", { x1: left, x2: this.width - 12, y1: up.at(target), y2: up.at(target), class: "target" });
      }
      this.beyond = [];
      this.lines().forEach((line) => this.drawLine(inside, line, range));
      const told = [note, this.beyond.length ? `outside this view: ${[...new Set(this.beyond)].join(", ")}` : ""];
      told.filter(Boolean).forEach((text, row) => this.wrapped(text, this.width - left - 24).forEach((part, k) =>
        svg(root, "text", { x: left + 6, y: top + 12 + 15 * (row + k), class: "note" }, part)));
      this.rule = svg(root, "line", { y1: top, y2: height - 46, class: "rule", visibility: "hidden" });
      this.dots = svg(root, "g", {});
      this.marquee = svg(root, "rect", { class: "marquee", visibility: "hidden" });
    }

    drawLine(root, line, [across, upright]) {
      const { at } = this.xs;
      const up = (value) => clamp(this.ys.at(value), -2000, 4000);
      const lost = line.kind === "lost";
      if (line.low.length) {
        const over = line.x.map((x, k) => [at(x), up(line.high[k])]);
        const under = line.x.map((x, k) => [at(x), up(line.low[k])]).reverse();
        svg(root, "path", { d: `M${[...over, ...under].join("L")}Z`, fill: colour(line.recipe), opacity: recipes.length > 6 ? 0.07 : 0.16 });
      }
      let path = "";
      let pen = "M";
      const points = [];
      line.x.forEach((x, k) => {
        if (!this.fits(line.y[k])) return void (pen = "M");
        path += `${pen}${at(x).toFixed(1)} ${up(line.y[k]).toFixed(1)}`;
        pen = "L";
        points.push([x, line.y[k]]);
      });
      if (path) {
        const dash = line.kind === "mean" ? DASHES[recipes[line.recipe].line] : "1.5 2.5";
        this.line(root, path, line.recipe, dash, line.kind === "mean" ? 2 : 1.3);
      }
      const seen = ([x, y]) => x >= across[0] && x <= across[1] && y >= upright[0] && y <= upright[1];
      if (points.length && !points.some(seen) && line.kind === "mean") this.beyond.push(recipes[line.recipe].name);
      if (lost && points.length) {
        const [x, y] = points.at(-1);
        svg(root, "text", { x: at(x), y: up(y) + 5, "text-anchor": "middle", fill: colour(line.recipe), class: "lost" }, "×");
      } else if (this.panel.ticks.length) {
        line.x.forEach((x, k) => {
          if (this.fits(line.y[k])) this.mark(root, at(x), up(line.y[k]), line.recipe, x === line.chosen ? 1.4 : 1, x !== line.chosen);
          else svg(root, "text", { x: at(x), y: this.box.bottom - 4, "text-anchor": "middle", fill: colour(line.recipe) }, "×");
        });
      } else if (line.kind === "mean") {
        const every = Math.ceil(points.length / 20);
        points.forEach(([x, y], k) => k % every === line.recipe % every && this.mark(root, at(x), up(y), line.recipe, 0.8));
      }
    }

    line(root, d, recipe, dash, thick) {
      svg(root, "path", { d, fill: "none", stroke: colour(recipe), "stroke-width": thick, "stroke-dasharray": dash });
    }

    mark(root, x, y, recipe, size, hollow) {
      svg(root, "path", {
        d: MARKS[recipes[recipe].marker], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${size})`,
        fill: hollow ? "var(--ground)" : colour(recipe), stroke: colour(recipe), "stroke-width": hollow ? 1.5 : 0,
      });
    }

    drawRows() {
      const { rows, bars, x } = this.panel;
      if (!rows.length) return this.nothing(120);
      const names = rows.map((row) => recipes[row.recipe].name);
      const longest = Math.max(...names.map(width));
      const above = longest > this.width * 0.3;
      const step = (bars ? 34 : 46) + (above ? 16 : 0);
      const left = above ? 8 : longest + 14;
      const right = bars ? Math.max(...rows.map((row) => width(row.text))) + 14 : 14;
      const foot = 30 + 15 * this.wrapped(x, this.width - 8).length;
      const height = 12 + step * rows.length + foot;
      const root = this.frame(height, left, right, 12, foot);
      const values = rows.flatMap((row) => [row.value, row.low, row.high, ...row.each, 0]).filter(known);
      let [low, high] = extent(values);
      if (!bars) [low, high] = [low - (high - low) * 0.05 - 1e-9, high + (high - low) * 0.05 + 1e-9];
      this.ys = null;
      this.xs = scale(this.view ? this.view[0] : [low, high || 1], [left, this.width - right], false, false);
      this.axis(root, this.xs, (tick) => said(tick), x);
      const { at } = this.xs;
      const inside = svg(root, "g", { "clip-path": `url(#clip-${this.root.id})` });
      if (!bars) svg(inside, "line", { x1: at(0), x2: at(0), y1: 8, y2: this.box.bottom, class: "zero" });
      rows.forEach((row, k) => {
        const y = 12 + step * k + step / 2 + (above ? 8 : 0);
        const label = { x: above ? 0 : left - 8, y: above ? y - 16 : y + 4, "text-anchor": above ? "start" : "end" };
        svg(root, "text", { ...label, "data-full": names[k] }, this.cut(names[k], above ? this.width : left));
        this.drawRow(inside, root, row, y, bars);
      });
      this.rows = rows.map((row, k) => ({ row, y: 12 + step * k + step / 2 }));
      this.marquee = svg(root, "rect", { class: "marquee", visibility: "hidden" });
    }

    drawRow(inside, root, row, y, bars) {
      const { at } = this.xs;
      const paint = colour(row.recipe);
      const ends = known(row.low) && known(row.high) ? { x1: at(row.low), x2: at(row.high), y1: y, y2: y } : null;
      if (bars && known(row.value)) {
        svg(inside, "rect", { x: at(0), y: y - 10, width: Math.max(0, at(row.value) - at(0)), height: 20, fill: paint });
        if (ends) svg(inside, "line", { ...ends, class: "whisker" });
        svg(root, "text", { x: clamp(at(Math.max(row.value, row.high ?? 0)), 0, this.box.right) + 6, y: y + 4 }, row.text);
      } else if (!bars && known(row.value)) {
        if (ends) svg(inside, "line", { ...ends, stroke: paint, "stroke-width": 2.5 });
        this.mark(inside, at(row.value), y, row.recipe, 1.3);
        row.each.forEach((value) => svg(inside, "circle", { cx: at(value), cy: y + 13, r: 3, fill: paint, opacity: 0.6 }));
      } else {
        svg(root, "text", { x: at(0) + 6, y: y + 4, class: "note" }, bars ? "not recorded" : "no score");
      }
    }

    cut(text, room) {
      if (width(text) <= room) return text;
      let kept = text;
      while (kept && width(`${kept}…`) > room) kept = kept.slice(0, -1);
      return `${kept}…`;
    }

    nothing(height) {
      this.xs = this.ys = null;
      this.rows = [];
      svg(this.frame(height, 0, 0, 0, 0), "text", { x: this.width / 2, y: height / 2, "text-anchor": "middle", class: "note" }, "nothing recorded");
    }

    addPointer() {
      const spot = (event) => {
        const place = this.plot.getBoundingClientRect();
        const shrink = this.width / (place.width || this.width);
        return [(event.clientX - place.left) * shrink, (event.clientY - place.top) * shrink];
      };
      this.plot.addEventListener("pointermove", (event) => this.moved(...spot(event)));
      this.plot.addEventListener("pointerleave", () => this.leave());
      this.plot.addEventListener("pointerdown", (event) => {
        this.moved(...spot(event));
        // On a touch screen a drag scrolls the page.
        if (event.pointerType === "touch" || event.button || !this.xs) return;
        this.from = spot(event);
        event.preventDefault();
      });
      addEventListener("pointerup", (event) => this.from && this.zoom(this.from, spot(event)));
      this.plot.addEventListener("dblclick", () => this.look(null));
    }

    leave() {
      this.tip.hidden = true;
      this.rule?.setAttribute("visibility", "hidden");
      this.dots?.replaceChildren();
    }

    area([x0, y0], [x1, y1]) {
      const { left, right, top, bottom } = this.box;
      const [a, b] = extent([clamp(x0, left, right), clamp(x1, left, right)]);
      const [c, d] = extent([clamp(y0, top, bottom), clamp(y1, top, bottom)]);
      // A flat drag zooms into one axis.
      return [b - a < 12 ? [left, right] : [a, b], d - c < 12 || !this.ys ? [top, bottom] : [c, d], b - a < 12 && (d - c < 12 || !this.ys)];
    }

    zoom(from, to) {
      this.from = null;
      this.marquee.setAttribute("visibility", "hidden");
      const [[a, b], [c, d], click] = this.area(from, to);
      if (!click) this.look([[this.xs.back(a), this.xs.back(b)], this.ys ? [this.ys.back(d), this.ys.back(c)] : null]);
    }

    moved(x, y) {
      if (!this.xs) return;
      if (this.from) {
        const [[a, b], [c, d], click] = this.area(this.from, [x, y]);
        const size = { x: a, y: c, width: b - a, height: d - c, visibility: click ? "hidden" : "visible" };
        for (const [name, value] of Object.entries(size)) this.marquee.setAttribute(name, value);
        return;
      }
      this.ys ? this.tellLines(x, y) : this.tellRow(x, y);
    }

    tellLines(x, y) {
      const shown = this.lines().filter((line) => line.x.length);
      const inside = (value) => this.xs.at(value) >= this.box.left - 1 && this.xs.at(value) <= this.box.right + 1;
      const places = shown.flatMap((line) => line.x).filter(inside);
      if (!places.length) return;
      const nearest = (values) => values.reduce((best, value) => (Math.abs(this.xs.at(value) - x) < Math.abs(this.xs.at(best) - x) ? value : best));
      const place = nearest(places);
      const apart = shown.some((line) => line.epochs.length);
      const rows = [];
      this.dots.replaceChildren();
      for (const line of shown) {
        const k = line.x.indexOf(apart ? nearest(line.x) : place);
        if (k < 0) continue;
        const value = line.y[k];
        let text = `${recipes[line.recipe].name}${line.kind === "raw" ? ", raw" : ""}: ${known(value) ? said(value) : "diverged"}`;
        if (line.low.length) text += ` (${said(line.low[k])} to ${said(line.high[k])})`;
        if (line.kind === "lost") text += ` (seed ${line.seed}, diverged)`;
        if (apart) text += ` after ${said(line.x[k], 3)} s, epoch ${line.epochs[k]}`;
        if (line.x[k] === line.chosen) text += ", kept";
        rows.push([value, line.recipe, text]);
        const up = known(value) && this.fits(value) ? this.ys.at(value) : NaN;
        if (up >= this.box.top - 6 && up <= this.box.bottom + 6) {
          svg(this.dots, "circle", { cx: this.xs.at(line.x[k]), cy: up, r: 5, fill: "none", stroke: colour(line.recipe), "stroke-width": 2 });
        }
      }
      rows.sort((a, b) => (b[0] ?? -Infinity) - (a[0] ?? -Infinity));
      this.rule.setAttribute("x1", this.xs.at(place));
      this.rule.setAttribute("x2", this.xs.at(place));
      this.rule.setAttribute("visibility", apart ? "hidden" : "visible");
      this.tell(x, y, apart ? "" : `${this.panel.x} ${said(place)}`, rows);
    }

    tellRow(x, y) {
      if (!this.rows.length) return;
      const { row } = this.rows.reduce((best, each) => (Math.abs(each.y - y) < Math.abs(best.y - y) ? each : best));
      const rows = [[0, row.recipe, `${recipes[row.recipe].name}: ${said(row.value)}`]];
      if (known(row.low)) rows.push([0, null, `interval ${said(row.low)} to ${said(row.high)}`]);
      if (row.each.length) rows.push([0, null, `seeds: ${row.each.map((value) => said(value)).join(", ")}`]);
      this.tell(x, y, "", rows);
    }

    tell(x, y, head, rows) {
      this.tip.replaceChildren();
      if (head) this.tip.append(html("strong", {}, head));
      for (const [, recipe, text] of rows) {
        const line = html("div", {}, text);
        if (recipe !== null) {
          const swatch = html("span", { class: "swatch" });
          swatch.style.background = colour(recipe);
          line.prepend(swatch);
        }
        this.tip.append(line);
      }
      this.tip.hidden = false;
      const room = this.plot.clientWidth;
      const shrink = room / this.width;
      const wide = this.tip.offsetWidth;
      const beside = x * shrink + 16 + wide > room ? x * shrink - 16 - wide : x * shrink + 16;
      this.tip.style.left = `${clamp(beside, 0, Math.max(0, room - wide))}px`;
      this.tip.style.top = `${clamp(y * shrink - this.tip.offsetHeight - 10, 0, 400)}px`;
    }
  }

  for (const group of groups) for (const place of group) drawn.push(new Chart(place, group));
  // 660 pixels fill the text width of A4 and of letter paper.
  addEventListener("beforeprint", () => drawn.forEach((chart) => {
    const row = chart.root.closest(".row");
    chart.fixed = row ? 660 / (row.children.length === 2 ? 2.1 : 3.2) : 660;
    chart.draw(true);
  }));
  addEventListener("afterprint", () => drawn.forEach((chart) => {
    chart.fixed = 0;
    chart.draw(true);
  }));
})();
