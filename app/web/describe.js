// Captions by a model that the person names: written in the background, looked at and corrected, then taken as one step.
import { about, ask, el, errorCard, get, newest, plural, poll, post } from "/web/core.js";

const MODEL = "impasto:captioner"; // what was named last

export function makeDescribe(base, kit) {
  const model = el("input", { "aria-label": "Captioning model", placeholder: "Folder of a model, or owner/name on the hub", value: localStorage.getItem(MODEL) || "" });
  const prompt = el("input", { "aria-label": "Prompt for the model", placeholder: "Prompt (optional)" });
  const scope = el("select", { "aria-label": "Pictures to describe" }, ...["none", "shown", "picked"].map((value) => el("option", { value })));
  const start = el("button", { type: "submit", class: "primary small" }, "Write captions");
  const cancel = el("button", { type: "button", class: "small", hidden: true, onclick: () => end() }, "Cancel");
  const how = el("select", { "aria-label": "What happens with them" }, el("option", { value: "replace" }, "in place of the caption"), el("option", { value: "front" }, "in front of it"), el("option", { value: "behind" }, "behind it"));
  const take = el("button", { type: "button", class: "primary small", onclick: () => act() }, "Take");
  const taking = el("div", { class: "row", hidden: true }, take, how);
  const told = el("p", { class: "subdued", role: "status" });
  const bar = el("progress", { max: 1, "aria-label": "Pictures described", hidden: true });
  const fault = el("div");
  const list = el("table", { class: "changes" });
  const node = el("form", { class: "card describe", "aria-label": "Write captions", onsubmit: (event) => { event.preventDefault(); begin(); } },
    el("p", { class: "help" }, "A model from pictures to text, as transformers reads it (BLIP, for example). A folder needs no network; an id on the hub is fetched first. Nothing is saved before you take it."),
    el("div", { class: "row" }, model, prompt, scope, start, cancel), told, bar, fault, taking, list);
  const latest = newest();
  let stop = null;
  let rows = new Map(); // name -> the field with what was written
  let used = "";

  const silent = () => kit.images().filter((image) => !image.excluded && !image.caption);
  const names = () => ({ none: silent, shown: kit.seen, picked: kit.picked })[scope.value]().map((image) => image.rel);

  function picks() {
    const counts = { none: silent().length, shown: kit.seen().length, picked: kit.picked().length };
    const says = { none: `the ${counts.none} without a caption`, shown: `all ${counts.shown} shown`, picked: `the ${counts.picked} selected` };
    for (const option of scope.options) Object.assign(option, { textContent: says[option.value], disabled: !counts[option.value] });
    if (scope.selectedOptions[0]?.disabled) scope.value = Object.keys(counts).find((key) => counts[key]) || "none";
  }

  async function begin() {
    fault.replaceChildren();
    localStorage.setItem(MODEL, model.value);
    try {
      const found = await post(`${base}/captioning`, { model: model.value, prompt: prompt.value, names: names() });
      latest(); // what was asked before it began
      draw(found);
      watch();
    } catch (error) {
      fault.replaceChildren(errorCard(error));
    }
  }

  async function end() {
    const found = await ask("DELETE", `${base}/captioning`).catch(() => ({ state: "none" }));
    latest();
    draw(found);
  }

  function watch() {
    stop?.();
    stop = poll(async () => {
      if (!node.isConnected) return stop?.();
      const found = await latest(get(`${base}/captioning`)).catch(() => null);
      if (!found) return;
      draw(found);
      if (!["loading", "writing"].includes(found.state)) stop?.();
    });
  }

  function draw(found) {
    const works = found.state === "loading" || found.state === "writing";
    start.disabled = works || found.busy;
    cancel.hidden = !works;
    bar.hidden = !works;
    if (found.state === "writing") bar.value = found.done / found.total;
    else bar.removeAttribute("value");
    used = found.model || used;
    const left = found.seconds_left ? `, ${about(found.seconds_left)} left` : "";
    told.textContent = {
      none: found.busy ? "Captions of another project are being written." : "",
      loading: "Loading the model …",
      writing: `${found.done} of ${plural(found.total, "picture")} described on ${found.device}${left}`,
      done: `${plural(found.total, "picture")} described`,
      cancelled: `Cancelled after ${found.done} of ${plural(found.total, "picture")}`,
      failed: "",
    }[found.state];
    fault.replaceChildren(...(found.problem ? [errorCard(new Error(found.problem))] : []));
    const written = Object.entries(found.captions || {});
    if (works && found.state === "loading") rows = new Map();
    for (const [name, text] of written) if (!rows.has(name)) rows.set(name, el("input", { value: text, "aria-label": `New caption of ${name}` }));
    for (const name of [...rows.keys()]) if (!(name in (found.captions || {}))) rows.delete(name);
    const skipped = Object.entries(found.skipped || {}).map(([name, why]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "subdued" }, why)));
    const key = `${rows.size}/${skipped.length}/${found.state}`;
    if (key === draw.key) return; // what a person is typing stays as it is
    const before = rows.size - (draw.rows || 0);
    Object.assign(draw, { key, rows: rows.size });
    if (before < 0 || !list.childElementCount || !works) list.replaceChildren();
    const listed = list.childElementCount;
    list.append(...[...rows].slice(listed).map(([name, field]) => el("tr", {}, el("th", { scope: "row", title: name }, name.split("/").pop()), el("td", {}, thumb(name)), el("td", { class: "new" }, field))));
    if (!works) list.append(...skipped);
    taking.hidden = !rows.size || works;
    take.textContent = `Take ${plural(rows.size, "caption")}`;
  }

  const thumb = (name) => {
    const image = kit.images().find((one) => one.rel === name);
    return image && el("img", { src: `${image.thumb}&w=96`, alt: name, loading: "lazy" });
  };

  /** What the captions become; those that are to be kept beside the new ones are read as they stand now. */
  function composed() {
    const captions = {};
    for (const [name, field] of rows) {
      const image = kit.images().find((one) => one.rel === name);
      const now = image?.caption || "";
      const text = field.value.trim();
      if (image && text) captions[name] = how.value === "replace" || !now ? text : how.value === "front" ? `${text}, ${now}` : `${now}, ${text}`;
    }
    return captions;
  }

  async function act() {
    take.disabled = true;
    let captions = {};
    try {
      const label = `Captions by ${used.split(/[\\/]/).filter(Boolean).pop() || "a model"}`.slice(0, 200);
      kit.take(await kit.save(() => post(`${base}/changes`, { label, captions: (captions = composed()) }))); // after a caption that is just being left
      rows = new Map();
      list.replaceChildren();
      taking.hidden = true;
      told.textContent = `${plural(Object.keys(captions).length, "caption")} taken: Undo takes them back.`;
    } catch (error) {
      fault.replaceChildren(errorCard(error));
    }
    take.disabled = false;
  }

  return {
    node,
    picks,
    show: () => (picks(), rows.size || watch()),
    leave: () => stop?.(),
  };
}
