// One chart: a curve with its range, smoothed; or parts stacked on one another. Drawn by uPlot.
"use strict";

const Charts = (() => {
  const HEIGHT = 190;
  const sync = uPlot.sync("run");
  const shown = new Set();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (color, percent) => `color-mix(in srgb, ${color} ${percent}%, transparent)`;

  /** Exponential moving average that passes over gaps, and is not drawn to 0 at its beginning. */
  function smoothed(values, weight) {
    let sum = 0;
    let total = 0;
    return values.map((value) => {
      if (value === null || value === undefined) return null;
      sum = sum * weight + value * (1 - weight);
      total = total * weight + (1 - weight);
      return sum / total;
    });
  }

  const positive = (values) => values.map((value) => (value > 0 ? value : null));

  function axes(format) {
    const common = {
      stroke: css("--quiet"),
      font: "11px " + css("--sans"),
      ticks: { show: false },
      grid: { stroke: css("--line"), width: 1 },
    };
    return [
      { ...common, grid: { show: false }, size: 26, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
      {
        ...common,
        size: 56,
        space: 34,
        values: (plot, splits) => splits.map((split) => (split === null ? "" : format(split))),
      },
    ];
  }

  /**
   * A chart that draws what it is given.
   *
   * `define`: {title, help, parts: [{name, label, color}], stacked, format, log}
   * `onZoom(first, last)` is called when a range is dragged, `onZoom(null)` at a double click.
   */
  class Chart {
    constructor(define, onZoom) {
      this.define = define;
      this.onZoom = onZoom;
      this.log = Boolean(define.log);
      this.smoothing = 0;
      this.runs = [];
      this.plot = null;
      this.values = el("div", { class: "values" });
      this.canvas = el("div", { class: "canvas" });
      this.logButton = el("button", {
        type: "button", class: "plain small", text: "log", title: "Logarithmic scale",
        "aria-pressed": String(this.log),
        click: () => {
          this.log = !this.log;
          this.logButton.setAttribute("aria-pressed", String(this.log));
          this.draw();
        },
      });
      this.element = el("figure", { class: "chart", "data-chart": define.title },
        el("figcaption", {},
          el("h3", { text: define.title, title: define.help || null }),
          this.values,
          define.stacked ? null : this.logButton),
        this.canvas);
      shown.add(this);
    }

    /** `runs`: [{name, curves}], of which each has `steps` and `columns`. */
    show(runs, smoothing) {
      this.runs = runs;
      this.smoothing = smoothing;
      this.draw();
    }

    remove() {
      shown.delete(this);
      if (this.plot) this.plot.destroy();
      this.element.remove();
    }

    get isEmpty() {
      return !this.runs.some(({ curves }) => this.define.parts.some((part) => curves.columns[part.name]));
    }

    draw() {
      if (this.plot) this.plot.destroy();
      this.plot = null;
      this.canvas.replaceChildren();
      this.element.hidden = this.isEmpty;
      const width = this.canvas.clientWidth;
      if (this.isEmpty || width < 80) return;
      const { data, series, bands, labels } = this.define.stacked ? this.stacked() : this.lines();
      const plot = new uPlot({
        width,
        height: HEIGHT,
        legend: { show: false },
        padding: [8, 8, 0, 0],
        cursor: {
          sync: { key: sync.key, setSeries: false },
          drag: { x: true, y: false, setScale: false },
          points: { size: 6 },
          y: false,
          bind: { dblclick: () => () => this.onZoom(null) },
        },
        scales: {
          x: { time: false, range: (_, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) },
          y: this.log ? { distr: 3 } : { range: (_, low, high) => this.span(low, high) },
        },
        axes: axes(this.define.format || Format.number),
        series: [{}, ...series],
        bands,
        hooks: {
          setCursor: [(each) => this.tell(each, labels)],
          setSelect: [(each) => this.select(each)],
        },
      }, data, this.canvas);
      this.plot = plot;
      this.tell(plot, labels);
    }

    span(low, high) {
      if (low === null) return [0, 1];
      if (this.define.stacked) return [0, high * 1.05 || 1];
      const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
      const floor = low >= 0 && low - pad < 0 ? 0 : low - pad;
      return [floor, high + pad];
    }

    select(plot) {
      const { left, width } = plot.select;
      if (width < 6) return;
      const [first, last] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
      plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      this.onZoom(Math.floor(first), Math.ceil(last));
    }

    /** Each run's columns: the range of each bucket, the mean, and the smoothed mean over it. */
    lines() {
      const tables = [];
      const series = [];
      const bands = [];
      const labels = [];
      const keep = this.log ? positive : (values) => values;
      this.runs.forEach(({ name, curves }, run) => {
        for (const part of this.define.parts) {
          const column = curves.columns[part.name];
          if (!column) continue;
          const color = css(run ? `--run-${run + 1}` : part.color || "--run-1");
          const isRange = column.low.some((low, at) => low !== column.high[at]);
          const columns = [];
          if (isRange) {
            columns.push(keep(column.high), keep(column.low));
            bands.push({ series: [series.length + 1, series.length + 2], fill: faint(color, 14) });
            series.push({ stroke: "transparent", points: { show: false } }, { stroke: "transparent", points: { show: false } });
          }
          const points = { show: curves.steps.length <= 40, size: 4, fill: color };
          if (this.smoothing > 0) {
            columns.push(keep(column.mean));
            series.push({ stroke: faint(color, 35), width: 1, points: { show: false }, spanGaps: true });
          }
          columns.push(keep(this.smoothing > 0 ? smoothed(column.mean, this.smoothing) : column.mean));
          series.push({ stroke: color, width: 1.75, points, spanGaps: true, dash: run ? [6, 3] : undefined });
          const label = this.runs.length > 1 ? name : part.label;
          labels.push({ at: series.length, label, color });
          tables.push([curves.steps, ...columns]);
        }
      });
      return { data: uPlot.join(tables), series, bands, labels };
    }

    stacked() {
      const { curves } = this.runs[0];
      const parts = this.define.parts.filter((part) => curves.columns[part.name]);
      let below = curves.steps.map(() => 0);
      const layers = parts.map((part) => {
        const own = curves.columns[part.name].mean;
        below = below.map((value, at) => value + (own[at] || 0));
        return below;
      });
      const labels = parts.map((part, at) => ({
        at: parts.length - at, label: part.label, color: css(part.color),
        value: (index) => curves.columns[part.name].mean[index],
      }));
      const topFirst = [...parts.keys()].reverse();
      return {
        data: [curves.steps, ...topFirst.map((at) => layers[at])],
        series: topFirst.map((at) => {
          const color = css(parts[at].color);
          return { stroke: color, fill: faint(color, 45), width: 1, points: { show: curves.steps.length === 1, size: 5 } };
        }),
        bands: topFirst.slice(0, -1).map((_, at) => ({ series: [at + 1, at + 2] })),
        labels,
      };
    }

    /** Write the numbers under the cursor, or the newest. */
    tell(plot, labels) {
      const at = plot.cursor.idx ?? plot.data[0].length - 1;
      const format = this.define.format || Format.number;
      const parts = labels.map((label) => {
        let value = label.value ? label.value(at) : plot.data[label.at][at];
        for (let back = at; !label.value && (value === null || value === undefined) && back > 0; back--) {
          value = plot.data[label.at][back];
        }
        const mark = labels.length > 1 ? el("i", { class: "mark" }) : null;
        if (mark) mark.style.background = label.color;
        return el("span", {}, mark, label.label ? `${label.label} ` : null, el("b", { text: format(value) }));
      });
      const step = plot.data[0][at];
      const where = step === undefined ? null : el("span", { class: "quiet", text: `step ${Format.number(step)}` });
      this.values.replaceChildren(...parts, ...(where && plot.cursor.idx !== null && plot.cursor.idx !== undefined ? [where] : []));
    }
  }

  function redrawAll() {
    for (const chart of shown) chart.draw();
  }

  let pending = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => {
      for (const chart of shown) {
        if (chart.plot && Math.abs(chart.plot.width - chart.canvas.clientWidth) > 1) chart.draw();
        else if (!chart.plot) chart.draw();
      }
    });
  }).observe(document.documentElement);

  return { Chart, redrawAll, shown: () => [...shown] };
})();
