// Studio: one prompt and one seed at many strengths, and a slider that walks through them.
import { address, el, errorCard, get, go, newest, onShow, poll, post, tell, toast } from "/web/core.js";
import { Ladder } from "/web/ladder.js";
import { fillFromZero } from "/web/signed.js";

const STRENGTHS = [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5];

const remembered = new Map(); // run -> what was asked there last, for as long as the page is open

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("studio", (place) => {
    let gone = false;
    let leave = () => {};
    const trouble = el("div");
    room.replaceChildren(trouble);
    begin(place)
      .then((found) => { if (!gone) leave = makeScreen(room, found); })
      .catch((error) => gone || tell(trouble, error));
    return () => ((gone = true), leave());
  });
}

/** What to begin with: the run of the address, else the project's newest with a file; null without one. */
async function begin(place) {
  const project = await get(`/projects/${encodeURIComponent(place.project)}`);
  const all = (await get("/runs")).runs;
  const runs = all.filter((one) => project.runs.includes(one.id) && one.files.length).map((one) => one.id);
  const run = place.run || runs[0];
  if (!run) return { project, defaults: null };
  return { project, runs, defaults: await get(`/runs/${encodeURIComponent(run)}/studio`) };
}

function makeScreen(room, { project, runs, defaults }) {
  if (!defaults || !defaults.files.length) {
    room.replaceChildren(el("div", { class: "card" }, el("h1", {}, "No LoRA to try yet"), el("p", {}, "Stop and keep writes one at any moment of a training."), el("a", { class: "button primary", href: address("train", project.id) }, "Go to Train")));
    return () => {};
  }
  const trouble = el("div");
  const input = (label, given) => {
    const control = el(given.rows ? "textarea" : "input", { "aria-label": label, ...given });
    return { control, node: el("label", { class: "field" }, el("span", {}, label), control) };
  };
  const choice = (label, options, value) => {
    const control = el("select", { "aria-label": label }, options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
    return { control, node: el("label", { class: "field" }, el("span", {}, label), control) };
  };
  const run = choice("Run", runs.map((one) => [one, one]), defaults.run);
  run.node.hidden = runs.length < 2;
  run.control.addEventListener("change", () => go("studio", project.id, run.control.value));
  const fields = {
    prompt: input("Prompt", { rows: 3, value: defaults.prompt }),
    seed: input("Seed", { type: "number", min: 0, step: 1, value: defaults.seed }),
    file: choice("Checkpoint", defaults.files.map((file) => [String(file.step), file.step === null ? "finished" : `step ${file.step}`]), String(defaults.files[0].step)),
    negative: input("Negative prompt", { value: defaults.negative }),
    width: input("Width", { type: "number", min: 32, max: 2048, step: 8, value: defaults.width }),
    height: input("Height", { type: "number", min: 32, max: 2048, step: 8, value: defaults.height }),
    guidance: input("Guidance", { type: "number", min: 0, max: 30, step: 0.5, value: defaults.guidance }),
    steps: input("Sampling steps", { type: "number", min: 1, max: 200, step: 1, value: defaults.steps }),
    scheduler: choice("Sampler", defaults.schedulers.map((name) => [name, name]), defaults.scheduler),
  };
  const draw = el("button", { type: "submit", class: "primary" }, "Draw");
  const cancel = el("button", { type: "button", hidden: true, onclick: () => post(`/studio/${current}/cancel`).catch(() => {}) }, "Cancel");
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Drawing" });
  const words = el("p", { class: "subdued", role: "status" }, "Draw renders nine strengths from the same noise; the slider then walks through them.");
  const fresh = el("button", { type: "button", class: "quiet small", onclick: () => { fields.seed.control.value = Math.floor(Math.random() * 1e6); stale(); } }, "New seed");
  const form = el("form", { class: "card settings", onsubmit: (event) => (event.preventDefault(), drawLadder()), oninput: () => stale() },
    fields.prompt.node, el("div", { class: "row" }, fields.seed.node, fresh), run.node, fields.file.node,
    el("details", {}, el("summary", {}, "More"), el("div", { class: "more" }, ["negative", "width", "height", "guidance", "steps", "scheduler"].map((name) => fields[name].node))),
    el("div", { class: "row" }, draw, cancel), bar, words, trouble);

  const under = el("img", { class: "layer", alt: "" });
  const over = el("img", { class: "layer", alt: "" });
  const base = el("img", { class: "layer base", alt: "The base model, strength 0", hidden: true });
  const divider = el("input", { type: "range", class: "divider", min: 0, max: 100, value: 50, hidden: true, "aria-label": "Divider between the base and the LoRA", oninput: () => split() });
  const stage = el("div", { class: "stage", hidden: true }, under, over, base, divider);
  const slider = el("input", { type: "range", min: -0.5, max: 1.5, step: 0.01, value: 1, id: "strength", disabled: true });
  const fill = fillFromZero(slider);
  const mark = el("output", { for: "strength", class: "mark-kind" });
  const strip = el("div", { class: "rungs" });
  const compare = el("input", { type: "checkbox", id: "compare", onchange: () => split() });
  const save = el("a", { class: "button small", hidden: true }, "Save picture");
  room.replaceChildren(el("h1", {}, "Studio"), el("div", { class: "two" }, form, el("section", { class: "card view", "aria-label": "Picture" }, stage,
    el("label", { for: "strength", class: "field" }, el("span", {}, "Strength (0 = without the LoRA)"), slider), mark,
    el("div", { class: "row" }, el("label", { for: "compare" }, compare, " Compare with the base"), save), strip)));

  let ladder = new Ladder();
  let asked = null;
  let current = 0;
  const started = newest();
  let halt = () => {};
  let isWhole = true; // no ladder is being drawn
  let wanted = null; // the strength that the slider was let go at meanwhile
  let kept = []; // decoded pictures, so that the slider never waits for one

  const readForm = () => ({
    run: defaults.run,
    step: fields.file.control.value === "null" ? null : Number(fields.file.control.value),
    ...Object.fromEntries(["prompt", "negative", "scheduler"].map((name) => [name, fields[name].control.value])),
    ...Object.fromEntries(["seed", "width", "height", "guidance", "steps"].map((name) => [name, Number(fields[name].control.value)])),
  });

  function stale() {
    if (asked && JSON.stringify(asked) !== JSON.stringify(readForm())) words.textContent = "Changed: press Draw to see it.";
  }

  async function warnWhenBusy() {
    const { runs } = await get("/runs").catch(() => ({ runs: [] }));
    const busy = runs.some((one) => ["starting", "running"].includes(one.state));
    if (busy) toast("Something trains now: drawing slows it down, and takes longer itself.");
  }

  async function drawLadder() {
    asked = readForm();
    remembered.set(defaults.run, asked);
    warnWhenBusy();
    ladder = new Ladder();
    kept = [];
    strip.replaceChildren();
    base.removeAttribute("src");
    isWhole = false;
    await render(STRENGTHS);
  }

  async function render(strengths) {
    halt();
    tell(trouble, null);
    bar.hidden = cancel.hidden = false;
    bar.removeAttribute("value");
    words.textContent = "Waking the renderer…";
    const mine = ladder;
    try {
      const begun = await started(post("/studio", { ...asked, strengths }));
      if (!begun) return; // another ladder was asked for meanwhile
      current = begun.id;
    } catch (error) {
      ended();
      return tell(trouble, error);
    }
    const id = current;
    let stopped = false;
    const stop = poll(async () => {
      if (stopped) return;
      try {
        const found = await get(`/studio/${id}`);
        if (stopped || mine !== ladder || id !== current) return;
        await Promise.all(found.pictures.map((one) => take(one)));
        if (found.total) bar.value = found.done / found.total;
        words.textContent = { waiting: "Waiting…", loading: "Loading the base model…", drawing: "Drawing…", done: "Drawn.", cancelled: "Cancelled.", failed: "" }[found.state];
        if (!["done", "failed", "cancelled"].includes(found.state)) return;
        halt();
        ended();
        if (found.state === "done" && wanted !== null) exactly(wanted);
        if (found.problem) trouble.replaceChildren(errorCard(new Error(found.problem)));
      } catch (error) {
        halt();
        ended();
        tell(trouble, error);
      }
    }, 0.25);
    halt = () => ((stopped = true), stop());
  }

  const ended = () => (bar.hidden = cancel.hidden = isWhole = true);

  /** Renders the strength that the slider was let go at; while a ladder is drawn, after it. */
  function exactly(strength) {
    const found = ladder.at(strength);
    wanted = isWhole ? null : strength;
    if (isWhole && found && !found.exact) render([strength]);
  }

  /** Takes a picture in once the browser has decoded it. */
  async function take({ strength, url }) {
    if (ladder.rungs.some(([known]) => known === strength)) return;
    const mine = ladder;
    const image = new Image();
    image.src = url;
    await image.decode();
    if (mine !== ladder) return;
    kept.push(image);
    ladder.add(strength, url);
    stage.hidden = false;
    slider.disabled = false;
    strip.replaceChildren(...ladder.rungs.map(([value, source]) => el("button", { type: "button", class: "rung", "aria-label": `Strength ${value}`, onclick: () => { slider.value = value; show(); } },
      el("img", { src: source, alt: "" }), el("span", {}, String(value)))));
    if (strength === 0) base.src = url;
    show();
  }

  function show() {
    const strength = Number(slider.value);
    const found = ladder.at(strength);
    fill();
    if (!found) return;
    if (under.getAttribute("src") !== found.below[1]) under.src = found.below[1];
    if (over.getAttribute("src") !== found.above[1]) over.src = found.above[1];
    over.style.opacity = found.share;
    const isOther = !found.exact && found.below === found.above; // nothing on its other side is drawn yet
    under.alt = `${asked.prompt}, strength ${isOther ? found.below[0] : strength}`;
    mark.textContent = `${strength.toFixed(2)} · ${found.exact ? "rendered" : isOther ? `not drawn yet: this is ${found.below[0]}` : "in between, blended from its neighbours"}`;
    slider.setAttribute("aria-valuetext", mark.textContent);
    save.hidden = !found.exact;
    save.href = found.below[1];
    save.download = `${project.id}-strength-${strength}.png`;
    split();
  }

  function split() {
    const on = compare.checked && base.hasAttribute("src");
    base.hidden = divider.hidden = !on;
    base.style.clipPath = `inset(0 ${100 - divider.value}% 0 0)`;
  }

  for (const [name, value] of Object.entries(remembered.get(defaults.run) || {})) if (fields[name]) fields[name].control.value = value;
  slider.addEventListener("input", show);
  slider.addEventListener("change", () => exactly(Number(slider.value)));
  return () => (started(), halt());
}
