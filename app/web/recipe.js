// Recipe: the base, a preset, five settings with sliders, what it comes to, and Start. Everything else is folded away.
import { about, bytes, el, get, go, newest, onShow, patch, post, put, tell, toast } from "/web/core.js";
import { makeField, makeSlider } from "/web/fields.js";
import { startOrQueue } from "/web/queue.js";

const MAIN = ["base.model", "adapter.rank", "adapter.alpha", "optimizer.learning_rate", "text_encoder.learning_rate", "train.steps"];
// These are the project's own: its folder and its trigger word have their place on the screen before.
const ELSEWHERE = ["dataset.images", "dataset.edits", "dataset.trigger", "base.family"];
// What a field that is left empty takes its value from.
const UNSET = { "adapter.alpha": "adapter.rank", "text_encoder.learning_rate": "optimizer.learning_rate" };
const WHILE_DRAGGING = 120; // milliseconds of rest before the card is asked for anew
const BEFORE_MEASURING = 900;

const inWords = ({ what, hint }) => [what, hint].filter(Boolean).join(". ");

const at = (values, name) => name.split(".").reduce((group, part) => group?.[part], values);

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
    let leave = () => {};
    let gone = false;
    const trouble = el("div");
    room.replaceChildren(trouble);
    Promise.all([get("/settings"), get(`/projects/${encodeURIComponent(project)}`)])
      .then(([facts, found]) => { if (!gone) leave = makeScreen(room, facts, found); })
      .catch((error) => gone || tell(trouble, error));
    return () => ((gone = true), leave());
  });
}

function makeScreen(room, facts, project) {
  const path = `/projects/${encodeURIComponent(project.id)}`;
  const setting = Object.fromEntries(facts.settings.map((one) => [one.name, one]));
  const trouble = el("div");
  const said = el("span", { class: "subdued", role: "status" });
  const facing = el("div");
  const measuring = makeMeasure(path);
  const card = el("section", { class: "card live", "aria-label": "What a run would be" }, facing, measuring.node);
  const presets = el("div", { class: "presets", role: "group", "aria-label": "Preset" });
  const fields = new Map();
  const wrong = new Map(); // name -> what is told at its field; such a value is not saved
  const waiting = new Map(); // name -> changes that are not saved yet: what is typed there stays
  let { recipe, preset } = project; // as saved
  let saving = Promise.resolve();
  let asked = null;
  let rest = 0;
  let now = {}; // the settings as they were last found
  let sift = () => {}; // shows the settings that are looked for
  let gone = false;

  /** Changes are saved one after the other, each over the one before: none is lost, and Start waits for the last. */
  const queue = (what) => (saving = saving.then(what).catch((error) => tell(trouble, error)));

  const store = async (values) => {
    await patch(path, values);
    ({ preset, recipe } = { preset, recipe, ...values });
  };

  const change = (name) => (value) => {
    waiting.set(name, (waiting.get(name) || 0) + 1);
    return queue(() => save(name, value));
  };

  async function save(name, value) {
    clearTimeout(rest);
    measuring.stop();
    waiting.set(name, waiting.get(name) - 1);
    ({ recipe, preset } = await get(path)); // another tab may have changed it
    try {
      await store({ recipe: putIn(recipe, name, value) });
      wrong.delete(name);
      said.textContent = "Saved";
    } catch (error) {
      said.textContent = "";
      if (!error.problems?.length) throw error;
      wrong.set(name, inWords(error.problems[0]));
    }
    await check();
  }

  /** The card follows a slider that is still being dragged; nothing is saved yet. */
  const moved = (name) => (value) => {
    clearTimeout(rest);
    rest = setTimeout(() => look(putIn({}, name, value)).then((found) => found && drawCard(found)), WHILE_DRAGGING);
  };

  async function look(settings) {
    asked?.abort();
    asked = new AbortController();
    try {
      return await post(`${path}/check`, { force: true, settings }, { signal: asked.signal });
    } catch (error) {
      if (error.name !== "AbortError") tell(trouble, error);
      return null;
    }
  }

  async function check() {
    const found = gone ? null : await look({});
    if (!found || gone) return;
    tell(trouble, null);
    draw(found);
    measuring.follow(found);
  }

  function draw(found) {
    drawPresets(found.preset || preset, found.family);
    if (found.settings.adapter) now = found.settings;
    sift();
    for (const [name, field] of fields) {
      field.problem(wrong.get(name) || "");
      if (found.settings.adapter && !wrong.has(name) && !waiting.get(name)) field.show(at(found.settings, name), at(found.settings, UNSET[name] || name));
    }
    if (!found.ok) for (const problem of found.problems) fields.get(problem.where)?.problem(inWords(problem));
    drawCard(found);
    start.disabled = false;
  }

  function drawCard(found) {
    const loose = found.problems.filter((problem) => found.ok || !fields.has(problem.where));
    const problems = el("ul", {}, loose.map((problem) => el("li", { class: problem.severity }, inWords(problem))));
    if (!found.ok) {
      return facing.replaceChildren(el("h2", {}, "Not ready yet"), el("p", {}, loose.length ? "" : "Look at the fields that are marked."), problems);
    }
    const { type, rank, alpha } = found.settings.adapter;
    const hasRank = found.layers > 0 && type !== "full";
    const where = found.layers ? ` in ${found.layers} layers${hasRank ? ` (${found.ranks})` : ""}` : ", the trigger word’s own";
    const all = found.pictures + found.held_out;
    facing.replaceChildren(
      el("h2", {}, `${found.steps} steps on ${found.base}`),
      el("p", {}, found.arithmetic),
      el("p", {}, `${found.parameters.toLocaleString("en")} numbers learn${where}; the file has about ${bytes(found.file_bytes)}.`),
      el("p", { class: "subdued" }, `${hasRank ? `Rank ${rank}, alpha ${alpha ?? rank}: scale ${Number(found.scale.toFixed(3))}. ` : ""}${found.held_out} of ${all} pictures are kept aside to see whether it learns more than them.`),
      problems,
    );
  }

  function drawPresets(current, family) {
    const isPocket = (recipe.base?.model || "pocket") === "pocket";
    const moved = MAIN.slice(1).filter((name) => at(recipe, name) !== undefined).length;
    const one = (found) => el("button", { type: "button", class: "card preset", "aria-pressed": String(found.name === current), onclick: () => choose(found.name) },
      el("b", {}, found.name.replace(/_/g, " ").replace("sdxl", "SDXL")),
      found.name === current && moved ? el("span", { class: "changed" }, "changed by you: press for its own numbers") : null,
      // "For whom: ...", and of the rest the first sentence.
      el("span", { class: "help" }, [found.summary[0].replace(/^For whom: /, ""), found.summary[1]?.split(/\. (?=[A-Z])/)[0]].filter(Boolean).join(" ")));
    const fits = (found) => (found.name === "pocket") === isPocket && (found.family === "sdxl") === (family === "sdxl");
    const others = facts.presets.filter((found) => !fits(found));
    presets.replaceChildren(...facts.presets.filter(fits).map(one),
      el("details", { open: others.some((found) => found.name === current) }, el("summary", {}, "Presets for other base models"), el("div", { class: "presets" }, others.map(one))));
  }

  /** A preset with its own numbers: what was moved by hand in the main fields goes, and comes back by Undo. */
  const choose = (name) => queue(async () => {
    const before = { preset, recipe };
    const taken = async (values) => {
      await store(values);
      wrong.clear();
      await check();
    };
    await taken({ preset: name, recipe: MAIN.slice(1).reduce((values, field) => putIn(values, field, undefined), recipe) });
    toast(`Preset ${name}.`, () => queue(() => taken(before)));
  });

  /** Puts the cursor into a field, also where it is folded away. */
  function lead(name) {
    const { control } = fields.get(name);
    control.closest("details")?.setAttribute("open", "");
    control.focus();
  }

  async function begin(force) {
    start.disabled = true;
    tell(trouble, null);
    try {
      await saving;
      if (wrong.size) return lead([...wrong.keys()][0]);
      const run = await startOrQueue(path, { force });
      if (run) go("train", project.id, run.id);
    } catch (error) {
      const placed = (error.problems || []).filter((problem) => fields.has(problem.where));
      placed.forEach((problem) => fields.get(problem.where).problem(inWords(problem)));
      if (placed.length) lead(placed[0].where);
      if (!placed.length || placed.length < error.problems.length) tell(trouble, error);
      if (error.problems?.length && error.problems.every((problem) => problem.severity === "advice")) {
        trouble.append(el("button", { type: "button", onclick: () => begin(true) }, "Start anyway"));
      }
    } finally {
      start.disabled = false;
    }
  }

  function slider(name, options) {
    fields.set(name, makeSlider(setting[name], change(name), moved(name), options));
    return fields.get(name).node;
  }

  function baseField() {
    const field = makeField(setting["base.model"], change("base.model"), "Base model");
    fields.set("base.model", field);
    field.control.setAttribute("list", "bases");
    return [field.node, el("datalist", { id: "bases" }, facts.bases.map((one) => el("option", { value: one })))];
  }

  function prompts() {
    fields.set("samples.prompts", makeField(setting["samples.prompts"], change("samples.prompts"), "Sample prompts, one per line"));
    return el("details", { class: "more" }, el("summary", {}, "Sample prompts"), fields.get("samples.prompts").node);
  }

  function more() {
    const find = el("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings" });
    const none = el("p", { class: "subdued", hidden: true }, "No setting has this in its name or its help.");
    const groups = new Map();
    for (const one of facts.settings) {
      if (fields.has(one.name) || ELSEWHERE.includes(one.name)) continue;
      const field = makeField(one, change(one.name));
      const back = () => (wrong.delete(one.name), change(one.name)(undefined));
      field.node.append(el("button", { type: "button", class: "quiet small", "aria-label": `Set ${one.name} back to the preset`, onclick: back }, "Preset's value"));
      fields.set(one.name, field);
      groups.set(one.group, [...(groups.get(one.group) || []), field.node]);
    }
    const sections = [...groups].map(([group, nodes]) => el("fieldset", { class: "card" }, el("legend", {}, group.replace(/_/g, " ")), el("div", { class: "settings" }, nodes)));
    // What only another type has would be refused; it is seen where the recipe says it all the same.
    const fits = ({ name, group, types }) => !types.length || types.includes(now[group]?.type) || at(recipe, name) !== undefined;
    sift = () => {
      for (const section of sections) {
        const nodes = [...section.querySelectorAll(".setting")];
        const words = ({ name, help, choices }) => `${name} ${help} ${choices.join(" ")}`.toLowerCase();
        for (const node of nodes) node.hidden = !fits(setting[node.dataset.name]) || !words(setting[node.dataset.name]).includes(find.value.toLowerCase());
        section.hidden = nodes.every((node) => node.hidden);
      }
      none.hidden = sections.some((section) => !section.hidden);
    };
    find.addEventListener("input", () => sift());
    return el("details", { class: "more" }, el("summary", {}, "More settings"), find, none, sections);
  }

  function asFile() {
    let isTyped = false; // what a person has begun to type stays
    const text = el("textarea", { rows: 8, "aria-label": "Recipe as TOML", spellcheck: false, oninput: () => (isTyped = true) });
    const [latest, fault] = [newest(), el("div")];
    const read = async () => {
      const now = await latest(get(`${path}/recipe`));
      if (now !== null && !isTyped) text.value = now;
    };
    const write = () => queue(async () => {
      try {
        await put(`${path}/recipe`, text.value, { text: true });
      } catch (error) {
        return tell(fault, error);
      }
      isTyped = false;
      ({ recipe, preset } = await get(path));
      wrong.clear();
      tell(fault, null);
      await check();
      toast("The recipe was taken over.");
    });
    const file = el("input", { type: "file", accept: ".toml", hidden: true, onchange: async () => { text.value = await file.files[0].text(); file.value = ""; write(); } });
    const node = el("details", { class: "more" }, el("summary", {}, "Recipe as a file"), text, fault, el("div", { class: "row" },
      el("button", { type: "button", onclick: write }, "Use this text"),
      el("button", { type: "button", onclick: () => file.click() }, "Read a file"), file,
      el("a", { class: "button", href: `/api${path}/recipe`, download: `${project.id}.toml` }, "Download")));
    node.addEventListener("toggle", () => node.open && read().catch((error) => tell(fault, error)));
    return node;
  }

  const start = el("button", { type: "button", class: "primary start", onclick: () => begin(false) }, "Start training");
  const main = el("section", { class: "card main", "aria-label": "Main settings" },
    ...baseField(),
    slider("adapter.rank", { label: "Rank", least: 1, most: 128, help: "How much the LoRA can learn, and how large its file is." }),
    slider("adapter.alpha", { label: "Alpha", least: 1, most: 128, help: "Scales what is learnt by alpha / rank. Empty: equal to the rank." }),
    slider("optimizer.learning_rate", { label: "Learning rate", least: 1e-6, most: 1e-2, logarithmic: true, help: "How fast it learns. Too high draws noise, too low learns nothing." }),
    slider("text_encoder.learning_rate", { label: "Text encoder's learning rate", least: 1e-6, most: 1e-2, logarithmic: true, help: "0 leaves the words as they are. Empty: the same as above." }),
    slider("train.steps", { label: "Steps", least: 10, most: 3000, step: 10, help: "How long it learns." }));
  room.replaceChildren(el("div", { class: "row head" }, el("h1", {}, "Recipe"), said), presets,
    el("div", { class: "two" }, main, el("div", { class: "side" }, card, trouble, start)), prompts(), more(), asFile());
  queue(check);
  return () => {
    gone = true;
    clearTimeout(rest);
    measuring.stop();
  };
}

/** The part of the card that says what two real steps took: by itself on a small base, else when the person asks. */
function makeMeasure(path) {
  const node = el("div", { class: "measure", role: "status" });
  let timer = 0;
  let turn = 0; // which question is the present one
  const stop = () => {
    clearTimeout(timer);
    turn += 1;
  };
  const button = (label) => el("button", { type: "button", class: "small", onclick: ask }, label);

  async function ask() {
    stop();
    const mine = turn;
    // No moving bar: drawing it would cost the time that is being measured.
    node.replaceChildren(el("p", { class: "subdued" }, "Taking two real steps to measure time and memory…"));
    for (;;) {
      const found = await post(`${path}/measure`, { force: true }).catch((error) => ({ state: "failed", what: error.message, hints: [error.hint] }));
      if (mine !== turn) return;
      if (found.state !== "measuring") return draw(found);
      await new Promise((done) => setTimeout(done, 500));
      if (mine !== turn) return;
    }
  }

  function draw(found) {
    const hints = el("ul", {}, found.hints.filter(Boolean).map((hint) => el("li", {}, hint)));
    if (found.state !== "done") {
      return node.replaceChildren(el("p", { class: found.state === "failed" ? "error" : "subdued" }, `${found.what}.`), hints, button("Measure again"));
    }
    node.replaceChildren(
      el("p", {}, el("b", {}, `${about(found.seconds)} to finish`), `, by two real steps of ${found.seconds_per_step.toFixed(2)} s.`),
      el("p", { class: found.fits ? "" : "error" }, `Memory: ${bytes(found.memory)} of ${bytes(found.memory_free)}${found.fits ? "" : ". That is too much:"}`),
      hints,
    );
  }

  /** What is measured follows the settings; a run that cannot be is not measured. */
  function follow(found) {
    stop();
    if (!found.ok) return node.replaceChildren();
    if (!found.is_quick) return node.replaceChildren(button("Measure two real steps"));
    for (const line of node.children) line.classList.add("subdued"); // of the settings before
    timer = setTimeout(ask, BEFORE_MEASURING);
  }

  return { node, follow, stop };
}
