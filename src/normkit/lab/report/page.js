// Draws the charts in the page's own colours, and again when the reader's scheme changes or the page is printed.
(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const page = document.documentElement;

  function colour(name) {
    const [variable, opacity] = name.slice(1).split("/");
    const hex = getComputedStyle(page).getPropertyValue(`--${variable}`).trim();
    if (!opacity) return hex;
    const parts = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    return `rgba(${parts.join(",")},${opacity})`;
  }

  function painted(value, isColour) {
    if (Array.isArray(value)) return value.map((entry) => painted(entry, isColour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, painted(entry, /color$/.test(key))]));
    }
    return isColour && typeof value === "string" && value[0] === "@" ? colour(value) : value;
  }

  function frame(width) {
    return {
      font: { family: getComputedStyle(page).getPropertyValue("--plain"), size: narrow.matches ? 11 : 12, color: colour("@ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 56, r: 12, t: narrow.matches ? 34 : 54, b: 46 },
      legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: colour("@panel"), bordercolor: colour("@rule"), font: { color: colour("@ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("@soft"), activecolor: colour("@ink") },
      // On a touch screen a drag must scroll the page.
      dragmode: coarse ? false : "zoom",
      uirevision: "kept",
      ...(width ? { width } : { autosize: true }),
    };
  }

  function draw(id, width) {
    const chart = charts[id];
    const place = document.getElementById(id);
    const layout = { ...frame(width), ...painted(chart.layout, false) };
    if (!layout.showlegend) layout.margin = { ...layout.margin, t: 12 };
    if (!chart.data.some((trace) => trace.y.length)) {
      layout.annotations = [{ text: "nothing recorded", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false }];
    }
    const config = {
      responsive: !width,
      displaylogo: false,
      displayModeBar: chart.layout.showlegend && !narrow.matches ? "hover" : false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
      // Nothing of the page may leave for a server.
      plotlyServerURL: "",
      typesetMath: false,
    };
    return Plotly.react(place, painted(chart.data, false), layout, config);
  }

  function drawAll(width) {
    for (const id of Object.keys(charts)) draw(id, width && width(document.getElementById(id)));
  }

  function addViews(id) {
    const views = charts[id].views;
    if (!views.length) return;
    const bar = document.createElement("div");
    bar.className = "views";
    for (const [index, view] of views.entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = view.label;
      button.setAttribute("aria-pressed", String(index === 0));
      button.addEventListener("click", () => {
        for (const other of bar.children) other.setAttribute("aria-pressed", String(other === button));
        Plotly.relayout(id, view.layout);
      });
      bar.append(button);
    }
    document.getElementById(id).before(bar);
  }

  drawAll();
  Object.keys(charts).forEach(addViews);
  dark.addEventListener("change", () => drawAll());
  narrow.addEventListener("change", () => drawAll());
  addEventListener("beforeprint", () => {
    page.dataset.print = "";
    // 660 pixels fill the text width of A4 and of letter paper.
    drawAll((place) => (place.closest(".row") ? 660 / (place.closest(".row").children.length === 2 ? 2.1 : 3.2) : 660));
  });
  addEventListener("afterprint", () => {
    delete page.dataset.print;
    drawAll();
  });
})();
