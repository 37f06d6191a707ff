// A grid: its form, the table that fills in picture by picture, the difference of two of its pictures, and its PNG.
import { ask, el, errorCard, get, newest, poll, post, tell, toast } from "/web/core.js";

const KINDS = [["prompt", "Prompt"], ["strength", "Strength"], ["lora", "Checkpoint or LoRA"], ["seed", "Seed"]];
const READY = [["prompt", "strength", "Prompts × strengths"], ["lora", "strength", "Checkpoints × strengths"], ["lora", "seed", "LoRA × seed"]];
const ENDED = ["done", "failed", "cancelled"];
const remembered = new Map(); // project -> the form as it was left, and the number of its grid

/** A labelled control. */
export function field(label, control) {
  control.setAttribute("aria-label", label);
  const words = el("span", {}, label);
  return { control, words, node: el("label", { class: "field" }, words, control) };
}

export const choice = (label, options, value) => field(label, el("select", {}, options.map(([key, text]) => el("option", { value: key, selected: key === value }, text))));

/** Asks until a drawing has ended; `take` gets every answer. Returns what stops it. */
export function follow(path, take, fail) {
  let over = false;
  const stop = poll(async () => {
    if (over) return;
    try {
      const found = await get(path);
      if (over) return;
      if (ENDED.includes(found.state)) halt();
      await take(found);
    } catch (error) {
      halt();
      fail(error);
    }
  }, 0.3);
  const halt = () => ((over = true), stop());
  return halt;
}

export function makeGrid({ project, files, defaults, start }) {
  const number = (label, value, more) => field(label, el("input", { type: "number", value, ...more }));
  const fields = {
    rows: choice("Rows", KINDS, "prompt"),
    columns: choice("Columns", KINDS, "strength"),
    prompt: field("Prompts, one a line", el("textarea", { rows: 3, value: defaults.prompt })),
    strength: field("Strengths", el("input", { value: "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5" })),
    seed: field("Seeds", el("input", { value: String(defaults.seed) })),
    negative: field("Negative prompt", el("input", { value: defaults.negative })),
    width: number("Width", defaults.width, { min: 32, max: 2048, step: 8 }),
    height: number("Height", defaults.height, { min: 32, max: 2048, step: 8 }),
    guidance: number("Guidance", defaults.guidance, { min: 0, max: 30, step: 0.5 }),
    steps: number("Sampling steps", defaults.steps, { min: 1, max: 200 }),
    scheduler: choice("Sampler", defaults.schedulers.map((name) => [name, name]), defaults.scheduler),
  };
  const boxes = files.map(([value, label], at) => el("label", {}, el("input", { type: "checkbox", value, checked: at === 0 }), label));
  const loras = el("fieldset", { class: "choices" }, el("legend", {}, "Checkpoints and LoRAs"), boxes);
  const trouble = el("div");
  const draw = el("button", { type: "submit", class: "primary" }, "Draw grid");
  const cancel = el("button", { type: "button", hidden: true, onclick: () => post(`/grids/${current}/cancel`).catch((error) => tell(trouble, error)) }, "Cancel");
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Drawing" });
  const words = el("p", { class: "subdued", role: "status" }, "Rows and columns are any two of the four; all pictures of one seed begin with the same noise.");
  const saved = el("input", { type: "file", accept: "image/png", hidden: true, "aria-label": "Saved grid", onchange: () => bringBack() });
  const form = el("form", { class: "card settings", onsubmit: (event) => (event.preventDefault(), drawGrid()) },
    el("div", { class: "row" }, READY.map(([rows, columns, label]) => el("button", { type: "button", class: "quiet small", onclick: () => setAxes(rows, columns) }, label))),
    el("div", { class: "pair-of-fields" }, fields.rows.node, fields.columns.node),
    fields.prompt.node, fields.strength.node, loras, fields.seed.node,
    el("details", {}, el("summary", {}, "More"), el("div", { class: "more" }, ["negative", "width", "height", "guidance", "steps", "scheduler"].map((name) => fields[name].node))),
    el("div", { class: "row" }, draw, cancel, el("button", { type: "button", class: "quiet", onclick: () => saved.click() }, "Open a saved grid"), saved), bar, words, trouble);
  const table = el("div", { class: "table", role: "region", tabindex: "0", "aria-label": "Grid" });
  const tools = el("div", { class: "row", hidden: true });
  const looked = el("div", { class: "look", "aria-live": "polite" });
  const view = el("section", { class: "card view", "aria-label": "Pictures" }, el("p", { class: "subdued" }, "Two pictures that you choose are compared, one alone with the base."), table, tools, looked);

  const [begun, read] = [newest(), newest()];
  let current = 0;
  let halt = () => {};
  let stopLooking = () => {};
  let cells = [];
  let chosen = [];

  const axes = () => [fields.rows.control.value, fields.columns.control.value];
  function setAxes(rows, columns) {
    fields.rows.control.value = rows;
    fields.columns.control.value = columns;
    showAxes();
  }
  /** A kind on no axis has one value: its field says so. */
  function showAxes() {
    const on = (kind) => axes().includes(kind);
    fields.prompt.words.textContent = on("prompt") ? "Prompts, one a line" : "Prompt (the first line)";
    fields.strength.words.textContent = on("strength") ? "Strengths, with commas" : "Strength (the first)";
    fields.seed.words.textContent = on("seed") ? "Seeds, with commas" : "Seed (the first)";
    loras.querySelector("legend").textContent = on("lora") ? "Checkpoints and LoRAs" : "Checkpoint or LoRA (the first)";
  }
  const list = (text) => text.split(/[,;\s]+/).filter(Boolean).map(Number);
  const some = (kind, values) => (axes().includes(kind) ? values : values.slice(0, 1));
  const readForm = () => ({
    rows: fields.rows.control.value,
    columns: fields.columns.control.value,
    prompts: some("prompt", fields.prompt.control.value.split("\n").map((line) => line.trim()).filter(Boolean)),
    strengths: some("strength", list(fields.strength.control.value)),
    seeds: some("seed", list(fields.seed.control.value)),
    loras: some("lora", files.filter((_, at) => boxes[at].firstChild.checked).map((one) => one[2])),
    project: project.id,
    ...Object.fromEntries(["negative", "scheduler"].map((name) => [name, fields[name].control.value])),
    ...Object.fromEntries(["width", "height", "guidance", "steps"].map((name) => [name, Number(fields[name].control.value)])),
  });

  async function drawGrid() {
    halt();
    stopLooking();
    tell(trouble, null);
    tools.hidden = true;
    looked.replaceChildren();
    table.replaceChildren();
    chosen = [];
    try {
      const found = await begun(post("/grids", readForm()));
      if (!found) return; // another one was asked for meanwhile
      current = found.id;
    } catch (error) {
      return tell(trouble, error);
    }
    showGrid();
  }

  function showGrid() {
    cells = [];
    bar.hidden = cancel.hidden = false;
    bar.removeAttribute("value");
    words.textContent = "Waking the renderer…";
    halt = follow(`/grids/${current}`, take, (error) => (ended(), tell(trouble, error)));
  }

  const remember = () => {
    const values = Object.fromEntries(Object.entries(fields).map(([name, { control }]) => [name, control.value]));
    remembered.set(project.id, { values, ticked: files.filter((_, at) => boxes[at].firstChild.checked).map(([value]) => value), current });
  };
  function recall({ values, ticked, current: number }) {
    for (const [name, value] of Object.entries(values)) fields[name].control.value = value;
    if (files.some(([value]) => ticked.includes(value))) boxes.forEach((box, at) => (box.firstChild.checked = ticked.includes(files[at][0])));
    current = number;
    if (number) showGrid();
  }

  const ended = () => (bar.hidden = cancel.hidden = true);

  function take(found) {
    if (!cells.length) layOut(found.rows, found.columns);
    for (const { cell, url } of found.cells) if (!cells[cell].firstChild) fill(cells[cell], url);
    if (found.total) bar.value = found.done / found.total;
    const count = `${found.cells.length} of ${cells.length}`;
    words.textContent = { waiting: "Waiting…", loading: "Loading the base model…", drawing: `Drawing: ${count} pictures.`, done: `Drawn: ${count} pictures.`, cancelled: `Cancelled: ${count} pictures are drawn.`, failed: "" }[found.state];
    if (found.cells.length) offer(found.cells.length === cells.length);
    if (!ENDED.includes(found.state)) return;
    ended();
    if (found.problem) trouble.replaceChildren(errorCard(new Error(found.problem)));
  }

  function layOut(rows, columns) {
    cells = rows.flatMap((row) => columns.map((column) => el("button", { type: "button", class: "cell", disabled: true, "aria-label": `${row}, ${column}`, "aria-pressed": "false" })));
    table.style.setProperty("--columns", columns.length);
    cells.forEach((one, at) => one.addEventListener("click", () => choose(at)));
    table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, el("td"), columns.map((label) => el("th", { scope: "col" }, label)))),
      el("tbody", {}, rows.map((label, row) => el("tr", {}, el("th", { scope: "row" }, label), columns.map((_, column) => el("td", {}, cells[row * columns.length + column])))))));
  }

  function fill(cell, url) {
    const image = el("img", { src: url, alt: "", onload: () => table.style.setProperty("--own", `${Math.max(image.naturalWidth, image.naturalHeight)}px`) });
    cell.append(image);
    cell.disabled = false;
  }

  function offer(whole) {
    tools.hidden = false;
    const compete = (over, label) => el("button", { type: "button", class: "small", onclick: () => start(current, over).catch((error) => tell(trouble, error)) }, label);
    tools.replaceChildren(el("a", { class: "button small", href: `/api/grids/${current}/page`, download: `${project.id}-grid.png` }, "Save grid"),
      ...(whole ? [compete("columns", "Blind tournament of the columns"), compete("rows", "Blind tournament of the rows")] : []));
  }

  /** One picture is compared with the base, a second one with the first. */
  async function choose(at) {
    chosen = chosen.includes(at) ? chosen.filter((one) => one !== at) : [...chosen.slice(-1), at];
    cells.forEach((one, place) => one.setAttribute("aria-pressed", String(chosen.includes(place))));
    stopLooking();
    if (!chosen.length) return looked.replaceChildren();
    const [first, second = null] = chosen;
    const mine = chosen;
    try {
      const { id } = await post(`/grids/${current}/differences`, { first, second });
      if (mine === chosen) stopLooking = follow(`/differences/${id}`, (found) => showDifference(found, first, second), (error) => tell(trouble, error));
    } catch (error) {
      if (mine === chosen) tell(trouble, error);
    }
  }

  function showDifference(found, first, second) {
    if (found.problem) return looked.replaceChildren(errorCard(new Error(found.problem)));
    const figure = (src, text) => el("figure", {}, el("img", { src, alt: text }), el("figcaption", {}, text));
    const name = (at) => cells[at].getAttribute("aria-label");
    const pictures = [first, second].filter((at) => at !== null).map((at) => figure(cells[at].firstChild.src, name(at)));
    const percent = (share) => `${(share * 100).toFixed(1)} %`;
    const told = found.url && `Difference ${second === null ? "from the base" : "of the two"}, × ${found.factor}: mean ${percent(found.mean)}, largest ${percent(found.largest)}${found.same_noise ? "" : "; not the same noise"}`;
    looked.replaceChildren(el("div", { class: "side-by-side" }, pictures, told ? figure(found.url, told) : el("p", { class: "subdued" }, "Comparing…")));
  }

  async function bringBack() {
    const file = saved.files[0];
    saved.value = "";
    if (!file) return;
    tell(trouble, null);
    try {
      // The settings stand in front of the pixels.
      const found = await read(file.slice(0, 1 << 20).arrayBuffer().then((bytes) => ask("POST", "/grids/read", bytes, { text: true })));
      if (found) setForm(found);
    } catch (error) {
      tell(trouble, error);
    }
  }

  function setForm({ grid, loras: named }) {
    setAxes(grid.rows, grid.columns);
    fields.prompt.control.value = grid.prompts.join("\n");
    fields.strength.control.value = grid.strengths.join(", ");
    fields.seed.control.value = grid.seeds.join(", ");
    for (const name of ["negative", "width", "height", "guidance", "steps", "scheduler"]) fields[name].control.value = grid[name];
    const values = (one) => [`${one.run}|${one.step}`, `file|${one.file}`];
    const chosenFiles = named.map((one) => files.find(([value]) => values(one).includes(value)));
    boxes.forEach((box, at) => (box.firstChild.checked = chosenFiles.includes(files[at])));
    const missing = named.filter((_, at) => !chosenFiles[at]).map((one) => one.name);
    words.textContent = missing.length ? `The settings are back, but not in this project: ${missing.join(", ")}.` : "The settings of the saved grid are back: press Draw grid.";
    if (missing.length) toast("A LoRA of the saved grid is not here.");
  }

  fields.rows.control.addEventListener("change", showAxes);
  fields.columns.control.addEventListener("change", showAxes);
  if (remembered.has(project.id)) recall(remembered.get(project.id));
  showAxes();
  return { node: el("div", { class: "two" }, form, view), leave: () => (remember(), begun(), halt(), stopLooking()) };
}
