// Numbers and elements. Whatever comes from a run becomes text here, never markup.
"use strict";

/** Makes an element: attributes by name, functions as listeners, everything else as children. */
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name === "text") made.textContent = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const Format = {
  /** A number to read: enough digits to tell it from its neighbours, no more. */
  number(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (typeof value === "boolean") return value ? "yes" : "no";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e").replace("-", "−");
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 4;
    const text = Number.isInteger(value) ? value.toLocaleString("en") : value.toLocaleString("en", {
      minimumFractionDigits: 0,
      maximumFractionDigits: digits,
    });
    return text.replace("-", "−");
  },

  /** Three digits, for places with little room. */
  short(value) {
    return value === null || value === undefined ? "–" : Format.number(Number(value.toPrecision(3)));
  },

  signed(value) {
    if (value === null || value === undefined) return "–";
    return (value > 0 ? "+" : "") + Format.number(value);
  },

  percent(value) {
    if (value === null || value === undefined) return "–";
    return `${Format.number(Math.round(value * 1000) / 10)} %`;
  },

  seconds(value) {
    if (value === null || value === undefined) return "–";
    if (value < 120) return `${Format.number(Math.round(value * 10) / 10)} s`;
    if (value < 7200) return `${Math.round(value / 60)} min`;
    return `${Format.number(Math.round(value / 360) / 10)} h`;
  },

  bytes(value) {
    if (value < 1e4) return `${value} B`;
    return value < 1e7 ? `${Math.round(value / 1e3)} kB` : `${Math.round(value / 1e6)} MB`;
  },

  time(seconds) {
    return new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC";
  },

  count(number, noun) {
    const many = noun.endsWith("ch") ? `${noun}es` : noun.endsWith("y") ? `${noun.slice(0, -1)}ies` : `${noun}s`;
    return `${Format.number(number)} ${number === 1 ? noun : many}`;
  },
};
