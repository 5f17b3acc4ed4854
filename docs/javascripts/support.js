// Support sets, as normkit.core.support and normkit.engine.plan have them: the tests compare both on random notations.
"use strict";
const Support = (() => {
  const NAME = /^[\p{ID_Start}_][\p{ID_Continue}]*$/u;

  class NotationError extends Error {}

  // "n (g c) *" as [["n"], ["g", "c"], ["*"]].
  function parse(text) {
    const groups = [];
    let inside = null;
    for (const mark of ["(", ")", "*"]) text = text.split(mark).join(` ${mark} `);
    const tokens = text.split(/\s+/).filter(Boolean);
    for (const token of tokens) {
      if (token === "(" && inside === null) inside = [];
      else if (token === ")" && inside !== null && inside.length) {
        groups.push(inside);
        inside = null;
      } else if (token === "*" && inside === null && !groups.some((group) => group[0] === "*")) groups.push(["*"]);
      else if (NAME.test(token) && inside === null) groups.push([token]);
      else if (NAME.test(token)) inside.push(token);
      else
        throw new NotationError(
          `cannot read '${token}' in '${tokens.join(" ")}'; wanted axis names, parentheses around names, and at most one * outside them`,
        );
    }
    if (inside !== null) throw new NotationError(`a ( is not closed in ${tokens.join(" ")}; close it with )`);
    return groups;
  }

  // A notation, checked: its axes, and the names that are reduced.
  function read(axes, over) {
    const groups = parse(axes);
    const names = groups.flat();
    const reduced = new Set(parse(over).flat());
    const known = names.join(", ") || "none";
    const twice = names.find((name, place) => names.indexOf(name) !== place);
    if (twice) throw new NotationError(`axis '${twice}' is named twice; give each axis another name`);
    if (!reduced.size) throw new NotationError(`over= names no axis to reduce; axes that exist: ${known}`);
    const lost = [...reduced].sort().find((name) => !names.includes(name));
    if (lost) throw new NotationError(`over= names axis '${lost}', which is not there; axes that exist: ${known}`);
    return { groups, names, reduced };
  }

  // The shape with composite axes split, a name for each axis, and which of them are reduced; * is one axis here.
  function split(support, shape, sizes) {
    const parts = [], names = [];
    support.groups.forEach((group, place) => {
      const size = shape[place];
      const open = group.filter((name) => group.length > 1 && !(name in sizes));
      const given = group.reduce((product, name) => product * (group.length > 1 ? (sizes[name] ?? 1) : 1), 1);
      if (group.length > 1) {
        if (open.length > 1) throw new NotationError(`(${group.join(" ")}) leaves ${open.join(" and ")} open; give a size for all but one`);
        if (size % given || (!open.length && given !== size))
          throw new NotationError(`(${group.join(" ")}) of size ${size} does not split with ${group.filter((name) => name in sizes).map((name) => `${name}=${sizes[name]}`).join(", ")}`);
      }
      for (const name of group) {
        parts.push(group.length === 1 ? size : (sizes[name] ?? size / given));
        names.push(name);
      }
    });
    return { shape: parts, names, reduced: names.map((name) => support.reduced.has(name)) };
  }

  const product = (numbers) => numbers.reduce((total, number) => total * number, 1);

  function index(flat, shape) {
    const place = [];
    for (const size of [...shape].reverse()) {
      place.unshift(flat % size);
      flat = Math.floor(flat / size);
    }
    return place;
  }

  // For each element in the order of the shape, whether it shares its statistic with the given one.
  function members(parts, element) {
    const own = index(element, parts.shape);
    return Array.from({ length: product(parts.shape) }, (_, flat) =>
      index(flat, parts.shape).every((at, axis) => parts.reduced[axis] || at === own[axis]),
    );
  }

  // Axes of the split from the outermost to the innermost in memory; channels last puts the second axis of the tensor last.
  function order(support, channelsLast) {
    let place = 0;
    const tensor = support.groups.map((group) => group.map(() => place++));
    if (channelsLast && tensor.length > 2) tensor.push(...tensor.splice(1, 1));
    return tensor.flat();
  }

  // Which of the kernels' loop nests serves: "row", "column" or "block"; null where reduced and kept axes alternate too often.
  function nest(parts, memory) {
    const levels = [];
    for (const axis of memory.filter((axis) => parts.shape[axis] !== 1))
      if (levels[levels.length - 1] !== parts.reduced[axis]) levels.push(parts.reduced[axis]);
    if (!levels.length) return null;
    const take = (reduced) => levels.length > 0 && levels[levels.length - 1] === reduced && (levels.pop(), true);
    const near = take(true);
    take(false);
    const far = take(true);
    take(false);
    if (levels.length) return null;
    return !far ? "row" : near ? "block" : "column";
  }

  return { NotationError, parse, read, split, members, order, nest, index, product };
})();
