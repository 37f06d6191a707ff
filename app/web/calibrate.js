// Which strength a LoRA should have: the measured curve, the pictures at 1 and at the suggestion, and the baked file.
import { el, errorCard, newest, plural, post, tell, toast } from "/web/core.js";
import { choice, follow } from "/web/grid.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 260, 44, 34];

export function makeCalibration({ files }) {
  const file = choice("Checkpoint or LoRA", files.map(([value, label]) => [value, label]), files[0][0]);
  const trouble = el("div");
  const words = el("p", { class: "subdued", role: "status" }, "Draws some of the folder's captions, and new subjects, at nine strengths, with the trigger and without it. Similarity is how far the pictures go from the base to your folder, drift how much prompts without the trigger change.");
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Measuring" });
  const cancel = el("button", { type: "button", hidden: true, onclick: () => post(`/calibrations/${current}/cancel`).catch(() => {}) }, "Cancel");
  const form = el("form", { class: "card settings", onsubmit: (event) => (event.preventDefault(), measure()) }, file.node, el("div", { class: "row" }, el("button", { type: "submit", class: "primary" }, "Measure"), cancel), bar, words, trouble);
  const view = el("section", { class: "card view", "aria-label": "Response curve", hidden: true });
  const begun = newest();
  let current = 0;
  let halt = () => {};

  async function measure() {
    halt();
    ended(); // until it has begun there is nothing to cancel
    current = 0;
    tell(trouble, null);
    view.hidden = true;
    try {
      const found = await begun(post("/calibrations", files.find(([value]) => value === file.control.value)[2]));
      if (!found) return; // another one was asked for meanwhile
      current = found.id;
    } catch (error) {
      return tell(trouble, error);
    }
    bar.hidden = cancel.hidden = false;
    bar.removeAttribute("value");
    words.textContent = "Waking the renderer…";
    halt = follow(`/calibrations/${current}`, take, (error) => (ended(), tell(trouble, error)));
  }

  const ended = () => (bar.hidden = cancel.hidden = true);

  function take(found) {
    if (found.total) bar.value = found.done / found.total;
    words.textContent = { waiting: "Waiting…", loading: "Loading the base model…", drawing: `Drawing ${plural(found.prompts.length, "prompt")} with the trigger and ${found.plain.length} without it.`, done: "Measured.", cancelled: "Cancelled.", failed: "" }[found.state];
    if (found.problem) trouble.replaceChildren(errorCard(new Error(found.problem)));
    if (["failed", "cancelled"].includes(found.state)) ended();
    if (found.result) show(found);
  }

  function show(found) {
    ended();
    const { result } = found;
    const figure = (src, text) => el("figure", {}, el("img", { src, alt: text }), el("figcaption", {}, text));
    const pictures = found.prompts.slice(0, result.whole.length).flatMap((prompt, at) => [[result.whole[at], "strength 1"], [result.best[at], `strength ${result.suggested.toFixed(2)}`]].filter(([src]) => src).map(([src, name]) => figure(src, `${prompt}: ${name}`)));
    const bake = el("button", { type: "button", onclick: () => baking(bake) }, `Bake ${result.suggested.toFixed(2)} in, so that it becomes 1`);
    view.hidden = false;
    view.replaceChildren(el("h2", {}, result.words), chart(result), el("p", { class: "subdued" }, "Solid: similarity. Dashed: drift. Dots are measured, lines fitted; the suggestion is the highest point of similarity less a tenth of drift."),
      el("div", { class: "side-by-side" }, pictures), el("div", { class: "row" }, result.suggested > 0 && bake));
    // The pictures at the suggested strength come a little later.
    if (result.best.length < result.whole.length || !result.whole.length) setTimeout(again, 700, current);
  }

  const again = (id) => id && id === current && (halt = follow(`/calibrations/${current}`, take, (error) => tell(trouble, error)));

  async function baking(button) {
    button.disabled = true;
    try {
      const { name, url, needs } = await post(`/calibrations/${current}/bake`);
      button.replaceWith(el("a", { class: "button", href: url, download: name }, `Save ${name}`), needs && el("span", { class: "subdued" }, needs));
      if (needs) toast(needs);
    } catch (error) {
      button.disabled = false;
      tell(trouble, error);
    }
  }

  function chart({ points, curve, suggested }) {
    const last = curve[curve.length - 1].strength;
    const values = [...points, ...curve].flatMap((one) => [one.similarity, one.drift]);
    const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)];
    const x = (strength) => LEFT + (strength / last) * (WIDTH - LEFT - 10);
    const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - BOTTOM - 10);
    const line = (name, key) => el("svg:polyline", { class: name, points: curve.map((one) => `${x(one.strength)},${y(one[key])}`).join(" ") });
    const dots = (name, key) => points.map((one) => el("svg:circle", { class: name, cx: x(one.strength), cy: y(one[key]), r: 4 }));
    const text = (left, top, words, anchor = "middle") => el("svg:text", { x: left, y: top, "text-anchor": anchor }, words);
    return el("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": `Similarity and drift over strength; suggested ${suggested.toFixed(2)}` },
      [0, 0.5, 1].map((value) => [el("svg:line", { class: "axis", x1: LEFT, x2: WIDTH - 10, y1: y(value), y2: y(value) }), text(LEFT - 8, y(value) + 4, String(value), "end")]).flat(),
      points.map((one) => text(x(one.strength), HEIGHT - BOTTOM + 18, String(one.strength))), text((LEFT + WIDTH) / 2, HEIGHT - 2, "strength"),
      el("svg:line", { class: "here", x1: x(suggested), x2: x(suggested), y1: 10, y2: HEIGHT - BOTTOM }), line("near", "similarity"), line("far", "drift"), dots("near", "similarity"), dots("far", "drift"));
  }

  return { node: el("div", { class: "two" }, form, view), leave: () => (begun(), halt(), (current = 0)) };
}
