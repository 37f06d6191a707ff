// Recipe: a preset, five sliders beside it, what a run would be, and everything else under More.
import { Refused, el, get, go, onShow, patch, post, put, tell, toast } from "/web/core.js";
import { makeField, makeSlider } from "/web/fields.js";

const MAIN = ["base.model", "adapter.rank", "adapter.alpha", "optimizer.learning_rate", "text_encoder.learning_rate", "train.steps"];
// These are the project's own: its folder and its trigger word have their place on the screen before.
const ELSEWHERE = ["dataset.images", "dataset.edits", "dataset.trigger", "base.family"];

const at = (values, name) => name.split(".").reduce((group, part) => (group === undefined || group === null ? undefined : group[part]), values);

/** A copy of nested values with one set, or with `undefined` taken out. */
function putIn(values, name, value) {
  const [group, last] = name.split(".");
  const inner = { ...(values[group] || {}) };
  if (value === undefined) delete inner[last];
  else inner[last] = value;
  const made = { ...values, [group]: inner };
  if (!Object.keys(inner).length) delete made[group];
  return made;
}

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("recipe", ({ project }) => {
    let gone = false;
    const trouble = el("div");
    room.replaceChildren(trouble);
    Promise.all([get("/settings"), get(`/projects/${encodeURIComponent(project)}`)])
      .then(([facts, found]) => gone || makeScreen(room, facts, found))
      .catch((error) => gone || tell(trouble, error));
    return () => (gone = true);
  });
}

function makeScreen(room, facts, project) {
  const path = `/projects/${encodeURIComponent(project.id)}`;
  const setting = Object.fromEntries(facts.settings.map((one) => [one.name, one]));
  const trouble = el("div");
  const saved = el("span", { class: "subdued", role: "status" });
  const card = el("section", { class: "card live", "aria-label": "What a run would be", "aria-live": "polite" });
  const presets = el("div", { class: "presets", role: "radiogroup", "aria-label": "Preset" });
  const fields = new Map();
  const wrong = new Map();
  let recipe = project.recipe;
  let preset = project.preset;
  let asked = null;

  const change = (name) => async (value) => {
    const before = recipe;
    const wanted = putIn(recipe, name, value);
    try {
      await patch(path, { recipe: wanted });
      recipe = wanted;
      wrong.delete(name);
      saved.textContent = "Saved";
    } catch (error) {
      recipe = before;
      saved.textContent = "";
      if (!(error instanceof Refused) || !error.problems.length) return tell(trouble, error);
      wrong.set(name, error.problems[0].what);
      error.problems.forEach((problem) => fields.get(problem.where)?.problem(problem.what));
      fields.get(name)?.problem(error.problems[0].what);
      return;
    }
    await check();
  };

  const slider = (name, options) => fields.set(name, makeSlider(setting[name], change(name), options)).get(name).node;
  fields.set("base.model", makeField(setting["base.model"], change("base.model"), "Base model"));
  fields.get("base.model").control.setAttribute("list", "bases");
  const main = el("section", { class: "card main", "aria-label": "Main settings" },
    fields.get("base.model").node,
    el("datalist", { id: "bases" }, facts.bases.map((one) => el("option", { value: one }))),
    slider("adapter.rank", { label: "Rank", least: 1, most: 128, help: "How much the LoRA can learn, and how large its file is." }),
    slider("adapter.alpha", { label: "Alpha", least: 1, most: 128, help: "Scales what is learnt by alpha / rank. Empty: equal to the rank." }),
    slider("optimizer.learning_rate", { label: "Learning rate", least: 1e-6, most: 1e-2, logarithmic: true, help: "How fast it learns. Too high draws noise, too low learns nothing." }),
    slider("text_encoder.learning_rate", { label: "Text encoder's learning rate", least: 1e-6, most: 1e-2, logarithmic: true, help: "0 leaves the words as they are. Empty: the same as above." }),
    slider("train.steps", { label: "Steps", least: 10, most: 3000, step: 10, help: "How long it learns." }));
  const start = el("button", { type: "button", class: "primary start", onclick: () => begin(false) }, "Start training");
  room.replaceChildren(el("div", { class: "row head" }, el("h1", {}, "Recipe"), saved), presets,
    el("div", { class: "two" }, main, el("div", { class: "side" }, card, trouble, start)), more(), toml());

  function drawPresets() {
    const isPocket = (recipe.base?.model || "pocket") === "pocket";
    const current = preset || (isPocket ? "pocket" : "character");
    const one = (found) => el("button", { type: "button", class: "card preset", role: "radio", "aria-checked": String(found.name === current), onclick: () => choose(found.name) },
      el("b", {}, found.name.replace(/_/g, " ")), el("span", { class: "help" }, found.summary.slice(0, 2).join(" ")));
    const fits = (found) => (found.name === "pocket") === isPocket && found.family !== "sdxl";
    presets.replaceChildren(...facts.presets.filter(fits).map(one),
      el("details", {}, el("summary", {}, "Presets for other base models"), el("div", { class: "presets" }, facts.presets.filter((found) => !fits(found)).map(one))));
  }

  /** A preset with its own numbers: what was moved by hand in the main fields goes, and comes back by Undo. */
  async function choose(name) {
    const before = { preset, recipe };
    const next = MAIN.slice(1).reduce((values, field) => putIn(values, field, undefined), recipe);
    const save = async (values) => {
      try {
        await patch(path, values);
        ({ preset, recipe } = values);
        wrong.clear();
        await check();
      } catch (error) {
        tell(trouble, error);
      }
    };
    await save({ preset: name, recipe: next });
    toast(`Preset ${name}.`, () => save(before));
  }

  async function check() {
    drawPresets();
    asked?.abort();
    asked = new AbortController();
    try {
      const found = await post(`${path}/check`, { force: true }, { signal: asked.signal });
      tell(trouble, null);
      draw(found);
    } catch (error) {
      if (error.name !== "AbortError") tell(trouble, error);
    }
  }

  function draw(found) {
    for (const [name, field] of fields) if (!wrong.has(name)) field.problem("");
    const loose = found.problems.filter((problem) => !fields.has(problem.where) || problem.severity !== "error");
    for (const problem of found.problems) if (!loose.includes(problem)) fields.get(problem.where).problem(problem.what);
    if (found.ok) for (const [name, field] of fields) if (!wrong.has(name)) field.show(at(found.settings, name));
    const alpha = found.ok && (found.settings.adapter.alpha ?? found.settings.adapter.rank);
    card.replaceChildren(
      el("h2", {}, found.ok ? `${found.steps} steps on ${found.base}` : "Not ready yet"),
      found.ok ? el("p", {}, found.arithmetic) : "",
      found.ok ? el("p", { class: "subdued" }, `Rank ${found.settings.adapter.rank}, alpha ${alpha}: scale ${Number(found.scale.toFixed(3))}. ${found.held_out} of ${found.pictures + found.held_out} pictures are kept aside to see whether it learns more than them.`) : "",
      el("ul", {}, loose.map((problem) => el("li", { class: problem.severity }, [problem.what, problem.hint].filter(Boolean).join(". ")))),
    );
    start.disabled = false;
  }

  async function begin(force) {
    if (wrong.size) {
      fields.get([...wrong.keys()][0])?.control.focus();
      return;
    }
    start.disabled = true;
    tell(trouble, null);
    try {
      const run = await post(`${path}/runs`, { force });
      go("train", project.id, run.id);
    } catch (error) {
      const placed = (error.problems || []).filter((problem) => fields.has(problem.where));
      placed.forEach((problem) => fields.get(problem.where).problem(problem.what));
      fields.get(placed[0]?.where)?.control.focus();
      tell(trouble, error);
      if ((error.problems || []).length && error.problems.every((problem) => problem.severity === "advice")) {
        trouble.append(el("button", { type: "button", onclick: () => begin(true) }, "Start anyway"));
      }
    }
    start.disabled = false;
  }

  function more() {
    const find = el("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings" });
    const groups = new Map();
    for (const one of facts.settings) {
      if (MAIN.includes(one.name) || ELSEWHERE.includes(one.name)) continue;
      const field = makeField(one, change(one.name));
      field.node.append(el("button", { type: "button", class: "quiet small", "aria-label": `Set ${one.name} back to the preset`, onclick: () => (wrong.delete(one.name), change(one.name)(undefined)) }, "Preset's value"));
      fields.set(one.name, field);
      groups.set(one.group, [...(groups.get(one.group) || []), field.node]);
    }
    const sections = [...groups].map(([group, nodes]) => el("fieldset", { class: "card" }, el("legend", {}, group.replace(/_/g, " ")), el("div", { class: "settings" }, nodes)));
    find.addEventListener("input", () => {
      for (const section of sections) {
        let any = false;
        for (const node of section.querySelectorAll(".setting")) {
          const name = node.dataset.name;
          node.hidden = !`${name} ${setting[name].help}`.toLowerCase().includes(find.value.toLowerCase());
          any ||= !node.hidden;
        }
        section.hidden = !any;
      }
    });
    return el("details", { class: "more" }, el("summary", {}, "More settings"), find, sections);
  }

  function toml() {
    const text = el("textarea", { rows: 8, "aria-label": "Recipe as TOML", spellcheck: false });
    const fault = el("div");
    const read = async () => {
      const before = text.value;
      const now = await get(`${path}/recipe`);
      if (text.value === before) text.value = now; // what a person has begun to type stays
    };
    const write = async () => {
      try {
        await put(`${path}/recipe`, text.value, { text: true });
        ({ recipe, preset } = await get(path));
        wrong.clear();
        tell(fault, null);
        await check();
        toast("The recipe was taken over.");
      } catch (error) {
        tell(fault, error);
      }
    };
    const file = el("input", { type: "file", accept: ".toml", "aria-label": "Recipe file", onchange: async () => { text.value = await file.files[0].text(); await write(); } });
    const node = el("details", { class: "more" }, el("summary", {}, "Recipe as a file"), text, fault, el("div", { class: "row" },
      el("button", { type: "button", onclick: write }, "Use this text"), el("a", { class: "button", href: `/api${path}/recipe`, download: `${project.id}.toml` }, "Download"), file));
    node.addEventListener("toggle", () => node.open && read().catch((error) => tell(fault, error)));
    return node;
  }

  check();
}
