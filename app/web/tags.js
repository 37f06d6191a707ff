// The tags of all captions with their counts: a click shows the pictures that have them.
import { el, plural } from "/web/core.js";

const MOST = 400;
const tagsOf = (image) => new Map((image.caption || image.fallback).split(",").map((tag) => tag.trim()).filter(Boolean).map((tag) => [tag.toLowerCase(), tag]));

/** `say(label)` names the tags that are chosen; `edit(operation)` opens the bulk edit with what is to be done to the chosen tags. */
export function makeTags(kit, say, edit) {
  const chosen = new Set();
  const find = el("input", { type: "search", placeholder: "Search tags", "aria-label": "Search tags", oninput: () => draw() });
  const list = el("div", { class: "row tag-list", role: "group", "aria-label": "Tags" });
  const told = el("p", { class: "subdued", role: "status" });
  const acts = el("div", { class: "row" });
  const node = el("div", { class: "card tags" }, el("div", { class: "row" }, find, acts), told, list);

  function draw() {
    const counts = new Map();
    for (const image of kit.images()) {
      if (image.excluded) continue;
      for (const [key, tag] of tagsOf(image)) counts.set(key, { tag: counts.get(key)?.tag || tag, count: (counts.get(key)?.count || 0) + 1 });
    }
    for (const key of [...chosen]) if (!counts.has(key)) chosen.delete(key);
    const words = find.value.toLowerCase();
    const all = [...counts].filter(([key]) => key.includes(words) || chosen.has(key)).sort(([a, one], [b, other]) => other.count - one.count || (a < b ? -1 : 1));
    list.replaceChildren(...all.slice(0, MOST).map(([key, { tag, count }]) => el("button", { type: "button", class: "small quiet", "aria-pressed": String(chosen.has(key)), onclick: () => toggle(key) }, tag, el("span", { class: "count" }, ` ${count}`))));
    told.textContent = all.length > MOST ? `${plural(counts.size, "tag")}; the ${MOST} commonest are shown.` : plural(counts.size, "tag");
    const text = [...chosen].map((key) => counts.get(key).tag).join(", ");
    say(text && `Tags: ${text}`);
    acts.replaceChildren(...(chosen.size ? [
      el("button", { type: "button", class: "small", onclick: () => { chosen.clear(); draw(); kit.filter(); } }, "Show all pictures"),
      el("button", { type: "button", class: "small", onclick: () => edit({ kind: "remove", text }) }, "Remove …"),
      el("button", { type: "button", class: "small", onclick: () => edit({ kind: "replace", text }) }, "Replace …"),
    ] : []));
  }

  function toggle(key) {
    if (!chosen.delete(key)) chosen.add(key);
    draw();
    kit.filter();
  }

  return {
    node,
    show: draw,
    /** Whether a picture has every chosen tag. */
    keeps: (image) => !chosen.size || [...chosen].every((key) => tagsOf(image).has(key)),
  };
}
