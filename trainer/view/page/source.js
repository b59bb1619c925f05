// Where the page's data comes from: the server that it came from, or the report that it is part of.
"use strict";

const Source = (() => {
  const embedded = document.getElementById("report-data");
  const report = embedded ? JSON.parse(embedded.textContent) : null;

  async function ask(path, parameters) {
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(parameters || {})) {
      if (value !== null && value !== undefined && value !== "") words.set(name, value);
    }
    const reply = await fetch(`${path}?${words}`, { headers: { Accept: "application/json" } });
    const text = await reply.text();
    let value;
    try {
      value = JSON.parse(text);
    } catch {
      throw new Error(text.trim() || `the server answered ${reply.status}`);
    }
    if (!reply.ok) throw new Error(value.error || `the server answered ${reply.status}`);
    return value;
  }

  /** The part of sampled curves that lies between two steps. */
  function between(curves, first, last) {
    if (first === null || first === undefined) return curves;
    const kept = curves.steps.map((step, at) => [step, at]).filter(([step]) => step >= first && step <= last);
    const pick = (values) => kept.map(([, at]) => values[at]);
    const columns = {};
    for (const [name, column] of Object.entries(curves.columns)) {
      columns[name] = { mean: pick(column.mean), low: pick(column.low), high: pick(column.high) };
    }
    return { ...curves, steps: kept.map(([step]) => step), columns };
  }

  /** A report leaves out the range of a bucket where it is its mean. */
  function whole(curves) {
    for (const column of Object.values(curves.columns)) {
      column.low = column.low || column.mean;
      column.high = column.high || column.mean;
    }
    return curves;
  }

  function missing(what) {
    throw new Error(`${what} is not in this report; atropos-train view shows the whole run`);
  }

  if (report) {
    return {
      isReport: true,
      state: async () => report.state,
      curves: async (kind, names, { first, last, run = 0 } = {}) =>
        between(whole(report.curves[run][kind]), first, last),
      batches: async ({ outcome, before } = {}) => ({
        batches: before ? [] : report.batches.filter((each) => !outcome || each.outcome === outcome),
        next: null,
      }),
      group: async (batch, group) => report.groups[`${batch}/${group}`] || missing(`group ${group} of batch ${batch}`),
    };
  }
  return {
    isReport: false,
    async state() {
      const state = await ask("/api/state");
      if (!state.live) return state;
      try { // on the trainer's own port, what it says at this moment; it answers 503 where it is overdue
        const reply = await fetch("/health");
        return { ...state, health: { ...(await reply.json()), age_seconds: 0, is_gone: false } };
      } catch {
        return state;
      }
    },
    curves: (kind, names, { first, last, run = 0, points, known } = {}) =>
      ask("/api/curves", { kind, columns: names.join(","), first, last, run, points, known }),
    batches: ({ before, outcome, limit } = {}) => ask("/api/batches", { before, outcome, limit }),
    group: (batch, group, tokens) => ask("/api/group", { batch, group, tokens }),
  };
})();
