// One change of many captions: what it would do is shown before it is done.
import { el, errorCard, newest, plural, post, toast } from "/web/core.js";

const KINDS = [
  ["add", "Add tags", ["text", "front"]],
  ["remove", "Remove tags", ["text"]],
  ["replace", "Find and replace", ["text", "into", "match_case", "pattern"]],
  ["prepend", "Put text in front", ["text"]],
  ["append", "Put text behind", ["text"]],
  ["sort", "Sort tags", ["by", "keep"]],
  ["unique", "Remove duplicate tags", []],
];

export function makeBulk(base, kit) {
  const kind = el("select", { "aria-label": "What to do", onchange: () => shape() }, KINDS.map(([key, label]) => el("option", { value: key }, label)));
  const look = () => later();
  const check = (label, checked, title = "") => {
    const box = el("input", { type: "checkbox", checked, onchange: look });
    return [box, el("label", { class: "row tick", title }, box, label)];
  };
  const text = el("input", { "aria-label": "Text", oninput: look });
  const into = el("input", { "aria-label": "Replace with", placeholder: "Replace with", oninput: look });
  const [front, frontLabel] = check("in front", false);
  const [match_case, caseLabel] = check("Match case", true);
  const [pattern, patternLabel] = check("Regular expression", false, "As in Python: \\1 in the replacement is the first group");
  const by = el("select", { "aria-label": "Sort by", onchange: look }, el("option", { value: "name" }, "by name"), el("option", { value: "frequency" }, "commonest first"));
  const keep = el("input", { type: "number", min: 0, max: 100, value: 0, "aria-label": "Leading tags that stay", oninput: look });
  const keepLabel = el("label", { class: "row tick" }, "first", keep, "stay");
  const scope = el("select", { "aria-label": "Which pictures", onchange: look }, el("option", { value: "all" }), el("option", { value: "picked" }));
  const fields = { text, into, front: frontLabel, match_case: caseLabel, pattern: patternLabel, by, keep: keepLabel };
  const apply = el("button", { type: "button", class: "primary small", disabled: true, onclick: () => act() }, "Apply");
  const told = el("p", { class: "subdued", role: "status" });
  const list = el("table", { class: "changes" });
  const node = el("form", { class: "card bulk-edit", "aria-label": "Edit captions", onsubmit: (event) => { event.preventDefault(); if (!apply.disabled) act(); } },
    el("div", { class: "row" }, kind, ...Object.values(fields), scope, apply), told, list);
  const latest = newest();
  let count = 0; // captions that the previewed change would change
  let timer = 0;
  let ready = null; // the body that was previewed, with its key

  function shape() {
    const wanted = KINDS.find(([key]) => key === kind.value)[2];
    for (const [name, field] of Object.entries(fields)) field.hidden = !wanted.includes(name);
    text.placeholder = { add: "tag, another tag", remove: "tag, another tag", replace: "Find" }[kind.value] || "Text";
    later();
  }

  function picks() {
    const count = kit.picked().length;
    const before = scope.value;
    const seen = kit.seen().length;
    scope.options[0].textContent = hides() ? `the ${seen} shown` : `all ${seen}`;
    scope.options[1].textContent = `the ${count} selected`;
    scope.options[1].disabled = !count;
    if (!count) scope.value = "all";
    else if (picks.last === 0) scope.value = "picked";
    if (node.isConnected && (before !== scope.value || (scope.value === "picked" ? picks.last !== count : picks.seen !== seen))) later();
    Object.assign(picks, { last: count, seen });
  }
  picks.last = 0;
  /** Whether a search or a filter hides some: nobody means those. */
  const hides = () => kit.seen().length < kit.images().filter((image) => !image.excluded).length;

  function body() {
    const given = { kind: kind.value, text: text.value, into: into.value, pattern: pattern.checked, match_case: match_case.checked, front: front.checked, by: by.value, keep: Math.max(0, Math.min(100, Number(keep.value) || 0)) };
    const chosen = scope.value === "picked" ? kit.picked() : hides() ? kit.seen() : null;
    return { ...given, names: chosen && chosen.map((image) => image.rel) };
  }

  function later() {
    clearTimeout(timer);
    apply.disabled = true;
    ready = null;
    latest(); // what is on its way was asked before this change
    timer = setTimeout(preview, 250);
  }

  async function preview() {
    const needs = KINDS.find(([key]) => key === kind.value)[2].includes("text");
    if (needs && !(kind.value === "replace" ? text.value : text.value.trim())) return draw(null);
    try {
      const given = body();
      const found = await latest(post(`${base}/bulk/preview`, given));
      if (!found) return;
      ready = { ...given, key: found.key };
      draw(found);
    } catch (error) {
      draw(null);
      told.replaceChildren(errorCard(error));
    }
  }

  function draw(found) {
    count = found?.count || 0;
    apply.disabled = !found?.count;
    apply.textContent = found?.count ? `Change ${plural(found.count, "caption")}` : "Apply";
    told.textContent = !found ? "" : found.count ? `${found.count} of ${plural(found.total, "caption")} would change${found.count > found.changes.length ? `; the first ${found.changes.length}:` : ":"}` : "No caption would change.";
    list.replaceChildren(...(found?.changes || []).map((change) => el("tr", {}, el("th", { scope: "row", title: change.rel }, change.rel.split("/").pop()), el("td", {}, differing(change.before, change.after)))));
  }

  async function act() {
    const [given, changed] = [ready, count];
    if (!given) return;
    apply.disabled = true;
    try {
      kit.take(await kit.save(() => post(`${base}/bulk`, given))); // after a caption that is just being left
      toast(`${plural(changed, "caption")} changed.`);
      if (["prepend", "append"].includes(given.kind)) text.value = ""; // pressed again it would stand there twice
    } catch (error) {
      if (error.status === 409) later();
      else told.replaceChildren(errorCard(error));
    }
  }

  shape();
  return {
    node,
    picks,
    show: () => (picks(), later()),
    /** Begins with what is asked for elsewhere. */
    begin: (given) => { kind.value = given.kind; text.value = given.text; shape(); text.focus(); },
  };
}

/** One line in which what goes is struck out and what comes is marked; both ends that are the same stay plain. */
export function differing(before, after) {
  let start = 0;
  while (start < before.length && before[start] === after[start]) start += 1;
  let end = 0;
  while (end < Math.min(before.length, after.length) - start && before[before.length - 1 - end] === after[after.length - 1 - end]) end += 1;
  const gone = before.slice(start, before.length - end);
  const come = after.slice(start, after.length - end);
  return [before.slice(0, start), gone && el("del", {}, gone), come && el("ins", {}, come), before.slice(before.length - end), after ? null : el("em", { class: "subdued" }, " (empty: the file's name is used)")].filter(Boolean);
}
