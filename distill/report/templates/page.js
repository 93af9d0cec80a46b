"use strict";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const mix = (from, to, share) =>
  `rgb(${rgb(from).map((part, at) => Math.round(part + (rgb(to)[at] - part) * share)).join(",")})`;

function colourOf(meta) {
  return meta.shade === undefined ? css(`--s${meta.slot % 8}`) : mix(css("--low"), css("--high"), meta.shade);
}

function themed(trace) {
  const meta = trace.meta || {};
  if (meta.heat) return { ...trace, colorscale: [[0, css("--heat")], [0.5, css("--s0")], [1, css("--high")]] };
  const colour = colourOf(meta);
  const marker = { size: 4, ...trace.marker, color: colour, opacity: meta.soft ? 0.3 : 1 };
  if (marker.line) marker.line = { ...marker.line, color: colour };
  return { ...trace, marker, line: { width: 1.8, ...trace.line, color: colour } };
}

function layoutOf(layout, traces) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true, fixedrange: isTouch };
  const { tall, ...rest } = layout;
  const title = (own) => ({ ...axis, ...own, title: { ...own.title, standoff: 8, font: { size: 12, color: css("--soft") } } });
  return {
    showlegend: traces.length > 1,
    ...rest,
    xaxis: title(layout.xaxis),
    yaxis: title(layout.yaxis),
    autosize: true,
    margin: { l: 8, r: 8, t: 8, b: 8, pad: 2 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--soft") },
    legend: { orientation: "h", yanchor: "bottom", y: 1.0, xanchor: "left", x: 0, font: { size: 11 } },
    hoverlabel: { font: { size: 12 } },
    hovermode: traces.some((one) => one.orientation === "h" || one.type === "heatmap") ? "closest" : "x unified",
    dragmode: isTouch ? false : "zoom",
    barmode: "overlay",
  };
}

const isTouch = matchMedia("(pointer: coarse)").matches;
const drawn = new Map();

function draw(figure) {
  const canvas = figure.querySelector(".canvas");
  if (!canvas.offsetParent) return;
  if (!drawn.has(canvas)) drawn.set(canvas, JSON.parse(figure.querySelector("script").textContent));
  const { data, layout } = drawn.get(canvas);
  const config = { displayModeBar: false, responsive: true };
  Plotly.react(canvas, data.map(themed), layoutOf(layout, data), config);
}

function drawAll(within) {
  within.querySelectorAll(".plot").forEach(draw);
}

document.querySelectorAll("details.run").forEach((run) =>
  run.addEventListener("toggle", () => run.open && drawAll(run)));
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", openTarget);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(document));
openTarget();
drawAll(document);
