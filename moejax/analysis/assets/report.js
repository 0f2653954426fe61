"use strict";
(() => {
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 690; // CSS pixels between the margins of A4 and of Letter
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const THEMES = JSON.parse(document.getElementById("themes").textContent);
  let printing = false;
  let chosen = remembered();
  let queue = [];

  // A page opened from a file may have no storage; then the choice lasts until it is closed.
  function remembered(value) {
    try {
      if (value) localStorage.setItem("moejax-theme", value);
      return localStorage.getItem("moejax-theme");
    } catch (error) {
      return value || null;
    }
  }

  function theme() {
    return printing ? "light" : chosen || (prefersDark.matches ? "dark" : "light");
  }

  function template(t) {
    const axis = {
      automargin: true, gridcolor: t.grid, zerolinecolor: t.grid, linecolor: t.line,
      tickcolor: t.line, ticks: "outside", ticklen: 4, title: { standoff: 10 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, 'Segoe UI', 'Liberation Sans', sans-serif", size: 12.5, color: t.ink },
        colorway: t.colorway, hovermode: "closest",
        modebar: { bgcolor: "rgba(0,0,0,0)", color: t.line, activecolor: t.ink },
        hoverlabel: { bgcolor: t.hover, bordercolor: t.line, font: { color: t.ink }, align: "left" },
        legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
        title: { x: 0, xanchor: "left", xref: "paper", font: { size: 14.5 }, y: 0.99, yanchor: "top", yref: "container" },
        xaxis: axis, yaxis: axis,
        annotationdefaults: { font: { color: t.quiet, size: 11.5 }, arrowcolor: t.line },
        shapedefaults: { line: { color: t.line } },
        sliderdefaults: { bgcolor: t.grid, bordercolor: t.line, tickcolor: t.line, font: { color: t.quiet } },
      },
      data: {
        heatmap: [{ colorbar: { outlinewidth: 0, thickness: 14 }, xgap: 0, ygap: 0 }],
      },
    };
  }

  // Pages name colours "C0" to "C7", "ink" and "quiet"; each theme has its own.
  function recolour(node, t) {
    for (const [key, value] of Object.entries(node)) {
      if ((key === "color" || key === "fillcolor") && typeof value === "string") {
        if (/^C[0-9]$/.test(value)) node[key] = t.colorway[value[1] % t.colorway.length];
        else if (value === "ink" || value === "quiet") node[key] = t[value];
      } else if (value && typeof value === "object" && !Array.isArray(value)) recolour(value, t);
    }
  }

  function visible(figure) {
    return !figure.closest("[hidden]") && (printing || figure.closest(".page").classList.contains("shown"));
  }

  function draw(figure) {
    const form = theme() + (printing ? " printed" : "");
    if (figure.dataset.drawn === form) return;
    const spec = JSON.parse(document.getElementById("spec-" + figure.dataset.name).textContent);
    const layout = spec.layout || {};
    const t = THEMES[theme()];
    for (const trace of spec.data) recolour(trace, t);
    recolour(layout, t);
    layout.template = template(t);
    for (const trace of spec.data) {
      if (trace.type === "heatmap" && !trace.colorscale) {
        const lowest = trace.zmin ?? trace.z.flat().reduce((low, z) => Math.min(low, z), 0);
        trace.colorscale = lowest < 0 ? t.diverging : t.sequential;
      }
    }
    layout.height = Number(figure.dataset.height);
    layout.margin = Object.assign({ l: 60, r: 20, t: layout.title ? 62 : 36, b: 48 }, layout.margin);
    if (printing) layout.width = PRINT_WIDTH;
    Plotly.react(figure.querySelector(".canvas"), spec.data, layout, CONFIG);
    figure.dataset.drawn = form;
  }

  // One figure at a time, so that the page can be read and left while the others are drawn.
  function drawVisible() {
    const idle = !queue.length;
    queue = [...document.querySelectorAll("figure.plot")].filter(visible);
    if (idle && queue.length) setTimeout(drawNext);
  }

  function drawNext() {
    const figure = queue.shift();
    if (figure && visible(figure)) draw(figure);
    if (queue.length) setTimeout(drawNext);
  }

  function show() {
    const pages = [...document.querySelectorAll(".page")];
    const wanted = decodeURIComponent(location.hash.slice(1));
    const page = pages.find((p) => p.id === wanted) || pages[0];
    for (const p of pages) p.classList.toggle("shown", p === page);
    for (const link of document.querySelectorAll("nav a")) {
      if (page && link.hash === "#" + page.id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    scrollTo(0, 0);
    drawVisible();
  }

  function choose(choice, number) {
    const panels = [...choice.children].filter((child) => child.classList.contains("option"));
    panels.forEach((panel, i) => { panel.hidden = i !== number; });
    choice.querySelectorAll(":scope > p button").forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === number));
    });
    drawVisible();
  }

  function applyTheme() {
    root.dataset.theme = theme();
    document.getElementById("theme").textContent = theme() === "dark" ? "light" : "dark";
    drawVisible();
  }

  for (const choice of document.querySelectorAll(".choice")) {
    choice.querySelectorAll(":scope > p button").forEach((button, i) => {
      button.addEventListener("click", () => choose(choice, i));
    });
    const select = choice.querySelector(":scope > p select");
    if (select) select.addEventListener("change", () => choose(choice, select.selectedIndex));
  }
  document.getElementById("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    remembered(chosen);
    applyTheme();
  });
  prefersDark.addEventListener("change", applyTheme);
  addEventListener("hashchange", show);
  addEventListener("beforeprint", () => {
    printing = true;
    root.dataset.theme = "light";
    document.body.classList.add("printing");
    for (const figure of document.querySelectorAll("figure.plot")) if (visible(figure)) draw(figure);
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.body.classList.remove("printing");
    applyTheme();
  });
  root.dataset.theme = theme();
  show();
  applyTheme();
})();
