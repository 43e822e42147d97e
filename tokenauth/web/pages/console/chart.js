// A chart of the last hour, drawn by uPlot, which is loaded with the first one.

import { html, useEffect, useRef, useState } from "./preact.js";

const HEIGHT = 9.5; // times the size of the text
const dark = matchMedia("(prefers-color-scheme: dark)");
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

/** `values` are one for each `step` seconds until `end`, null where not known. `counts`: they add up. */
export function Chart({ title, unit, values, end, step, counts }) {
  const element = useRef(null);
  const drawn = useRef(null);
  const shown = useRef(null);
  const [pointed, setPointed] = useState(null);
  const times = values.map((_, index) => end - (values.length - 1 - index) * step);
  shown.current = [times, values];

  useEffect(() => {
    let current = true;
    const draw = async () => {
      const { default: UPlot } = await import("./uplot.js");
      if (!current) return;
      drawn.current?.destroy();
      drawn.current = new UPlot(options(UPlot, element.current, counts && step, setPointed), shown.current, element.current);
    };
    const resize = new ResizeObserver(() => drawn.current?.setSize(sizeOf(element.current)));
    draw();
    resize.observe(element.current);
    dark.addEventListener("change", draw);
    return () => {
      current = false;
      resize.disconnect();
      dark.removeEventListener("change", draw);
      drawn.current?.destroy();
      drawn.current = null;
    };
  }, []);
  useEffect(() => drawn.current?.setData(shown.current), [values]);

  const known = values.filter((value) => value !== null);
  const most = Math.max(0, ...known);
  const latest = known.at(-1) ?? 0;
  const summary = !known.length
    ? "Nothing is known yet."
    : counts
      ? `${total(known)} in the last hour, at most ${most.toLocaleString("en")} ${unit}`
      : `${latest.toLocaleString("en")} now, at most ${most.toLocaleString("en")} ${unit}`;
  const at = pointed === null || values[pointed] === null || values[pointed] === undefined ? null : pointed;
  return html`<figure>
    <figcaption>
      <h3>${title}</h3>
      <p class="soft small">${at === null ? summary : `${clock.format(times[at] * 1000)}: ${values[at].toLocaleString("en")}`}</p>
    </figcaption>
    <div class="chart" role="img" aria-label=${`${title}: ${summary}`} ref=${element}></div>
  </figure>`;
}

function total(values) {
  return values.reduce((sum, value) => sum + value, 0).toLocaleString("en");
}

function sizeOf(element) {
  const text = Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
  return { width: element.clientWidth, height: Math.round(HEIGHT * text) };
}

/** `bar`: what is counted in how many seconds is shown as a bar of this width. Other values are levels. */
function options(UPlot, element, bar, point) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const size = Number.parseFloat(style.fontSize);
  const font = `${Math.round(size * 0.75)}px system-ui, sans-serif`;
  const axis = { stroke: color("--soft"), font, grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false } };
  return {
    ...sizeOf(element),
    padding: [size / 2, size / 2, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
    scales: { x: { range: (_, first, last) => [first - bar / 2, last + bar / 2] }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.1)] } },
    axes: [
      { ...axis, grid: { show: false }, size: size * 1.6, values: (_, splits) => splits.map((at) => clock.format(at * 1000)) },
      { ...axis, size: size * 3, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7] },
    ],
    series: [
      {},
      {
        stroke: color("--accent"),
        fill: color("--fill"),
        width: bar ? 0 : 2,
        points: { show: false },
        paths: bar ? UPlot.paths.bars({ size: [0.8, 20] }) : UPlot.paths.stepped({ align: -1 }),
        ...(bar && { fill: color("--accent") }),
      },
    ],
    hooks: { setCursor: [(plot) => point(plot.cursor.idx ?? null)] },
  };
}
