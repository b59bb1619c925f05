// The frame: which view is shown, the line that says how the run is, the theme, and the keys.
"use strict";

const App = (() => {
  const OFTEN = 2000;
  const SELDOM = 15000;
  let state = null;
  let view = "overview";

  const byId = (id) => document.getElementById(id);

  function notice(text) {
    const box = byId("notice");
    box.textContent = text;
    box.hidden = false;
    clearTimeout(notice.timer);
    notice.timer = setTimeout(() => { box.hidden = true; }, 2500);
  }

  /** One line on how the run is, and how worrying that is. */
  function statusOf({ health, newest, steps }) {
    const step = newest.step ?? (health ? health.step : 0) ?? 0;
    const far = `step ${Format.number(step)}${steps ? ` of ${Format.number(steps)}` : ""}`;
    if (!health) return ["unknown", `${far} · the run says nothing of itself (no health.json)`];
    const served = health.served_version === null || health.served_version === undefined ? "" : ` · serves version ${Format.number(health.served_version)}`;
    if (health.status === "ended") return ["ended", `ended · ${far}${served}`];
    if (health.is_gone) return ["gone", `gone: nothing heard for ${Format.seconds(health.age_seconds)} · ${far}`];
    const silent = Object.entries(health.silent_processes || {});
    const late = silent.length ? ` · silent: ${silent.map(([rank, age]) => `rank ${rank} for ${Format.seconds(age)}`).join(", ")}` : "";
    const doing = `${health.phase} for ${Format.seconds(health.phase_seconds + health.age_seconds)}`;
    const whom = health.waiting_for && health.phase !== "training" ? `, waiting for ${health.waiting_for}` : "";
    return [health.status === "overdue" ? "gone" : "ok", `${doing}${whom} · ${far}${served}${late}`];
  }

  function drawHeader() {
    byId("run-name").textContent = state.runs && state.runs.length > 1 ? state.runs.join(" and ") : state.name;
    document.title = `${state.name} · step ${Format.number(state.newest.step ?? 0)}`;
    byId("run-facts").textContent = [state.model, state.loss, state.estimator].filter(Boolean).join(" · ");
    const [kind, text] = Source.isReport ? ["ended", `report of ${Format.time(state.made_at)} · step ${Format.number(state.newest.step ?? 0)}`] : statusOf(state);
    const line = byId("status");
    if (line.textContent !== text) line.textContent = text;
    line.className = `status ${kind}`;
    const share = state.steps ? Math.min(1, (state.newest.step || 0) / state.steps) : 0;
    byId("progress").firstElementChild.style.width = `${100 * share}%`;
  }

  async function refresh() {
    let wait = OFTEN;
    if (!document.hidden) {
      try {
        state = await Source.state();
        drawHeader();
        Overview.update(state, view === "overview");
        if (!state.health || state.health.status === "ended" || state.health.is_gone) wait = SELDOM;
      } catch (error) {
        byId("status").className = "status gone";
        byId("status").textContent = `the page's server does not answer: ${error.message}`;
        wait = SELDOM / 3;
      }
    }
    if (!Source.isReport) setTimeout(refresh, wait);
  }

  function route() {
    const [, name, batch, group] = location.hash.split("/");
    view = name === "rollouts" ? "rollouts" : "overview";
    for (const each of ["overview", "rollouts"]) {
      byId(each).hidden = each !== view;
      if (each === view) byId(`tab-${each}`).setAttribute("aria-current", "page");
      else byId(`tab-${each}`).removeAttribute("aria-current");
    }
    if (view === "overview") Overview.shown();
    else {
      const isPlace = /^\d+$/.test(batch || "") && /^\d+$/.test(group || "");
      Rollouts.show(isPlace ? { batch: Number(batch), group: Number(group) } : null);
    }
  }

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    Charts.redrawAll();
  }

  function onKey(event) {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      1: () => { location.hash = "#/overview"; },
      2: () => { location.hash = "#/rollouts"; },
      j: () => view === "rollouts" && Rollouts.go(1),
      k: () => view === "rollouts" && Rollouts.go(-1),
      "/": () => { if (view === "rollouts") { event.preventDefault(); Rollouts.focusSearch(); } },
      "?": () => notice("1 overview · 2 rollouts · j, k next and previous group · / filter · arrows move through tokens"),
      Escape: () => { if (view === "rollouts") location.hash = "#/rollouts"; },
    };
    if (event.key in keys) keys[event.key]();
  }

  function start() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    let stored = null;
    try { stored = localStorage.getItem("theme"); } catch { /* a file without storage */ }
    setTheme(stored || (dark.matches ? "dark" : "light"));
    dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
    byId("theme").addEventListener("click", () => {
      const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try { localStorage.setItem("theme", theme); } catch { /* the same */ }
      setTheme(theme);
    });
    Overview.build();
    Rollouts.build();
    addEventListener("hashchange", route);
    addEventListener("keydown", onKey);
    document.addEventListener("scroll", Tokens.hide, { passive: true });
    route();
    refresh();
  }

  return { start, notice };
})();

App.start();
