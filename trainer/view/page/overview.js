// The overview: a line of numbers, the curves, what was set aside, and the publishes with their proofs.
"use strict";

const Overview = (() => {
  const root = document.getElementById("overview");
  const CHARTS = [
    { title: "Reward", parts: [{ name: "reward_mean" }], help: "Mean score of the sequences of a step" },
    { title: "Loss", parts: [{ name: "loss" }], help: "Its unit depends on the loss function" },
    { title: "Mismatch KL", parts: [{ name: "mismatch_kl" }], help: "KL(sampler ‖ trainer), in nats a token, before the step" },
    { title: "Entropy", parts: [{ name: "entropy" }], help: "Of the policy at trained tokens, in nats" },
    { title: "Gradient norm", parts: [{ name: "grad_norm" }], help: "Before clipping" },
    { title: "Staleness", parts: [{ name: "staleness" }], help: "Versions between the one that was served when the batch came and the trainer's" },
    { title: "Tokens per second", parts: [{ name: "tokens_per_second" }], help: "Trained tokens over the seconds of a step" },
    {
      title: "Seconds of a step", stacked: true, format: Format.seconds,
      parts: [
        { name: "training_seconds", label: "training", color: "--part-1" },
        { name: "publishing_seconds", label: "publishing", color: "--part-3" },
        { name: "waiting_seconds", label: "waiting", color: "--part-2" },
      ],
      help: "What the training thread did",
    },
    { title: "Set aside", parts: [{ name: "set_aside_share" }], format: Format.percent, help: "Share of the groups of the newest batches" },
  ];
  const PUBLISH = {
    title: "Seconds of a publish", stacked: true, format: Format.seconds,
    parts: [
      { name: "publish_stage_seconds", label: "write", color: "--part-1" },
      { name: "publish_load_seconds", label: "load", color: "--part-3" },
      { name: "publish_verify_seconds", label: "prove", color: "--part-2" },
    ],
  };

  let charts = [];
  let publishChart = null;
  let range = null;
  let smoothing = 0;
  let position = -1;
  let runs = [];
  let names = [];
  let drawnRuns = [];
  let loading = null;
  const further = new Map();

  const tiles = el("div", { class: "tiles" });
  const grid = el("div", { class: "grid" });
  const setAside = el("div", { class: "panel" });
  const publishes = el("div", { class: "panel wide" });
  const note = el("p", { class: "quiet note" });
  const reset = el("button", { type: "button", text: "Whole run", hidden: true, click: () => zoom(null) });
  const add = el("select", { "aria-label": "Add a chart", change: () => addChart(add.value) });

  function build() {
    const slider = el("input", {
      type: "range", min: "0", max: "0.98", step: "0.02", value: "0", id: "smoothing",
      input: () => {
        smoothing = Number(slider.value);
        drawAll();
      },
    });
    root.append(
      tiles,
      el("div", { class: "controls" },
        el("label", { for: "smoothing" }, "Smoothing"), slider, add, reset,
        el("span", { class: "quiet grow", text: "Drag across a chart to zoom, double-click for the whole run" })),
      grid, note,
      el("div", { class: "grid panels" }, setAside, publishes));
    charts = CHARTS.map((define) => new Charts.Chart(define, zoom));
    grid.append(...charts.map((chart) => chart.element));
    publishChart = new Charts.Chart(PUBLISH, zoom);
  }

  function zoom(first, last) {
    range = first === null ? null : { first: Math.max(0, first), last };
    reset.hidden = range === null;
    position = -1;
    load();
  }

  function addChart(name) {
    if (!name || further.has(name)) return;
    const chart = new Charts.Chart({ title: name, parts: [{ name }] }, zoom);
    further.set(name, chart);
    charts.push(chart);
    grid.append(chart.element);
    add.value = "";
    position = -1;
    load();
  }

  function drawAll() {
    for (const chart of charts) chart.show(drawnRuns, smoothing);
  }

  function columns() {
    return [...new Set(charts.flatMap((chart) => chart.define.parts.map((part) => part.name)))];
  }

  /** Load the curves; once at a time, and once more if something changed meanwhile. */
  async function load() {
    if (loading) {
      loading = "again";
      return;
    }
    loading = "once";
    try {
      const own = Math.max(1, runs.length);
      const wide = Math.min(1600, Math.max(400, root.clientWidth));
      const asked = [...Array(own).keys()].map((run) =>
        Source.curves("step", columns(), { ...range, run, points: wide }));
      const curves = await Promise.all(asked);
      drawnRuns = curves.map((each, run) => ({ name: runs[run] || "", curves: each }));
      position = curves[0].position;
      if (!names.length || curves[0].names.length !== names.length) fillNames(curves[0].names);
      drawAll();
      note.textContent = curves[0].every > 1
        ? `Of this long run one of ${curves[0].every} steps is drawn; zoom in to see each.` : "";
      drawPublishes(await Source.curves("publish", [], { ...range, points: 400 }));
    } catch (error) {
      note.textContent = `The curves could not be loaded: ${error.message}`;
    } finally {
      const again = loading === "again";
      loading = null;
      if (again) load();
    }
  }

  function fillNames(found) {
    names = found;
    const drawn = new Set(columns());
    const others = found.filter((name) => !drawn.has(name));
    add.replaceChildren(
      el("option", { value: "", text: "Add a chart …" }),
      ...others.map((name) => el("option", { value: name, text: name })));
  }

  function drawPublishes(curves) {
    const rows = curves.steps.map((step, at) => ({ step, at })).reverse().slice(0, 8);
    const cell = (name, at) => (curves.columns[name] ? curves.columns[name].mean[at] : null);
    if (!rows.length) {
      publishes.replaceChildren(el("h3", { text: "Publishes" }), el("p", { class: "quiet", text: "No version was published yet." }));
      return;
    }
    const body = rows.map(({ step, at }) => el("tr", {},
      el("td", { text: Format.number(step) }),
      el("td", {}, cell("publish_verified", at)
        ? el("span", { class: "good", text: "✓ proven" })
        : el("span", { class: "bad", text: "not proven" })),
      el("td", { text: Format.number(cell("publish_mean_difference", at)) }),
      el("td", { text: Format.number(cell("publish_max_difference", at)) }),
      el("td", { text: Format.percent(cell("publish_fraction_arrived", at)) }),
      el("td", { text: Format.seconds(cell("publish_pause_seconds", at)) }),
      el("td", { text: Format.seconds(cell("publish_seconds", at)) }),
      el("td", { text: `${Format.number(cell("publish_servers", at))}${cell("publish_servers_lost", at) ? ` (${cell("publish_servers_lost", at)} lost)` : ""}` })));
    const heads = ["Version", "Proof", "Mean diff.", "Largest", "Arrived", "Paused", "In all", "Servers"];
    const titles = ["", "", "Mean difference of log-probs between server and trainer, in nats", "Largest difference, in nats",
      "How far the log-probs have moved to the new version's", "How long generation stood still", "", ""];
    publishes.replaceChildren(
      el("h3", { text: "Publishes" }),
      publishChart.element,
      el("div", { class: "scroll" }, el("table", { class: "numbers" },
        el("thead", {}, el("tr", {}, heads.map((head, at) => el("th", { text: head, title: titles[at] || null, scope: "col" })))),
        el("tbody", {}, body))));
    publishChart.show([{ name: "", curves }], 0);
  }

  function drawTiles(state) {
    const row = state.newest || {};
    const health = state.health || {};
    const publish = state.publish || {};
    const facts = [
      ["Step", row.step === undefined ? "–" : Format.number(row.step), state.steps ? `of ${Format.number(state.steps)}` : ""],
      ["Reward", Format.number(row.reward_mean), row.reward_std === undefined ? "" : `± ${Format.number(row.reward_std)} in the batch`],
      ["Loss", Format.number(row.loss), row.grad_norm === undefined ? "" : `gradient ${Format.number(row.grad_norm)}`],
      ["Mismatch KL", Format.number(row.mismatch_kl), "nats a token"],
      ["Tokens/s", Format.number(row.tokens_per_second), row.trained_tokens === undefined ? "" : `${Format.number(row.trained_tokens)} trained`],
      ["Served", publish.version === undefined ? "–" : `v${Format.number(health.served_version ?? publish.version)}`,
        publish.publish_verified === undefined ? "" : publish.publish_verified ? "proven" : "not proven"],
      ["Set aside", Format.percent(row.set_aside_share), Format.count(row.set_aside_groups_total || 0, "group")],
    ];
    tiles.replaceChildren(...facts.map(([name, value, more]) =>
      el("div", { class: "tile" }, el("span", { class: "name", text: name }), el("b", { text: value }), el("span", { class: "quiet", text: more }))));
  }

  function drawSetAside(state) {
    const reasons = Object.entries(state.reasons);
    const most = Math.max(1, ...reasons.map(([, count]) => count));
    const counted = Object.entries(state.batches).map(([name, count]) => `${Format.number(count)} ${name.replace("_", " ").replace("received", "waiting")}`);
    const bars = reasons.map(([reason, count]) => {
      const bar = el("div", { class: "bar" });
      bar.style.width = `${Math.max(2, (100 * count) / most)}%`;
      return el("li", {}, el("span", { text: reason }), el("b", { text: Format.number(count) }), bar);
    });
    const skipped = state.skipped.slice(-4).reverse().map((row) =>
      el("li", {}, el("span", { text: `batch ${row.batch}: ${row.reason}` })));
    setAside.replaceChildren(...[
      el("h3", { text: "What was not trained on" }),
      el("p", { class: "quiet", text: counted.length ? `Batches: ${counted.join(", ")}` : "No journal is here." }),
      reasons.length ? el("ul", { class: "reasons" }, bars) : el("p", { class: "quiet", text: "No group was set aside." }),
      skipped.length ? el("h4", { text: `Batches passed over (${Format.number(state.skipped_count)})` }) : null,
      skipped.length ? el("ul", { class: "reasons" }, skipped) : null,
    ].filter(Boolean));
  }

  return {
    build,
    /** Take the newest state; loads the curves if there is something new and they are looked at. */
    update(state, isShown) {
      runs = state.runs || [state.name];
      drawTiles(state);
      drawSetAside(state);
      if (isShown && state.position !== position) load();
    },
    shown: () => (position < 0 ? load() : Charts.redrawAll()),
  };
})();
