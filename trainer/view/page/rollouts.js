// The rollouts: a list of groups to sort and filter, and one group's answers side by side.
"use strict";

const Rollouts = (() => {
  const root = document.getElementById("rollouts");
  const FEWEST = 24; // groups that are loaded at once, at least
  const SORTS = {
    newest: ["Newest", (one, other) => other.batch - one.batch || one.group - other.group],
    best: ["Best mean score", by("mean", -1)],
    worst: ["Worst mean score", by("mean", 1)],
    spread: ["Largest spread", by("spread", -1)],
    longest: ["Longest", by("longest", -1)],
  };
  const OUTCOMES = { "": "All batches", trained: "Trained", received: "Waiting", set_aside: "Set aside", skipped: "Skipped" };

  let groups = [];
  let shownGroups = [];
  let pruned = 0;
  let read = 0;
  let next = null;
  let outcome = "";
  let order = "newest";
  let words = "";
  let onlyReasons = false;
  let open = null; // {batch, group}
  let detail = null;
  let mode = "advantage";
  let layout = "columns";
  let begun = false;
  let extent = [0, 1]; // the worst and the best score of all groups in the list

  function by(name, direction) {
    return (one, other) => {
      if (one[name] === undefined) return 1;
      if (other[name] === undefined) return -1;
      return direction * (one[name] - other[name]) || other.batch - one.batch;
    };
  }

  const list = el("div", { class: "list", role: "listbox", "aria-label": "Groups", tabindex: "0", keydown: onListKey });
  const summary = el("p", { class: "quiet note", role: "status" });
  const more = el("button", { type: "button", text: "Read older batches", hidden: true, click: () => load(next) });
  const search = el("input", {
    type: "search", placeholder: "Filter: environment, batch, reason, log-probs", "aria-label": "Filter the groups",
    input: () => { words = search.value.toLowerCase(); drawList(); },
  });
  const pane = el("div", { class: "pane", tabindex: "-1" });

  function build() {
    const sort = el("select", { "aria-label": "Sort", change: () => { order = sort.value; drawList(); } },
      Object.entries(SORTS).map(([name, [label]]) => el("option", { value: name, text: label })));
    const filter = el("select", { "aria-label": "Batches", change: () => { outcome = filter.value; load(null); } },
      Object.entries(OUTCOMES).map(([name, label]) => el("option", { value: name, text: label })));
    const reasons = el("input", { type: "checkbox", id: "reasons", change: () => { onlyReasons = reasons.checked; drawList(); } });
    root.append(
      el("div", { class: "side" },
        el("div", { class: "controls" }, sort, filter, search,
          el("label", { for: "reasons", class: "check" }, reasons, "set aside only")),
        summary, list, more),
      pane);
    drawPane();
  }

  async function load(before) {
    more.disabled = true;
    try {
      if (!before) [groups, read, pruned] = [[], 0, 0];
      const wanted = groups.length + FEWEST;
      do {
        const found = await Source.batches({ before, outcome, limit: 10 });
        for (const batch of found.batches) {
          read += 1;
          pruned += batch.pruned ? 1 : 0;
          const facts = { batch: batch.batch, step: batch.step, outcome: batch.outcome, batchReason: batch.reason || batch.unreadable };
          groups.push(...batch.groups.map((group) => ({ ...facts, ...group })));
        }
        before = next = found.next;
      } while (next && groups.length < wanted);
      drawList();
    } catch (error) {
      summary.textContent = error.message;
      next = null;
      drawList(error.message);
    } finally {
      more.disabled = false;
      more.hidden = next === null;
    }
  }

  function matches(group) {
    if (onlyReasons && !group.reason) return false;
    if (!words) return true;
    const said = `environment ${group.environment} batch ${group.batch} step ${group.step} ${group.outcome} ${group.reason || ""} ${group.recorded ? "log-probs" : ""}`;
    return words.split(/\s+/).every((word) => said.toLowerCase().includes(word));
  }

  function drawList(problem) {
    shownGroups = groups.filter(matches).sort(SORTS[order][1]);
    const scored = groups.filter((group) => group.scores);
    const [low, high] = [Math.min(0, ...scored.map((group) => group.worst)), Math.max(0, ...scored.map((group) => group.best))];
    extent = [low, high > low ? high : low + 1];
    const gone = pruned ? `; ${Format.count(pruned, "batch")} no longer kept` : "";
    summary.textContent = problem || `${Format.count(shownGroups.length, "group")} of the newest ${Format.count(read, "batch")}${gone}`;
    list.replaceChildren(...shownGroups.map(row));
    if (!shownGroups.length && !problem) list.append(el("p", { class: "quiet empty", text: groups.length ? "No group matches." : "No batch with groups is here." }));
    markOpen();
  }

  function row(group) {
    const item = el("a", {
      class: "group", role: "option", id: `group-${group.batch}-${group.group}`, tabindex: "-1",
      href: `#/rollouts/${group.batch}/${group.group}`,
      "aria-selected": "false",
    },
      el("span", { class: "where" },
        el("b", { text: `Batch ${group.batch}` }), ` · group ${group.group}`,
        group.step ? el("span", { class: "quiet", text: ` · step ${group.step}` }) : null),
      group.reason ? el("span", { class: "chip bad", text: "set aside" })
        : group.recorded ? el("span", { class: "chip", text: "log-probs", title: "the trainer's own log-probs of this group were recorded" })
        : group.outcome === "trained" ? null
          : el("span", { class: "chip", text: group.outcome === "received" ? "waiting" : group.outcome.replace("_", " ") }),
      group.scores ? strip(group) : el("span"),
      el("span", { class: "facts quiet", text: group.scores
        ? `${Format.short(group.mean)} ± ${Format.short(group.spread)} · up to ${Format.count(group.longest, "token")} · env ${group.environment ?? "?"}`
        : group.reason }));
    if (group.reason && group.scores) item.append(el("span", { class: "facts bad", text: group.reason }));
    return item;
  }

  /** A bar for each score; all groups of the list on one scale. */
  function strip(group) {
    const [low, high] = extent;
    const sorted = [...group.scores].sort((one, other) => other - one);
    return el("span", { class: "strip", title: `scores ${sorted.map(Format.number).join(", ")}` }, sorted.map((score) => {
      const bar = el("i");
      bar.style.height = `${8 + (92 * (score - low)) / (high - low)}%`;
      return bar;
    }));
  }

  function markOpen() {
    for (const item of list.querySelectorAll(".group")) {
      const is = open && item.id === `group-${open.batch}-${open.group}`;
      item.setAttribute("aria-selected", String(Boolean(is)));
      if (is) list.setAttribute("aria-activedescendant", item.id);
    }
    root.classList.toggle("opened", Boolean(open));
  }

  function go(distance) {
    if (!shownGroups.length) return;
    const at = open ? shownGroups.findIndex((each) => each.batch === open.batch && each.group === open.group) : -1;
    const to = shownGroups[Math.max(0, Math.min(shownGroups.length - 1, at + distance))];
    location.hash = `#/rollouts/${to.batch}/${to.group}`;
    const item = document.getElementById(`group-${to.batch}-${to.group}`);
    if (item) item.scrollIntoView({ block: "nearest" });
  }

  function onListKey(event) {
    const distance = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!distance) return;
    event.preventDefault();
    go(distance);
  }

  async function show(place) {
    if (!begun) {
      begun = true;
      load(null);
    }
    const same = open && place && open.batch === place.batch && open.group === place.group;
    open = place;
    markOpen();
    if (!place) {
      detail = null;
      drawPane();
      return;
    }
    if (same && detail) return;
    try {
      pane.classList.add("loading");
      detail = await Source.group(place.batch, place.group);
      if (open !== place) return;
      drawPane();
      pane.scrollTop = 0;
    } catch (error) {
      detail = null;
      drawPane(error.message);
    } finally {
      pane.classList.remove("loading");
    }
  }

  function drawPane(problem) {
    Tokens.hide();
    if (problem) {
      pane.replaceChildren(back(), el("p", { class: "empty", text: problem }));
    } else if (!detail) {
      pane.replaceChildren(el("p", { class: "quiet empty", text: "Choose a group to see what the model wrote, token by token." }));
    } else if (detail.raw !== undefined) {
      pane.replaceChildren(back(), heading(), el("p", { class: "bad", text: detail.reason }), el("pre", { class: "raw", text: detail.raw }));
    } else {
      drawGroup();
    }
  }

  const back = () => el("a", { class: "back", href: "#/rollouts", text: "← All groups" });

  function heading(...buttons) {
    const { batch, group, outcome: became, step } = detail;
    const facts = [
      became === "trained" ? `trained at step ${step}` : became.replace("_", " ").replace("received", "waiting"),
      detail.environment === undefined ? null : `environment ${detail.environment ?? "unknown"}`,
      detail.sequences ? `${Format.count(detail.sequences.length, "answer")}, score ${Format.short(detail.mean)} ± ${Format.short(detail.spread)}` : null,
      detail.advantage_note ? `advantages: ${detail.advantage_note}` : null,
    ].filter(Boolean);
    return el("div", { class: "heading" },
      el("h2", { text: `Batch ${batch} · group ${group}` }), ...buttons,
      el("p", { class: "quiet", text: facts.join(" · ") }));
  }

  function drawGroup() {
    const known = Object.keys(Tokens.MODES).filter((name) => Tokens.MODES[name].isKnown(detail));
    if (!known.includes(mode)) mode = known[0];
    const largest = Math.max(1e-9, ...detail.sequences.flatMap((each) => (each.advantages || []).map((value) => Math.abs(value || 0))));
    const modes = el("div", { class: "segments", role: "group", "aria-label": "Colour by" }, known.map((name) => el("button", {
      type: "button", text: Tokens.MODES[name].label, "aria-pressed": String(name === mode), "data-mode": name,
      click: () => { mode = name; drawPane(); pane.querySelector(`[data-mode=${name}]`).focus(); },
    })));
    const layouts = el("div", { class: "segments", role: "group", "aria-label": "Layout" }, [["columns", "Side by side"], ["rows", "Stacked"]].map(([name, label]) => el("button", {
      type: "button", text: label, "aria-pressed": String(name === layout), "data-layout": name,
      click: () => { layout = name; drawPane(); pane.querySelector(`[data-layout=${name}]`).focus(); },
    })));
    const copies = [
      el("button", { type: "button", text: "Copy text", click: () => copy(asText(detail), "The text") }),
      el("button", { type: "button", text: "Copy JSON", click: () => copy(JSON.stringify(detail), "The JSON") }),
    ];
    const prompt = detail.prefix.ids.length ? el("details", { class: "prompt", open: true },
      el("summary", {}, "Shared by all answers ", el("span", { class: "quiet", text: Format.count(detail.prefix.ids.length + detail.prefix.cut, "token") })),
      Tokens.draw(detail.prefix, "none")) : null;
    const sorted = [...detail.sequences].sort((one, other) => other.score - one.score || one.index - other.index);
    const offset = detail.prefix.ids.length + detail.prefix.cut;
    pane.replaceChildren(
      back(), heading(el("div", { class: "buttons" }, copies)),
      ...(detail.reason ? [el("p", { class: "bad", text: `Set aside: ${detail.reason}` })] : []),
      ...(detail.decodes ? [] : [el("p", { class: "quiet", text: `Token ids are shown: ${detail.tokenizer}` })]),
      el("div", { class: "controls" }, modes, layouts, Tokens.legend(mode)),
      ...(prompt ? [prompt] : []),
      el("div", { class: `answers ${layout}` }, sorted.map((sequence) => answer(sequence, largest, offset))));
  }

  function answer(sequence, largest, offset) {
    const facts = [
      sequence.advantage === null ? null : `advantage ${Format.signed(sequence.advantage)}`,
      `${Format.number(sequence.trained_tokens)}/${Format.number(sequence.length)} trained`,
    ].filter(Boolean);
    const sign = sequence.advantage > 0 ? "up" : sequence.advantage < 0 ? "down" : "";
    const cut = sequence.cut ? el("button", { type: "button", text: "Load more tokens", click: async () => {
      detail = await Source.group(open.batch, open.group, 4 * (sequence.ids.length + 1));
      drawPane();
    } }) : null;
    return el("article", { class: `answer ${sign}`, "aria-label": `Answer ${sequence.index}` },
      el("header", {},
        el("b", { class: "score", text: Format.number(sequence.score), title: "score" }),
        el("span", { class: "quiet", text: `#${sequence.index} · ${facts.join(" · ")}` })),
      sequence.override && Object.keys(sequence.override).length
        ? el("p", { class: "quiet", text: `wishes: ${JSON.stringify(sequence.override)}` }) : null,
      Tokens.draw(sequence, mode, { largest, offset, number: sequence.index }),
      cut && !Source.isReport ? cut : null,
      messages(sequence));
  }

  /** The conversation as the environment wrote it down, where it did. */
  function messages(sequence) {
    if (!sequence.messages) return null;
    const all = Array.isArray(sequence.messages) ? sequence.messages : [sequence.messages];
    return el("details", {}, el("summary", { text: "As the environment wrote it down" }),
      all.map((message) => {
        const isTurn = message && typeof message === "object" && "role" in message;
        const content = isTurn ? message.content : message;
        return el("div", { class: "turn" },
          isTurn ? el("span", { class: "role", text: String(message.role) }) : null,
          el("span", { text: typeof content === "string" ? content : JSON.stringify(content) }));
      }));
  }

  function asText(group) {
    const prompt = group.prefix.text.join("");
    const answers = group.sequences.map((each) =>
      `--- answer ${each.index}, score ${each.score}${each.advantage === null ? "" : `, advantage ${each.advantage}`}\n${each.text.join("")}`);
    return `batch ${group.batch}, group ${group.group}\n${prompt}\n${answers.join("\n")}\n`;
  }

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no permission, or a page that is no secure context
      const area = el("textarea", { class: "offscreen", text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    App.notice(`${what} of batch ${detail.batch}, group ${detail.group} was copied`);
  }

  return { build, show, go, focusSearch: () => search.focus() };
})();
