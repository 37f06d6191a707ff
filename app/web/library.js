// The library: every LoRA there is as a card, searched, described, brought in and taken out.
import { bytes, confirmed, el, get, inTurn, newest, plural, post, put, tell, toast } from "/web/core.js";
import { makeBringing } from "/web/bring.js";
import { choosePicture } from "/web/card_picture.js";
import { chosenFiles, takeDrops } from "/web/drop.js";

const AGAIN = 2000; // milliseconds after which is asked again what was not answered

const FAMILIES = { sd1: "SD 1.x", sd2: "SD 2.x", sdxl: "SDXL", flux: "Flux", sd3: "SD 3", unknown: "family unknown" };

const wordsOf = (card) => (card.words.length ? card.words.join(", ") : "no trigger word (Details sets one)");

/** Where a LoRA comes from and since when: by this two of one name are told apart. */
function originOf(card) {
  const from = card.project ? `trained in ${card.project}` : card.run ? "own run" : card.name === `${card.title}.safetensors` ? "" : card.name;
  return [from, card.steps && `${card.steps} steps`, new Date(card.changed * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })].filter(Boolean).join(" · ");
}

/** The panel. `add(card)` is called for a LoRA of the base's `family`; `has(key)` says whether it is in use. */
export function makeLibrary({ family, add, has }) {
  let cards = [];
  let shown = new Map(); // key -> { card, node } of what the grid holds
  let all = new Map();
  let timer = 0;
  const listed = newest();
  let gone = false;
  let isUnanswered = false;
  let known;
  const ready = new Promise((done) => (known = done)); // once it is known which LoRAs there are
  const trouble = el("div");
  const search = el("input", { type: "search", "aria-label": "Search the library", placeholder: "Search: name, trigger word, family, metadata", oninput: () => { clearTimeout(timer); timer = setTimeout(look, 200); } });
  const file = el("input", { type: "file", multiple: true, accept: ".safetensors,.png,.zip", hidden: true, "aria-label": "LoRA files", onchange: () => (bringing.bring(chosenFiles(file), []), (file.value = "")) });
  const told = el("p", { class: "subdued", role: "status" });
  const bringing = makeBringing(trouble, () => look());
  const grid = el("div", { class: "lora-cards" });
  const node = el("section", { class: "library", "aria-label": "Library" },
    el("div", { class: "row" }, el("h2", {}, "Library"), search, el("button", { type: "button", class: "small", onclick: () => file.click() }, "Bring files in"), file),
    bringing.node, trouble, told, grid);
  const endDrops = takeDrops(bringing.bring);

  const ask = (words) => get(`/library?q=${encodeURIComponent(words)}`);
  const look = () => draw(search.value, ask(search.value));

  /** Asks for every LoRA until it is told: what a search answers, which may come first, leaves some out. */
  async function learn() {
    const asking = ask("");
    if (!search.value) draw("", asking);
    const found = await asking.catch(() => null);
    if (gone) return;
    if (!found) return void setTimeout(() => gone || learn(), AGAIN);
    all = new Map([...found.cards.map((card) => [card.key, card]), ...all]);
    known();
  }

  async function draw(words, asking) {
    const found = await listed(asking).catch((error) => (tell(trouble, error), (isUnanswered = true), null));
    if (!found) return;
    if (isUnanswered) tell(trouble, null);
    isUnanswered = false;
    // A card that says what it said keeps its place in the page: somebody may be typing in its details.
    const before = shown;
    shown = new Map(found.cards.map((card) => {
      const old = before.get(card.key);
      return [card.key, old && JSON.stringify(old.card) === JSON.stringify(card) ? old : { card, node: makeCard(card) }];
    }));
    cards = [...shown.values()].map((one) => one.card);
    all = new Map([...(words ? all : []), ...cards.map((card) => [card.key, card])]);
    told.textContent = found.total
      ? words ? `${cards.length} of ${plural(found.total, "LoRA")}` : plural(found.total, "LoRA")
      : "Empty: drop .safetensors files here, or train one. Finished runs show up by themselves.";
    const nodes = [...shown.values()].map((one) => one.node);
    for (const old of [...grid.children]) if (!nodes.includes(old)) old.remove();
    nodes.forEach((one, at) => grid.children[at] !== one && grid.insertBefore(one, grid.children[at] || null));
    mark();
  }

  function makeCard(card) {
    const isOther = card.family && !["unknown", family].includes(card.family);
    const facts = [FAMILIES[card.family] || card.family, card.ranks.length ? `rank ${card.ranks.length > 1 ? `${card.ranks[0]} to ${card.ranks.at(-1)}` : card.ranks[0]}` : "", card.kinds.filter((kind) => kind !== "lora").join(", "), bytes(card.size)].filter(Boolean).join(" · ");
    const button = el("button", { type: "button", class: "small add", data: { key: card.key }, "aria-label": `Add ${card.title} to the blend`, disabled: Boolean(card.problem) || isOther || has(card.key), onclick: () => add(card) }, has(card.key) ? "In the blend" : "Add");
    const details = el("details", { ontoggle: () => details.open && describe(card, inside) }, el("summary", {}, "Details"));
    const inside = el("div", { class: "details" });
    details.append(inside);
    return el("article", { class: "card lora-card" },
      card.picture ? el("img", { src: card.picture, alt: "", loading: "lazy" }) : el("div", { class: "no-picture", "aria-hidden": "true" }),
      el("b", { class: "title", title: card.key }, card.title), el("p", { class: "subdued" }, facts),
      el("p", { class: "subdued" }, originOf(card)),
      card.problem ? el("p", { class: "bad" }, card.problem) : el("p", { class: "words" }, wordsOf(card)),
      el("div", { class: "row" }, button, isOther && el("span", { class: "subdued" }, "another family")), details);
  }

  /** What is inside a file, and what routing does with it. */
  async function describe(card, room) {
    if (room.childElementCount) return;
    const save = inTurn();
    const change = (said) => save(() => put("/library/card", { file: card.key, ...said })).then((now) => {
      Object.assign(card, now);
      const words = room.closest(".lora-card").querySelector(".words");
      if (words) words.textContent = wordsOf(card);
      tell(trouble, null);
    }).catch((error) => tell(trouble, error));
    const strength = el("input", { type: "number", min: -4, max: 4, step: 0.05, value: card.strength, "aria-label": "Default strength", onchange: () => change({ strength: Number(strength.value) }) });
    const triggers = el("input", { value: card.words.map((word) => (word.includes(",") ? `"${word}"` : word)).join(", "), "aria-label": "Trigger words", onchange: () => change({ words: triggers.value }) });
    const routed = el("input", { type: "checkbox", checked: card.routed, onchange: () => change({ routed: routed.checked }) });
    const facts = el("div", {}, el("p", { class: "subdued" }, "Reading the file…"));
    room.replaceChildren(
      el("label", { class: "field" }, el("span", {}, "Trigger words"), triggers),
      el("label", { class: "field" }, el("span", {}, "Default strength"), strength),
      el("label", { class: "check" }, routed, " Brought in by its words"), facts,
      el("div", { class: "row" },
        card.chosen && el("button", { type: "button", class: "quiet small", onclick: () => choosePicture(card.key, "").then(look, (error) => tell(trouble, error)) }, "Its own picture again"),
        !card.run && el("button", { type: "button", class: "quiet small", onclick: () => remove(card) }, "Remove from the library")));
    try {
      const found = await get(`/library/card?file=${encodeURIComponent(card.key)}`);
      facts.replaceChildren(el("p", { class: "hash" }, `AutoV2 ${found.autov2} · AutoV3 ${found.autov3}`),
        el("table", {}, el("tbody", {}, Object.entries(found.metadata).map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value))))));
    } catch (error) {
      facts.replaceChildren();
      tell(trouble, error);
    }
  }

  async function remove(card) {
    if (!(await confirmed(`Remove ${card.title} from the library?`, "Remove", "Keep"))) return;
    try {
      const { ticket } = await post("/library/remove", { file: card.key });
      await look();
      toast(`${card.title} was removed.`, () => post("/library/restore", { ticket }).then(look, (error) => tell(trouble, error)));
    } catch (error) {
      tell(trouble, error);
    }
  }

  /** Shows which cards are in the blend. */
  function mark() {
    for (const button of grid.querySelectorAll("button.add")) {
      const { card } = shown.get(button.dataset.key);
      const isOther = card.family && !["unknown", family].includes(card.family);
      button.disabled = Boolean(card.problem) || isOther || has(card.key);
      button.textContent = has(card.key) ? "In the blend" : "Add";
    }
  }

  learn();
  return { node, ready, look, mark, card: (key) => all.get(key), leave: () => ((gone = true), endDrops(), clearTimeout(timer)) };
}
