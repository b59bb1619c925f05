// The tokens of a group: coloured by what was recorded of them, with all numbers of the one under the pointer.
"use strict";

const Tokens = (() => {
  const card = document.getElementById("token-card");

  // Bounds between the shades of each colouring, from the faintest on.
  const SIGNED = [0.02, 0.15, 0.4, 0.7]; // of the largest in the group
  const NATS = [0.1, 0.5, 1.5, 3, 6];
  const DIFFERENCE = [0.02, 0.1, 0.25, 0.5, 1];

  const shade = (bounds, value) => bounds.filter((bound) => value >= bound).length;

  const MODES = {
    advantage: {
      label: "Advantage",
      legend: ["pushed down", "pushed up"],
      kind: "signed",
      isKnown: (group) => group.sequences.some((each) => each.advantages),
      style(sequence, at, largest) {
        const value = sequence.advantages ? sequence.advantages[at] : null;
        if (!value) return null;
        return (value > 0 ? "up" : "down") + (1 + shade(SIGNED, Math.abs(value) / largest));
      },
    },
    sampler: {
      label: "Log-prob",
      legend: ["likely", "unlikely"],
      kind: "plain",
      isKnown: (group) => group.sequences.some((each) => each.sampler),
      style(sequence, at) {
        const value = sequence.sampler ? sequence.sampler[at] : null;
        if (value === null || value === undefined) return null;
        return "rare" + shade(NATS, -value);
      },
    },
    difference: {
      label: "Trainer − sampler",
      legend: ["trainer finds it less likely", "more likely"],
      kind: "signed",
      isKnown: (group) => group.sequences.some((each) => each.trainer && each.sampler),
      style(sequence, at) {
        const value = difference(sequence, at);
        if (value === null) return null;
        const strength = shade(DIFFERENCE, Math.abs(value));
        return strength ? (value > 0 ? "up" : "down") + strength : null;
      },
    },
    none: { label: "Plain", legend: null, isKnown: () => true, style: () => null },
  };

  function difference(sequence, at) {
    const [ours, theirs] = [sequence.trainer && sequence.trainer[at], sequence.sampler && sequence.sampler[at]];
    if (ours === null || ours === undefined || theirs === null || theirs === undefined) return null;
    return ours - theirs;
  }

  /** Spaces and line ends of a token, made visible. */
  const visible = (piece) => (piece.trim() === piece && piece ? piece : JSON.stringify(piece));

  /**
   * The tokens of a sequence, or of a prompt, in turns.
   *
   * `owner`: {ids, text, turns} and, of a sequence, the columns beside them. `offset`: its first position.
   */
  function draw(owner, mode, { largest = 1, offset = 0, number = 0 } = {}) {
    const box = el("div", { class: "tokens", tabindex: "0", role: "textbox", "aria-readonly": "true", "aria-multiline": "true", "data-sequence": number });
    const begins = new Map((owner.turns || []).map((turn) => [turn.start, turn]));
    let line = box;
    let marker = -1; // tokens before this one only say whose turn it is
    owner.ids.forEach((id, at) => {
      const turn = begins.get(at);
      if (turn) {
        line = el("div", { class: `turn ${turn.role.replace(/[^a-z]/gi, "")}` }, el("span", { class: "role", text: turn.role || "turn" }));
        box.append(line);
        marker = turn.body;
      }
      const trained = owner.trained ? owner.trained[at] : 0;
      const names = ["t"];
      if (!trained) names.push("masked");
      if (at < marker) names.push("marker");
      const style = trained ? MODES[mode].style(owner, at, largest) : null;
      if (style) names.push(style);
      const token = el("span", { class: names.join(" "), text: owner.text[at] });
      token.about = { owner, at, offset };
      line.append(token);
    });
    if (owner.cut) box.append(el("p", { class: "quiet", text: `… and ${Format.count(owner.cut, "token")} more` }));
    watch(box);
    return box;
  }

  function tell(token, x, y) {
    const { owner, at, offset } = token.about;
    const rows = [["token", `${owner.ids[at]}`], ["position", Format.number(offset + at)]];
    const number = (name, label) => {
      const value = owner[name] ? owner[name][at] : null;
      if (value !== null && value !== undefined) rows.push([label, Format.signed(value)]);
      return value;
    };
    if (owner.trained && owner.trained[at]) {
      number("advantages", "advantage");
      const sampler = number("sampler", "sampler log-prob");
      if (sampler !== null && sampler !== undefined) rows.push(["its probability", Format.percent(Math.exp(sampler))]);
      number("trainer", "trainer log-prob");
      const off = difference(owner, at);
      if (off !== null) rows.push(["trainer − sampler", Format.signed(off)]);
    } else {
      rows.push(["", "not trained on"]);
    }
    card.replaceChildren(
      el("code", { text: owner.text[at] ? visible(owner.text[at]) : "(part of the character before)" }),
      el("dl", {}, rows.flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })])));
    card.hidden = false;
    const { width, height } = card.getBoundingClientRect();
    card.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
    card.style.top = `${y + 22 + height > innerHeight ? Math.max(8, y - height - 10) : y + 22}px`;
  }

  function hide() {
    card.hidden = true;
    for (const each of document.querySelectorAll(".t.here")) each.classList.remove("here");
  }

  function watch(box) {
    box.addEventListener("pointerover", (event) => {
      if (event.target.about) tell(event.target, event.clientX, event.clientY);
    });
    box.addEventListener("pointerleave", hide);
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
      if (!(event.key in steps)) return;
      const all = [...box.querySelectorAll(".t")];
      if (!all.length) return;
      event.preventDefault();
      const before = all.findIndex((each) => each.classList.contains("here"));
      const next = Math.max(0, Math.min(all.length - 1, before + steps[event.key]));
      hide();
      all[next].classList.add("here");
      all[next].scrollIntoView({ block: "nearest" });
      const place = all[next].getBoundingClientRect();
      tell(all[next], place.left, place.top);
    });
  }

  function legend(mode) {
    const { legend: words, kind } = MODES[mode];
    if (!words) return null;
    const shades = kind === "signed"
      ? ["down5", "down3", "down1", "", "up1", "up3", "up5"]
      : ["rare0", "rare1", "rare2", "rare3", "rare4", "rare5"];
    return el("div", { class: "legend" },
      el("span", { text: words[0] }),
      el("span", { class: "scale" }, shades.map((name) => el("i", { class: `t ${name}` }))),
      el("span", { text: words[1] }),
      el("span", { class: "t masked", text: "not trained on" }));
  }

  return { MODES, draw, legend, hide };
})();
