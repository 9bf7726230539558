// Predictions per minute as stacked bars, drawn by uPlot.

import * as format from "./format.js";
import { element, labelTag } from "./view.js";

const MINUTE_MS = 60_000;
const BAR_SHARE = 0.74;
const BAR_MAX_PX = 36;
const HALF_TIME_PX = 34;

/**
 * One entry a minute for the `length` minutes up to `nowMs`; a minute the server left out counts as empty.
 * @param {any[]} series @param {number} nowMs @param {number} length
 */
export function fillMinutes(series, nowMs, length) {
  const known = new Map(series.map((row) => [toMinute(Date.parse(row.minute)), row]));
  const last = Math.max(toMinute(nowMs), ...known.keys());
  return Array.from({ length }, (_, at) => {
    const minute = last - (length - 1 - at) * MINUTE_MS;
    const { minute: _iso, ...counts } = known.get(minute) ?? {};
    return { minute, counts };
  });
}

/** @param {number} ms */
const toMinute = (ms) => Math.floor(ms / MINUTE_MS) * MINUTE_MS;

/** @param {Record<string, number>} counts @param {string[]} labels */
const totalOf = (counts, labels) => labels.reduce((sum, name) => sum + (counts[name] ?? 0), 0);

/**
 * uPlot's columns: seconds, then running totals from the whole stack down to the lowest label, the order of painting.
 * @param {{minute: number, counts: Record<string, number>}[]} rows @param {string[]} labels @param {boolean} isShare
 */
export function stackColumns(rows, labels, isShare) {
  const columns = labels.map((_, top) =>
    rows.map(({ counts }) => {
      const sum = totalOf(counts, labels.slice(0, top + 1));
      const total = totalOf(counts, labels);
      if (!sum) return null; // a bar of no height would still paint its outline over the axis
      return isShare ? (100 * sum) / total : sum;
    }),
  );
  return [rows.map(({ minute }) => minute / 1000), ...columns.reverse()];
}

/** Whether a time written under `at` would run over the right edge. @param {any} plot @param {number} at seconds */
function isCut(plot, at) {
  const { min, max } = plot.scales.x;
  return ((max - at) / (max - min)) * plot.width < HALF_TIME_PX;
}

export class SentimentChart {
  /** @param {HTMLElement} box @param {HTMLElement} legend */
  constructor(box, legend) {
    this.box = box;
    this.legend = legend;
    this.isShare = false;
    this.labels = [];
    this.rows = [];
    this.plot = null;
    this.hovered = null;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
    new ResizeObserver(() => this.resize()).observe(box);
  }

  /** @param {string[]} labels @param {{minute: number, counts: Record<string, number>}[]} rows */
  update(labels, rows) {
    const isSameShape = this.plot && labels.join() === this.labels.join();
    this.labels = labels;
    this.rows = rows;
    if (isSameShape) this.plot.setData(this.columns());
    else this.rebuild();
    this.showLegend();
  }

  /** @param {boolean} isShare */
  setShare(isShare) {
    this.isShare = isShare;
    if (this.labels.length) this.rebuild();
  }

  columns() {
    return stackColumns(this.rows, this.labels, this.isShare);
  }

  resize() {
    if (this.plot && this.box.clientWidth) this.plot.setSize(this.size());
  }

  size() {
    return { width: this.box.clientWidth, height: this.box.clientHeight };
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.labels.length) return;
    this.plot = new window.uPlot(this.options(), this.columns(), this.box);
  }

  /** @param {string} name a custom property of style.css */
  colour(name) {
    return getComputedStyle(this.box).getPropertyValue(name).trim();
  }

  options() {
    const surface = this.colour("--surface");
    const bars = window.uPlot.paths.bars({ size: [BAR_SHARE, BAR_MAX_PX] });
    const series = this.labels.toReversed().map((name) => ({
      label: name,
      fill: this.colour(`--${format.toneOf(name)}`),
      stroke: surface,
      width: 1,
      paths: bars,
      points: { show: false },
    }));
    return {
      ...this.size(),
      padding: [10, 6, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
      scales: {
        x: { time: true, range: (_plot, min, max) => [min - 30, max + 30] },
        y: { range: (_plot, _min, max) => [0, this.isShare ? 100 : Math.max(4, (max || 0) * 1.06)] },
      },
      axes: this.axes(),
      series: [{}, ...series],
      hooks: { draw: [(plot) => this.fadeRunningMinute(plot, surface)], setCursor: [(plot) => this.hover(plot)] },
    };
  }

  axes() {
    const common = { stroke: this.colour("--muted"), font: `12px ${getComputedStyle(this.box).fontFamily}` };
    const grid = { stroke: this.colour("--grid"), width: 1 };
    const unit = this.isShare ? (value) => format.percent(value / 100) : format.shortCount;
    return [
      {
        ...common,
        space: 64,
        incrs: [60, 300, 600, 900, 1800],
        values: (plot, splits) => splits.map((at) => (isCut(plot, at) ? "" : format.clockMinutes(at * 1000))),
        grid: { show: false },
        ticks: { show: false },
        gap: 8,
        size: 32,
      },
      {
        ...common,
        space: 34,
        incrs: this.isShare ? [25, 50] : [1, 2, 5].flatMap((step) => Array.from({ length: 9 }, (_, e) => step * 10 ** e)).sort((a, b) => a - b),
        values: (_plot, splits) => splits.map(unit),
        grid,
        ticks: { show: false },
        size: 48,
      },
    ];
  }

  /** The newest bar still grows; paler, it does not read as a fall. @param {any} plot @param {string} surface */
  fadeRunningMinute(plot, surface) {
    const [times, totals] = plot.data;
    const last = times.length - 1;
    if (!totals[last]) return;
    const slot = plot.bbox.width / times.length;
    const top = plot.valToPos(totals[last], "y", true);
    plot.ctx.save();
    plot.ctx.globalAlpha = 0.45;
    plot.ctx.fillStyle = surface;
    plot.ctx.fillRect(plot.valToPos(times[last], "x", true) - slot / 2, top - 1, slot, plot.valToPos(0, "y", true) - top + 1);
    plot.ctx.restore();
  }

  /** @param {any} plot */
  hover(plot) {
    this.hovered = plot.cursor.left >= 0 ? plot.cursor.idx : null;
    this.showLegend();
  }

  showLegend() {
    if (!this.rows.length) return;
    const row = this.hovered == null ? null : this.rows[this.hovered];
    const shown = row ? [row] : this.rows;
    const total = shown.reduce((sum, { counts }) => sum + totalOf(counts, this.labels), 0);
    const entries = this.labels.map((name) => {
      const sum = shown.reduce((all, { counts }) => all + (counts[name] ?? 0), 0);
      const value = this.isShare ? (total ? format.percent(sum / total) : "–") : format.count(sum);
      return element("span", "legend-entry", labelTag(name), element("span", "legend-value", value));
    });
    this.legend.replaceChildren(element("span", "legend-when", this.when(row)), ...entries);
  }

  /** @param {{minute: number} | null} row */
  when(row) {
    if (!row) return `Last ${this.rows.length} minutes`;
    const isRunning = row === this.rows[this.rows.length - 1];
    return format.clockMinutes(row.minute) + (isRunning ? ", so far" : "");
  }
}
