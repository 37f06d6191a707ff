// Images: drop a folder, look over the captions, leave out what does not fit.
import { UNNAMED, address, copyButton, el, errorCard, get, go, inTurn, newest, onShow, patch, plural, post, put, tell, toast } from "/web/core.js";
import { startUpload, takeDrops, watchUpload } from "/web/drop.js";
import { makeHealth } from "/web/health.js";
import { makeMasks } from "/web/masks.js";
import { startOrQueue } from "/web/queue.js";
import { makeTools } from "/web/tools.js";
import { makeVersions } from "/web/versions.js";
import { makeZone } from "/web/zone.js";

const FILTERS = [
  ["all", "All", () => true],
  ["none", "No caption", (image) => !image.caption],
  ["long", "Too long", (image) => image.cut !== null],
  ["out", "Excluded", (image) => image.excluded],
  ["bad", "Problems", (image) => image.problems.length > 0],
];
const SLICE = 60;

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("images", ({ project }) => {
    const screen = makeScreen(room, project);
    screen.load();
    return screen.leave;
  });
}

function makeScreen(room, project) {
  const base = `/projects/${encodeURIComponent(project)}`;
  const save = inTurn(); // two changes of one picture must arrive as they were made; Start waits for them
  const [listed, foreseen] = [newest(), newest()];
  const trouble = el("div");
  const news = el("div", { role: "status", "aria-live": "polite" });
  const health = makeHealth();
  const grid = el("div", { class: "grid" });
  const nothing = el("p", { class: "subdued", hidden: true }, "No picture is like this.");
  const find = el("input", { type: "search", placeholder: "Search names and captions", "aria-label": "Search names and captions", oninput: () => filter() });
  const chips = el("div", { class: "row", role: "group", "aria-label": "Show" });
  const start = el("button", { type: "button", class: "primary", onclick: () => begin() }, "Start training");
  const would = el("span", { class: "subdued" });
  const next = el("div", { class: "row" }, would, el("a", { class: "button", href: address("recipe", project) }, "Next: Recipe"), start);
  const bulk = el("div", { class: "row bulk", role: "group", "aria-label": "Selected pictures" });
  const tools = makeTools(base, { images: () => images, picked: () => picked(), seen: () => images.filter((image) => !image.excluded && cards.get(image.rel)?.node.hidden !== true), take: (answer) => take(answer), filter: () => filter(), exclude: (values) => exclude(values), save, tell: (error) => tell(trouble, error) });
  const work = el("div", { class: "work" }, triggerField(), health.node, tools.node, el("div", { class: "row tools" }, chips, find), bulk, nothing, grid);
  const zone = makeZone(base, (files) => receive(files), () => load(), (error) => tell(trouble, error));
  const cards = new Map();
  let images = [];
  let shown = "all";
  let gone = false;
  let changes = 0; // answers about some pictures that were taken in

  room.replaceChildren(el("div", { class: "row head" }, el("h1", {}, "Images"), next), trouble, zone, news, work);
  work.insertBefore(el("div", { class: "row about-set" }, makeMasks(base, grid, load, save), makeVersions(base, load, save)), bulk);
  const receive = (files, unread = []) => {
    tell(trouble, null);
    if (files.length || unread.length) {
      startUpload(project, files, unread);
    } else news.replaceChildren(el("p", {}, "There is no file in what was dropped."));
  };
  const endDrops = takeDrops(receive);
  const endWatch = watchUpload(project, showUpload);

  /** A project without a name takes that of its folder. */
  async function nameAfter(folder) {
    try {
      if (!folder || (await get(base)).name !== UNNAMED) return;
      await patch(base, { name: folder });
      document.dispatchEvent(new CustomEvent("impasto:named"));
    } catch {
      // The name is no reason to trouble anybody: it can be given on Home.
    }
  }

  async function load() {
    const before = changes;
    try {
      const answer = await listed(get(`${base}/images`));
      if (!answer || gone) return;
      if (before !== changes) return load(); // it may be older than what was changed meanwhile
      draw(answer);
      tell(trouble, null);
    } catch (error) {
      if (!gone) tell(trouble, error);
    }
  }

  function draw(answer) {
    // A picture that was there keeps its card: somebody may be typing in it.
    const before = new Map(images.map((image) => [image.rel, image]));
    const thumbs = new Map(answer.images.map((image) => [image.rel, image.thumb]));
    images = answer.images.map((now) => Object.assign(before.get(now.rel) || {}, now));
    const empty = !images.length;
    zone.classList.toggle("large", empty);
    zone.querySelector(".where").textContent = answer.source === "own" ? "" : `Read from ${answer.source}; nothing there is ever changed.`;
    zone.querySelector(".back").hidden = answer.source === "own";
    zone.querySelector(".add").hidden = answer.source !== "own";
    work.hidden = empty && answer.source === "own" && !answer.health.problems.length && !answer.health.unreadable.length;
    next.hidden = !images.some((image) => !image.excluded);
    health.draw(answer.health);
    chips.replaceChildren(...FILTERS.map(([key]) => el("button", { type: "button", class: "small", onclick: () => { shown = key; drawChips(); filter(); } })));
    drawChips();
    foresee();
    for (const [rel, card] of cards) if (thumbs.get(rel) !== card.thumb) (card.node.remove(), cards.delete(rel));
    tools.load();
    drawSome(0);
    grid.dispatchEvent(new Event("impasto:read"));
  }

  function drawChips() {
    FILTERS.forEach(([key, label, test], index) => {
      const text = `${label} ${images.filter(test).length}`;
      if (chips.children[index].textContent !== text) chips.children[index].textContent = text;
      chips.children[index].setAttribute("aria-pressed", String(shown === key));
    });
  }

  /** What Start would do, in a few words beside it. */
  async function foresee() {
    const found = await foreseen(next.hidden ? {} : post(`${base}/check`, { force: true }).catch(() => ({})));
    if (found) would.textContent = found.ok ? `${found.steps} steps on ${found.base}, preset ${found.preset}` : "";
  }

  /** Straight from the pictures, with the recipe as it is; where that cannot be, the Recipe says why. */
  async function begin() {
    start.disabled = true;
    await save(() => {});
    try {
      const run = await startOrQueue(base);
      if (run) go("train", project, run.id);
    } catch (error) {
      if (error.problems?.length) go("recipe", project);
      else tell(trouble, error);
    }
    start.disabled = false;
  }

  /** A thousand cards in slices, so that the page answers in between. */
  function drawSome(from) {
    if (gone) return;
    const list = images;
    list.slice(from, from + SLICE).forEach((image, at) => {
      if (cards.has(image.rel)) cards.get(image.rel).refresh();
      else cards.set(image.rel, makeCard(image));
      const { node } = cards.get(image.rel);
      const there = grid.children[from + at];
      if (there !== node) grid.insertBefore(node, there || null);
    });
    filter(from);
    if (from + SLICE < list.length) setTimeout(() => list === images && drawSome(from + SLICE));
  }

  function filter(from = 0) {
    const test = FILTERS.find(([key]) => key === shown)[2];
    const words = find.value.toLowerCase();
    for (const image of images.slice(from)) {
      const card = cards.get(image.rel);
      if (card) card.node.hidden = !(test(image) && tools.keeps(image) && `${image.rel} ${image.caption || image.fallback}`.toLowerCase().includes(words));
    }
    nothing.hidden = !images.length || images.some((image) => cards.get(image.rel)?.node.hidden !== true);
    drawBulk();
  }

  function makeCard(image) {
    const mark = el("span", { class: "mark-saved", role: "status" });
    const text = el("textarea", { rows: 3, "aria-label": `Caption of ${image.rel}` });
    const count = el("span", { class: "subdued" });
    const cut = el("p", { class: "cut" });
    const fault = el("div");
    const badges = el("div", { class: "badges" });
    const pick = el("input", { type: "checkbox", "aria-label": `Select ${image.rel}`, onchange: drawBulk });
    const out = el("button", { type: "button", class: "quiet small", onclick: () => exclude({ [image.rel]: !image.excluded }) });
    const node = el("article", { class: "picture" },
      el("label", { class: "thumb" }, pick, el("img", { src: `${image.thumb}&w=192`, alt: image.rel, loading: "lazy", decoding: "async", draggable: false }), tools.crop(image), el("button", { type: "button", class: "small view", "aria-label": `View ${image.rel}`, onclick: () => tools.view(image) }, "View")),
      el("div", { class: "row name" }, el("span", { title: image.rel }, image.rel.split("/").pop()), mark),
      text, cut, el("div", { class: "row under" }, count, out), badges, fault);
    let known = ""; // the caption as it was last told: a field that holds anything else is being written in
    text.addEventListener("input", () => (mark.textContent = "unsaved"));
    text.addEventListener("change", () => save(keep));
    async function keep() {
      const sent = text.value;
      mark.textContent = "saving";
      try {
        const answer = await put(`${base}/captions`, { [image.rel]: sent });
        known = sent;
        take(answer);
        fault.replaceChildren();
        mark.textContent = text.value === known ? "✓ saved" : "unsaved";
      } catch (error) {
        mark.textContent = "not saved";
        fault.replaceChildren(errorCard(error));
      }
    }
    const refresh = () => {
      if (text.value === known && text.value !== image.caption) text.value = image.caption; // after a bulk edit, a step back or an upload
      known = image.caption;
      text.placeholder = image.fallback || "Say what is in the picture";
      node.classList.toggle("out", image.excluded);
      out.textContent = image.excluded ? "Include" : "Exclude";
      out.setAttribute("aria-label", `${out.textContent} ${image.rel}`);
      count.textContent = `${image.tokens} / 75 tokens`;
      cut.textContent = image.cut === null ? "" : `Not read: ${(image.caption || image.fallback).slice(image.cut).replace(/^[\s,]+/, "")}`;
      badges.replaceChildren(...image.problems.map((problem) => el("span", { class: "badge", title: problem.hint }, problem.what)));
    };
    refresh();
    return { node, pick, refresh, thumb: image.thumb };
  }

  /** Takes in what the server answers about some pictures; the cards stay, so that nobody loses the focus. */
  function take(answer) {
    changes += 1;
    for (const now of answer.images) {
      const image = images.find((one) => one.rel === now.rel);
      if (!image) continue;
      Object.assign(image, now);
      cards.get(now.rel)?.refresh();
    }
    health.draw(answer.health);
    drawChips();
    tools.changed();
    const was = next.hidden;
    next.hidden = !answer.health.count;
    if (was !== next.hidden) foresee(); // by a step back, too
  }

  async function exclude(values) {
    if (!Object.keys(values).length) return;
    try {
      take(await save(() => put(`${base}/excluded`, values)));
      foresee();
      const names = Object.keys(values);
      const back = Object.fromEntries(names.map((name) => [name, !values[name]]));
      toast(`${names.length > 1 ? plural(names.length, "picture") : names[0].split("/").pop()} ${values[names[0]] ? "left out" : "taken in again"}.`, () => exclude(back));
    } catch (error) {
      tell(trouble, error);
    }
  }

  /** Only what is seen: nobody means a picture that a search or a filter hides. */
  const picked = () => images.filter((image) => cards.get(image.rel)?.pick.checked && !cards.get(image.rel).node.hidden);

  function drawBulk() {
    const chosen = picked();
    tools.picks();
    const set = (value) => { for (const image of images) { const card = cards.get(image.rel); if (card && !card.node.hidden) card.pick.checked = value; } drawBulk(); };
    const change = (value) => exclude(Object.fromEntries(chosen.filter((image) => image.excluded !== value).map((image) => [image.rel, value])));
    bulk.replaceChildren(
      el("button", { type: "button", class: "quiet small", onclick: () => set(true) }, "Select all"),
      ...(chosen.length ? [
        el("button", { type: "button", class: "quiet small", onclick: () => set(false) }, "Select none"),
        el("span", {}, `${chosen.length} selected`),
        el("button", { type: "button", class: "small", onclick: () => change(true) }, "Exclude"),
        el("button", { type: "button", class: "small", onclick: () => change(false) }, "Include"),
      ] : []),
    );
  }

  function triggerField() {
    const field = el("input", { id: "trigger", maxLength: 80, placeholder: "for example: zorbo style", onchange: async () => {
      try {
        await save(() => patch(base, { trigger: field.value }));
        await load();
      } catch (error) {
        tell(trouble, error);
      }
    } });
    get(base).then((found) => (field.value ||= found.trigger)).catch(() => {});
    return el("div", { class: "field trigger" }, el("label", { for: "trigger" }, "Trigger word (optional)"), field,
      el("span", { class: "help" }, "A made-up word put in front of every caption. Write it in a prompt to call your LoRA."));
  }

  /** An upload as it goes on, and what came of it. */
  function showUpload({ count, done, total, stop, folder }, result) {
    start.disabled = !result; // on half of a folder nobody wants to train
    if (!result) {
      const share = total ? Math.min(1, done / total) : 1;
      if (!news.querySelector("progress")) {
        const cancel = el("button", { type: "button", class: "small", onclick: () => stop.abort() }, "Cancel");
        news.replaceChildren(el("div", { class: "card" }, el("div", { class: "row" }, el("span"), cancel), el("progress", { max: 1, "aria-label": "Upload" })));
      }
      news.querySelector("progress").value = share;
      news.querySelector("span").textContent = `Adding ${plural(count, "file")}: ${Math.round(100 * share)} %`;
      return;
    }
    if (result.saved.length) nameAfter(folder);
    const captions = result.saved.filter((name) => /\.(txt|caption)$/i.test(name)).length;
    const line = `${plural(result.saved.length - captions, "picture")} and ${plural(captions, "caption")} added${stop.signal.aborted ? "; the rest was cancelled" : ""}.`;
    const refused = result.rejected.map(([name, why]) => `${name}: ${why}`);
    const list = el("details", {}, el("summary", {}, `${plural(refused.length, "file")} not taken`),
      el("ul", {}, refused.map((one) => el("li", {}, one))), copyButton("Copy list", () => refused.join("\n")));
    news.replaceChildren(el("p", {}, line), ...(refused.length ? [list] : []), ...result.failed.slice(0, 1).map(errorCard));
    load();
  }

  return { load, leave: () => { gone = true; endDrops(); endWatch(); tools.leave(); } };
}
