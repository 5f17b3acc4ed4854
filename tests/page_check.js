// What tests/test_browser.py asks of the page that lies in a frame: it leaves what it found in an element of the document.
onload = () => {
  const view = document.getElementById("frame").contentWindow, page = view.document;
  const box = (element) => element.getBoundingClientRect();
  const cut = [], overlapping = [], silent = [], found = { width: page.documentElement.scrollWidth };
  for (const chart of page.querySelectorAll(".chart")) {
    const room = box(chart.querySelector("svg.drawing")), texts = [...chart.querySelectorAll("svg.drawing > text")];
    for (const text of texts) {
      const at = box(text);
      if (at.left < room.left - 1 || at.right > room.right + 1 || at.top < room.top - 1 || at.bottom > room.bottom + 1) {
        cut.push(chart.id + ": " + text.textContent);
      }
      for (const other of texts) {
        const there = box(other);
        const across = at.left < there.right - 1 && there.left < at.right - 1;
        if (text !== other && across && at.top < there.bottom - 3 && there.top < at.bottom - 3) {
          overlapping.push(chart.id + ": " + text.textContent + " over " + other.textContent);
        }
      }
    }
    const plot = chart.querySelector(".plot"), area = box(plot);
    const send = (kind, x, y, to = plot) => to.dispatchEvent(new view.PointerEvent(kind, {
      clientX: area.left + x * area.width, clientY: area.top + y * area.height, bubbles: true, pointerType: "mouse" }));
    const shown = () => [...chart.querySelectorAll("svg.drawing > text")].map((text) => text.textContent).join("|");
    send("pointermove", 0.6, 0.4);
    const tip = chart.querySelector(".tip");
    const outside = box(tip).right > view.innerWidth + 1 || box(tip).left < -1;
    if (tip.hidden || !tip.textContent || outside) silent.push("hover " + chart.id);
    found[chart.id] = tip.textContent;
    const before = shown();
    send("pointerdown", 0.55, 0.25);
    send("pointermove", 0.85, 0.7);
    send("pointerup", 0.85, 0.7, view);
    if (shown() === before) silent.push("zoom " + chart.id);
    plot.dispatchEvent(new view.MouseEvent("dblclick", { bubbles: true }));
    send("pointerleave", 0, 0);
  }
  for (const element of page.querySelectorAll("main *")) {
    const hides = view.getComputedStyle(element).overflowX === "hidden" && !element.closest("svg");
    if (hides && element.scrollWidth > element.clientWidth + 1) cut.push(element.tagName + " " + element.className);
  }
  const paths = () => page.querySelectorAll("#validation svg.drawing path").length;
  const drawn = paths();
  page.querySelector("#validation .legend button").click();
  found.hidden = drawn - paths();
  page.querySelector("#validation .legend button").click();
  found.back = drawn - paths();
  found.views = [...page.querySelectorAll("#validation .views button")].map((button) => button.textContent);
  found.ground = view.getComputedStyle(page.body).backgroundColor;
  found.line = view.getComputedStyle(page.querySelectorAll("#validation svg.drawing path[stroke]")[1]).stroke;
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify({ ...found, cut, overlapping, silent });
  document.body.append(told);
};
