// The atlas: which elements share a statistic, for the methods of the catalogue and for notations that a reader types.
"use strict";
(() => {
  const ROOT = document.getElementById("atlas");
  const DATA = document.getElementById("atlas-data");
  if (!ROOT || !DATA) return;
  const methods = JSON.parse(DATA.textContent);
  const KINDS = { input: "Data", activation: "Activations", weight: "Weights", gradient: "Gradients" };
  const WORDS = { n: "samples", b: "sub-batches", c: "channels", g: "groups", d: "features", o: "output units", i: "input units", t: "time steps", "*": "positions" };
  const SIZES = { n: 4, c: 6, d: 6, o: 4, i: 5, "*": 5 };
  const MOST = 8, LINE = innerWidth < 640 ? 30 : 60;
  const NESTS = {
    row: "the reduced axes are the innermost in memory, so each set is one run",
    column: "a kept axis is the innermost in memory, so many sets are computed side by side",
    block: "the reduced axes lie on both sides of a kept one in memory, so the runs of each set are merged",
  };
  const word = (name) => WORDS[name] ?? name;
  const OWN = "";
  const state = { method: "batch_norm", axes: "", over: "", given: {}, shape: [], channelsLast: false, element: 0 };

  function node(tag, attributes = {}, ...children) {
    const svg = ["svg", "rect", "polygon", "text", "g"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes))
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
    made.append(...children);
    return made;
  }

  const card = () => methods.find((method) => method.name === state.method);

  function choose(name) {
    state.method = name;
    const chosen = card();
    if (chosen) {
      state.axes = chosen.axes;
      state.over = chosen.over;
      state.given = { ...chosen.sizes };
    }
    state.shape = [];
    fit();
    location.replace(`#${name || "own"}`);
  }

  // Sizes for axes that have none yet: those of composite axes are products.
  function fit() {
    const groups = Support.parse(state.axes);
    for (const group of groups)
      if (group.length > 1) for (const name of group.slice(0, -1)) state.given[name] ??= 2;
    const wanted = (group) =>
      group.length === 1 ? (SIZES[group[0]] ?? 3) : Support.product(group.map((name) => state.given[name] ?? 2));
    state.shape = groups.map((group, place) => state.shape[place] ?? wanted(group));
    state.element = Math.min(state.element, Support.product(state.shape) - 1);
  }

  // The tensor as slabs (first axis), columns (second) and rows (all others): as cubes of samples, channels and positions are drawn.
  function layout(shape) {
    if (shape.length === 1) return { slabs: 1, columns: shape[0], rows: 1 };
    if (shape.length === 2) return { slabs: 1, columns: shape[1], rows: shape[0] };
    return { slabs: shape[0], columns: shape[1], rows: Support.product(shape.slice(2)) };
  }
  const flat = (view, rank, slab, row, column) =>
    rank < 3 ? row * view.columns + column : (slab * view.columns + column) * view.rows + row;

  function labels(support) {
    const heads = support.groups.map((group) => word(group[group.length - 1]));
    if (heads.length === 1) return ["", heads[0], ""];
    if (heads.length === 2) return ["", heads[1], heads[0]];
    return [heads[0], heads[1], heads.slice(2).join(" and ")];
  }

  const shade = (member, at) => (at === state.element ? "one" : member[at] ? "set" : "rest");

  function cube(view, rank, member, names) {
    const dx = 0.42, dy = 0.34, unit = 22;
    const width = view.columns + view.slabs * dx, height = view.rows + view.slabs * dy;
    const picture = node("svg", {
      viewBox: `-1.4 ${-view.slabs * dy - 1} ${width + 2.2} ${height + 2.4}`,
      width: (width + 2.2) * unit, role: "img", "aria-label": "the visible faces of the tensor as a cube", class: "atlas-cube",
    });
    const at = (slab, row, column) => `${column + slab * dx},${row - slab * dy}`;
    const face = (index, corners) =>
      picture.append(node("polygon", { points: corners.map((corner) => at(...corner)).join(" "), class: shade(member, index), "data-at": index, onclick: () => select(index) }));
    for (let row = 0; row < view.rows; row++)
      for (let column = 0; column < view.columns; column++)
        face(flat(view, rank, 0, row, column), [[0, row, column], [0, row, column + 1], [0, row + 1, column + 1], [0, row + 1, column]]);
    for (let slab = 0; rank > 2 && slab < view.slabs; slab++) {
      for (let column = 0; column < view.columns; column++)
        face(flat(view, rank, slab, 0, column), [[slab, 0, column], [slab, 0, column + 1], [slab + 1, 0, column + 1], [slab + 1, 0, column]]);
      for (let row = 0; row < view.rows; row++)
        face(flat(view, rank, slab, row, view.columns - 1), [[slab, row, view.columns], [slab + 1, row, view.columns], [slab + 1, row + 1, view.columns], [slab, row + 1, view.columns]]);
    }
    const text = (x, y, said, turn) => picture.append(node("text", { x, y, "text-anchor": "middle", transform: turn ? `rotate(${turn} ${x} ${y})` : false }, said));
    text(view.columns / 2, view.rows + 0.8, names[1]);
    if (names[2]) text(-0.5, view.rows / 2, names[2], -90);
    if (names[0]) text(-0.2 + (view.slabs * dx) / 2 - 0.4, (-view.slabs * dy) / 2 - 0.35, names[0], -39);
    return picture;
  }

  // Every element, slab by slab; one of them has the keyboard's focus.
  function slices(view, rank, member, names) {
    const box = node("div", { class: "atlas-slices", role: "group", "aria-label": "every element; arrow keys move, page keys change the slab", onkeydown: move });
    for (let slab = 0; slab < view.slabs; slab++) {
      const grid = node("div", { class: "atlas-grid", style: `grid-template-columns: repeat(${view.columns}, 1fr)` });
      for (let row = 0; row < view.rows; row++)
        for (let column = 0; column < view.columns; column++) {
          const index = flat(view, rank, slab, row, column);
          grid.append(node("button", {
            type: "button", class: shade(member, index), "data-at": index, tabindex: index === state.element ? 0 : -1,
            "aria-pressed": String(index === state.element), "aria-label": `element ${Support.index(index, state.shape).join(", ")}`,
            onclick: () => select(index),
          }));
        }
      box.append(node("figure", {}, grid, node("figcaption", {}, rank > 2 ? `${names[0].replace(/s$/, "")} ${slab}` : `${names[2] || names[1]} by ${names[1]}`)));
    }
    return box;
  }

  function memory(support, parts, member) {
    const axes = Support.order(support, state.channelsLast);
    const shape = axes.map((axis) => parts.shape[axis]);
    const count = Support.product(shape);
    const strides = parts.shape.map((_, axis) => Support.product(parts.shape.slice(axis + 1)));
    const across = Math.min(count, LINE), size = 10;
    const picture = node("svg", { viewBox: `0 0 ${across * size} ${Math.ceil(count / LINE) * size}`, role: "img", "aria-label": "the elements in the order of memory", class: "atlas-memory" });
    for (let place = 0; place < count; place++) {
      const own = Support.index(place, shape);
      const at = axes.reduce((sum, axis, level) => sum + own[level] * strides[axis], 0);
      picture.append(node("rect", { x: (place % LINE) * size, y: Math.floor(place / LINE) * size, width: size - 1, height: size - 1, class: shade(member, at) }));
    }
    return picture;
  }

  function sentence(parts) {
    const side = (reduced) => {
      const sizes = new Map();
      parts.names.forEach((name, axis) => parts.reduced[axis] === reduced && sizes.set(name, (sizes.get(name) ?? 1) * parts.shape[axis]));
      const said = [...sizes].map(([name, size]) => `${size} ${word(name)}`).join(" × ") || "1";
      return sizes.size > 1 ? `${said} = ${Support.product([...sizes.values()])}` : said;
    };
    return `One statistic for each of ${side(false)}, over ${side(true)}.`;
  }

  function facts(support, parts) {
    const chosen = card();
    const loop = Support.nest(parts, Support.order(support, state.channelsLast));
    const code = (said) => node("code", {}, said);
    const sizes = Object.entries(state.given).map(([name, size]) => `, ${name}=${size}`).join("");
    const notation = `Support("${state.axes}", over="${state.over}"${sizes})`;
    const rows = [["notation", code(notation)]];
    if (chosen) {
      const one = (names) => Support.parse(names).map((group) => word(group[group.length - 1]).replace(/s$/, "")).join(" and ");
      const per = (names) => (names ? `one per ${one(names)}` : names === "" ? "one in all" : "none");
      rows.push(["formula", code(chosen.formula)], ["weight and bias", per(chosen.parameters)], ["running statistics", per(chosen.running)]);
    }
    rows.push([`loop nest${loop ? ": " + loop : ""}`, loop ? `${NESTS[loop]}; the input is read once if a set fits in the cache, else twice` : "kept and reduced axes alternate too often in memory: PyTorch operators run it"]);
    if (chosen) {
      const others = ["torch", "timm", "apex", "flax", "keras"].filter((library) => chosen[library]);
      if (others.length) rows.push(["the same elsewhere", others.map((library) => `${library}: ${chosen[library]}`).join(" · ")]);
      if (chosen.word) rows.push(["word in recipes", code(chosen.word)]);
      rows.push(["paper", node("a", { href: chosen.url }, chosen.paper)]);
    }
    const line = chosen ? chosen.line : `nk.normalize(x, nk.${notation})`;
    const copy = node("button", { type: "button", class: "atlas-copy", onclick: () => navigator.clipboard?.writeText(line).then(() => (copy.textContent = "copied")) }, "copy");
    rows.push(["in code", node("span", {}, code(line), " ", copy)]);
    return node("dl", { class: "atlas-facts" }, ...rows.flatMap(([name, said]) => [node("dt", {}, name), node("dd", {}, said)]));
  }

  function field(label, input) {
    return node("label", {}, label, input);
  }

  function controls() {
    const list = node("select", { id: "atlas-method", onchange: (event) => (choose(event.target.value), draw("atlas-method")) }, node("option", { value: OWN, selected: state.method === OWN }, "your own notation"));
    for (const [kind, title] of Object.entries(KINDS)) {
      const own = methods.filter((method) => method.kind === kind);
      if (own.length) list.append(node("optgroup", { label: title }, ...own.map((method) => node("option", { value: method.name, selected: method.name === state.method }, method.title))));
    }
    const text = (name) =>
      node("input", { id: `atlas-${name}`, value: state[name], spellcheck: "false", oninput: (event) => {
        state[name] = event.target.value;
        state.method = OWN;
        state.shape = [];
        state.given = {};
        draw(`atlas-${name}`);
      } });
    const box = node("form", { class: "atlas-controls", onsubmit: (event) => event.preventDefault() }, field("method", list), field("axes", text("axes")), field("over", text("over")));
    const number = (label, id, value, set) =>
      field(label, node("input", { id, type: "number", min: 1, max: MOST, value, onchange: (event) => {
        set(Math.max(1, Math.min(MOST, Math.round(Number(event.target.value)) || 1)));
        draw(id);
      } }));
    let groups = [];
    try { groups = Support.parse(state.axes); } catch { /* the error stands below */ }
    groups.forEach((group, place) => {
      if (group.length === 1) return box.append(number(word(group[0]), `atlas-size-${place}`, state.shape[place] ?? 1, (size) => (state.shape[place] = size)));
      for (const name of group) {
        const open = name === group[group.length - 1];
        const others = Support.product(group.slice(0, -1).map((each) => state.given[each] ?? 2));
        box.append(number(word(name), `atlas-size-${name}`, open ? state.shape[place] / others : state.given[name], (size) => {
          const last = state.shape[place] / others;
          if (!open) state.given[name] = size;
          else delete state.given[name];
          const now = Support.product(group.slice(0, -1).map((each) => state.given[each] ?? 2));
          state.shape[place] = now * (open ? size : last);
        }));
      }
    });
    if (groups.length > 2)
      box.append(field("memory", node("select", { id: "atlas-memory", onchange: (event) => ((state.channelsLast = event.target.value === "last"), draw("atlas-memory")) },
        node("option", { value: "first", selected: !state.channelsLast }, "as written"), node("option", { value: "last", selected: state.channelsLast }, "second axis last"))));
    return box;
  }

  function select(index) {
    state.element = index;
    draw();
    ROOT.querySelector(`button[data-at="${index}"]`)?.focus({ preventScroll: true });
  }

  function move(event) {
    const rank = state.shape.length, view = layout(state.shape);
    const [slab, row, column] = rank < 3
      ? [0, Math.floor(state.element / view.columns), state.element % view.columns]
      : [Math.floor(state.element / (view.columns * view.rows)), state.element % view.rows, Math.floor(state.element / view.rows) % view.columns];
    const steps = { ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], PageUp: [-1, 0, 0], PageDown: [1, 0, 0] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
    select(flat(view, rank, clamp(slab + step[0], view.slabs), clamp(row + step[1], view.rows), clamp(column + step[2], view.columns)));
  }

  function draw(focus) {
    const parts = [];
    try {
      const support = Support.read(state.axes, state.over);
      fit();
      if (Support.product(state.shape) > 2048) throw new Support.NotationError("more than 2,048 elements; choose smaller sizes");
      const split = Support.split(support, state.shape, state.given);
      const view = layout(state.shape), rank = state.shape.length;
      const member = Support.members(split, state.element);
      const names = labels(support);
      parts.push(
        node("p", { class: "atlas-said", role: "status" }, sentence(split)),
        node("div", { class: "atlas-pictures" }, cube(view, rank, member, names), slices(view, rank, member, names)),
        node("p", { class: "atlas-caption" }, "In memory, line by line:"), memory(support, split, member),
        facts(support, split),
      );
    } catch (error) {
      if (!(error instanceof Support.NotationError)) throw error;
      parts.push(node("p", { class: "atlas-error", role: "alert" }, error.message));
    }
    ROOT.replaceChildren(controls(), ...parts);
    const again = focus && document.getElementById(focus);
    if (again) {
      again.focus({ preventScroll: true });
      if (again.type === "text") again.setSelectionRange(again.value.length, again.value.length);
    }
  }

  const asked = location.hash.slice(1);
  state.method = methods.some((method) => method.name === asked) ? asked : "batch_norm";
  Object.assign(state, { axes: card().axes, over: card().over, given: { ...card().sizes } });
  draw();
})();
