// What tidies a folder: captions changed at once or written by a model, tags, crops, what looks odd, and every step taken
// back. One panel is open at a time.
import { el, get, newest, post, toast, plural } from "/web/core.js";
import { makeBulk } from "/web/bulk.js";
import { makeCrops } from "/web/crops.js";
import { makeDescribe } from "/web/describe.js";
import { makeInspect } from "/web/inspect.js";
import { makeTags } from "/web/tags.js";

/** `kit` is what the images screen lends: images(), picked(), take(answer), filter(), exclude(values), save(work), tell(error). */
export function makeTools(base, kit) {
  const crops = makeCrops(base, kit, () => history());
  const bulk = makeBulk(base, kit);
  const tags = makeTags(kit, (label) => (door("tags").textContent = label || "Tags"), (given) => (open("bulk"), bulk.begin(given)));
  const inspect = makeInspect(base, kit, crops.view);
  const describe = makeDescribe(base, kit);
  const panels = { bulk: ["Edit captions", bulk], tags: ["Tags", tags], inspect: ["Look over", inspect], describe: ["Write captions", describe] };
  const back = el("button", { type: "button", class: "small", "aria-label": "Undo", disabled: true, onclick: () => step("undo") }, "↶ Undo");
  const forth = el("button", { type: "button", class: "small", "aria-label": "Redo", disabled: true, onclick: () => step("redo") }, "↷ Redo");
  const cut = el("button", { type: "button", class: "small", "aria-pressed": "true", title: "What is cut off for training is dimmed; drag the bright part to move it", onclick: () => {
    const on = cut.getAttribute("aria-pressed") !== "true";
    cut.setAttribute("aria-pressed", String(on));
    document.body.classList.toggle("no-crops", !on);
  } }, "Crops");
  const doors = Object.entries(panels).map(([key, [label]]) => el("button", { type: "button", class: "small", "aria-expanded": "false", data: { key }, onclick: () => open(shown === key ? "" : key) }, label));
  const room = el("div", { class: "panel", hidden: true });
  const node = el("section", { class: "tidy", "aria-label": "Tidy up" }, el("div", { class: "row" }, ...doors, cut, el("span", { class: "gap" }), back, forth), room, crops.viewer);
  const door = (key) => doors.find((one) => one.dataset.key === key);
  const standing = newest();
  let shown = "";
  let busy = false;

  function open(key) {
    shown = key;
    for (const one of doors) one.setAttribute("aria-expanded", String(one.dataset.key === key));
    room.hidden = !key;
    room.replaceChildren(...(key ? [panels[key][1].node] : []));
    if (key) panels[key][1].show();
  }

  async function history() {
    const found = await standing(get(`${base}/history`)).catch(() => null);
    if (!found) return;
    for (const [button, label] of [[back, found.undo], [forth, found.redo]]) {
      button.disabled = !label;
      button.title = label;
    }
  }

  async function step(which) {
    if (busy) return;
    busy = true;
    try {
      const answer = await kit.save(() => post(`${base}/${which}`)); // after a caption that is just being left
      kit.take(answer);
      crops.load();
      toast(`${which === "undo" ? "Undone" : "Done again"}: ${answer.label}${answer.left.length ? ` (${plural(answer.left.length, "picture")} had been changed since and stayed)` : ""}`);
    } catch (error) {
      if (error.status !== 409) kit.tell(error);
    }
    busy = false;
  }

  const onKey = (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.altKey || !node.isConnected || document.querySelector("dialog[open]")) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    const key = event.key.toLowerCase();
    if (key !== "z" && key !== "y") return;
    event.preventDefault();
    step(key === "y" || event.shiftKey ? "redo" : "undo");
  };
  document.addEventListener("keydown", onKey);

  const live = () => Object.values(panels).forEach(([, panel]) => panel.node.isConnected && panel.show());
  return {
    node,
    crop: crops.overlay,
    view: crops.view,
    keeps: tags.keeps,
    picks: () => (bulk.picks(), describe.picks()),
    /** The pictures were read anew. */
    load: () => (crops.load(), history(), live()),
    /** Some pictures were changed. */
    changed: () => (history(), live()),
    leave: () => (document.removeEventListener("keydown", onKey), inspect.leave(), describe.leave()),
  };
}
