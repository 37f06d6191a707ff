// Blend: several LoRAs on one base, each with its strengths, drawn as the sliders move; and the library they come from.
import { el, get, newest, onShow, poll, post, tell, toast } from "/web/core.js";
import { keep, kept } from "/web/kept.js";
import { makeLibrary } from "/web/library.js";
import { makeRow } from "/web/blend_row.js";
import { makeCardPicture } from "/web/card_picture.js";
import { makeSaved } from "/web/blend_saved.js";

const PAUSE = 120; // milliseconds without a change, after which the picture is drawn

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("blend", (place) => {
    let gone = false;
    let leave = () => {};
    const trouble = el("div");
    room.replaceChildren(trouble);
    get(`/projects/${encodeURIComponent(place.project)}/blend`)
      .then((defaults) => { if (!gone) leave = makeScreen(room, place.project, defaults); })
      .catch((error) => gone || tell(trouble, error));
    return () => ((gone = true), leave());
  });
}

/** A labelled input, textarea or select. */
function makeField(label, given, options) {
  const kind = options ? "select" : given.rows ? "textarea" : "input";
  const control = el(kind, { "aria-label": label, ...given }, (options || []).map((name) => el("option", { value: name, selected: name === given.value }, name)));
  return { control, node: el("label", { class: "field" }, el("span", {}, label), control) };
}

function makeScreen(room, project, defaults) {
  const address = `/projects/${encodeURIComponent(project)}`;
  const before = kept("blend", project, { values: {}, loras: [], dismissed: [], routing: true });
  const size = { type: "number", min: 32, max: 2048, step: 8 };
  const fields = {
    prompt: makeField("Prompt", { rows: 3, value: defaults.prompt }),
    seed: makeField("Seed", { type: "number", min: 0, step: 1, value: defaults.seed }),
    negative: makeField("Negative prompt", { value: defaults.negative }),
    width: makeField("Width", { ...size, value: defaults.width }),
    height: makeField("Height", { ...size, value: defaults.height }),
    guidance: makeField("Guidance", { type: "number", min: 0, max: 30, step: 0.5, value: defaults.guidance }),
    steps: makeField("Sampling steps", { type: "number", min: 1, max: 200, step: 1, value: defaults.steps }),
    scheduler: makeField("Sampler", { value: defaults.scheduler }, defaults.schedulers),
  };
  const formed = () => Object.fromEntries(Object.entries(fields).map(([name, { control }]) => [name, control.value]));
  const given = formed();
  for (const [name, value] of Object.entries(before.values)) if (fields[name]) fields[name].control.value = value;
  const trouble = el("div");
  const rowsRoom = el("div", { class: "rows" });
  const empty = el("p", { class: "subdued" }, "No LoRA yet: add some from the library below, or write a trigger word into the prompt.");
  const routing = el("input", { type: "checkbox", checked: before.routing, onchange: () => { dismissed.clear(); routeSoon(0); } });
  const draw = el("button", { type: "submit", class: "primary" }, "Draw");
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Drawing" });
  const words = el("p", { class: "subdued", role: "status" }, `On ${defaults.base}. Move a slider, and the picture is drawn anew.`);
  const fresh = el("button", { type: "button", class: "quiet small", onclick: () => { fields.seed.control.value = Math.floor(Math.random() * 1e6); drawSoon(0); } }, "New seed");
  const saved = makeSaved(address, defaults, { loras: () => rows.map((row) => row.use()), load: loadBlend, exported: () => library.look(), trouble });
  const form = el("form", { class: "card settings", onsubmit: (event) => (event.preventDefault(), drawSoon(0)) },
    fields.prompt.node,
    el("label", { class: "check" }, routing, " Trigger words in the prompt bring their LoRAs in"),
    el("div", { class: "row" }, fields.seed.node, fresh, draw),
    el("details", {}, el("summary", {}, "More"), el("div", { class: "more" }, ["negative", "width", "height", "guidance", "steps", "scheduler"].map((name) => fields[name].node))),
    el("h2", {}, "LoRAs"), empty, rowsRoom, saved.node, trouble);
  const image = el("img", { alt: "", hidden: true });
  const save = el("a", { class: "button small", hidden: true, download: `${project}-blend.png` }, "Save picture");
  const library = makeLibrary({ family: defaults.family, add: (card) => addRow({ file: card.key, unet: card.strength, text: card.strength }, card), has: (key) => rows.some((row) => row.file === key) });
  const cardPicture = makeCardPicture({ card: library.card, after: () => library.look(), trouble });
  room.replaceChildren(el("h1", {}, "Blend"), el("div", { class: "two" }, form,
    el("section", { class: "card view", "aria-label": "Picture" }, el("div", { class: "stage" }, image), bar, words, el("div", { class: "row" }, save, cardPicture.node))), library.node);

  let rows = [];
  let halt = () => {};
  let drawTimer = 0;
  let routeTimer = 0;
  let gone = false;
  const routed = newest();
  let isBack = false; // what was kept stands in the rows again
  const dismissed = new Set(before.dismissed); // brought in by a word, and taken out again by the person

  const readForm = () => ({
    ...Object.fromEntries(["prompt", "negative", "scheduler"].map((name) => [name, fields[name].control.value])),
    ...Object.fromEntries(["seed", "width", "height", "guidance", "steps"].map((name) => [name, Number(fields[name].control.value)])),
  });

  /** Adds a LoRA; `word` is the trigger word that brought it in. A LoRA that is there already stays as it is. */
  function addRow(use, card, word = "", isQuiet = false) {
    if (rows.some((row) => row.file === use.file)) return;
    const row = makeRow({ use, card, word, blocks: defaults.blocks, changed: () => drawSoon(), removed: () => removeRow(row), weigh: () => weigh(use.file) });
    rows.push(row);
    rowsRoom.append(row.node);
    arranged();
    if (!isQuiet) drawSoon();
  }

  function removeRow(row) {
    if (row.word) dismissed.add(row.file);
    rows = rows.filter((one) => one !== row);
    row.node.remove();
    arranged();
    drawSoon();
  }

  function arranged() {
    empty.hidden = rows.length > 0;
    saved.changed(rows.map((row) => library.card(row.file)));
    library.mark();
  }

  async function loadBlend(loras) {
    await library.ready;
    if (gone) return;
    for (const row of rows) row.node.remove();
    rows = [];
    for (const use of loras) addRow(use, library.card(use.file), "", true);
    arranged();
    drawSoon(0);
    routeSoon(0);
  }

  function drawSoon(pause = PAUSE) {
    clearTimeout(drawTimer);
    drawTimer = setTimeout(drawNow, pause);
  }

  function routeSoon(pause = 300) {
    clearTimeout(routeTimer);
    routeTimer = setTimeout(routeNow, pause);
  }

  /** Brings in what the prompt names, and takes out what it named before. */
  async function routeNow() {
    try {
      const prompt = fields.prompt.control.value;
      const answer = await routed(routing.checked ? post(`${address}/route`, { prompt }) : { loras: [] });
      await library.ready;
      if (!answer || gone || prompt !== fields.prompt.control.value) return;
      const found = answer.loras;
      const named = new Set(found.map((one) => one.file));
      for (const file of [...dismissed]) if (!named.has(file)) dismissed.delete(file);
      const old = rows.filter((row) => row.word && !named.has(row.file));
      for (const row of old) row.node.remove();
      rows = rows.filter((row) => !old.includes(row));
      for (const { file, word, strength } of found) {
        if (!dismissed.has(file)) addRow({ file, unet: strength, text: strength }, library.card(file), word);
      }
      arranged();
      if (old.length) drawSoon();
    } catch (error) {
      if (!gone) tell(trouble, error);
    }
  }

  async function drawNow() {
    clearTimeout(drawTimer);
    halt();
    let stopped = false;
    let stop = () => {};
    halt = () => ((stopped = true), stop());
    bar.hidden = false;
    bar.removeAttribute("value");
    const ended = () => (halt(), (bar.hidden = true));
    const asked = { ...readForm(), loras: rows.map((row) => row.use()) };
    const spelled = rows.map((row) => row.spelled()).join(", ") || "without any LoRA";
    try {
      const { id } = await post(`${address}/blend`, asked);
      if (stopped) return;
      stop = poll(async () => {
        const found = await get(`/blend/${id}`).catch((error) => ({ state: "failed", picture: "", error }));
        if (stopped) return;
        if (found.total) bar.value = found.done / found.total;
        if (found.picture) await show(found.picture, `${asked.prompt}, ${spelled}`, asked.loras.map((one) => one.file), () => stopped);
        if (stopped) return;
        words.textContent = { waiting: "Waiting…", loading: "Loading…", drawing: "Drawing…", done: spelled, cancelled: "Given up for another one.", failed: "" }[found.state];
        if (!["done", "failed", "cancelled"].includes(found.state)) return;
        ended();
        tell(trouble, found.error || (found.problem ? new Error(found.problem) : null));
      }, 0.15);
    } catch (error) {
      if (stopped) return;
      ended();
      tell(trouble, error);
    }
  }

  async function show(url, alt, files, isOver) {
    if (image.getAttribute("src") === url) return;
    const decoded = new Image();
    decoded.src = url;
    await decoded.decode(); // so that the one before stays until this one can be seen
    if (isOver()) return;
    image.src = save.href = url;
    image.alt = alt;
    image.hidden = save.hidden = false;
    cardPicture.drawn(url, files);
  }

  /** Where a LoRA's weight lies, block by block. */
  function weigh(file) {
    return new Promise((answered, failed) => {
      post(`${address}/blend/weigh`, { file }).then(({ id }) => {
        const stop = poll(async () => {
          const found = await get(`/blend/${id}`).catch((error) => ({ state: "failed", problem: error.message }));
          if (gone || !["done", "failed", "cancelled"].includes(found.state)) return gone && stop();
          stop();
          if (found.answer) answered(found.answer.blocks);
          else failed(new Error(found.problem || "It was given up"));
        }, 0.2);
      }, failed);
    });
  }

  fields.prompt.control.addEventListener("input", () => routeSoon());
  for (const { control } of Object.values(fields)) control.addEventListener("change", () => rows.length && drawSoon());
  library.ready.then(() => {
    if (gone) return;
    const missing = before.loras.filter(({ use }) => !library.card(use.file)).map(({ use }) => use.file.split("/").pop());
    for (const { use, word } of before.loras) if (library.card(use.file)) addRow(use, library.card(use.file), word, true);
    isBack = true;
    if (missing.length) toast(`Not in the library any more: ${missing.join(", ")}`);
    arranged();
    if (rows.length) drawSoon(0);
    routeSoon(0);
  });
  const put = () => {
    // What nobody has changed is not kept: another run may bring another base, with its own size and steps.
    const values = Object.fromEntries(Object.entries(formed()).filter(([name, value]) => value !== given[name]));
    const awaited = isBack ? [] : before.loras;
    const added = rows.filter((row) => !awaited.some(({ use }) => use.file === row.file));
    const loras = [...awaited, ...added.map((row) => ({ use: row.use(), word: row.word }))];
    keep("blend", project, { values, routing: routing.checked, dismissed: [...dismissed], loras });
  };
  window.addEventListener("pagehide", put);
  return () => {
    gone = true;
    halt();
    clearTimeout(drawTimer);
    clearTimeout(routeTimer);
    library.leave();
    window.removeEventListener("pagehide", put);
    put();
  };
}
