// Compare: grids over two of four things, blind tournaments between their pictures, and which strength a LoRA should have.
import { address, el, get, onShow, tell } from "/web/core.js";
import { makeCalibration } from "/web/calibrate.js";
import { makeGrid } from "/web/grid.js";
import { makeTournaments } from "/web/tournament.js";

const PARTS = [
  ["grid", "Grid"],
  ["blind", "Blind tournament"],
  ["strength", "Best strength"],
];

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("compare", (place) => {
    let gone = false;
    let leave = () => {};
    const trouble = el("div");
    room.replaceChildren(trouble);
    begin(place.project)
      .then((found) => { if (!gone) leave = makeScreen(room, found); })
      .catch((error) => gone || tell(trouble, error));
    return () => ((gone = true), leave());
  });
}

/** The project, its runs with a LoRA, the library's other LoRAs for its base, and the settings to begin with. */
async function begin(id) {
  const at = `/projects/${encodeURIComponent(id)}`;
  const [project, all, usual, library] = await Promise.all([get(at), get("/runs"), get(`${at}/blend`), get("/library")]);
  const runs = all.runs.filter((one) => project.runs.includes(one.id) && one.files.length);
  const cards = library.cards.filter((card) => !card.problem && ["", "unknown", usual.family].includes(card.family) && !project.runs.includes(card.run));
  return { project, runs, cards, defaults: runs.length ? await get(`/runs/${encodeURIComponent(runs[0].id)}/studio`) : usual };
}

function makeScreen(room, { project, runs, cards, defaults }) {
  if (!runs.length && !cards.length) {
    room.replaceChildren(el("div", { class: "card" }, el("h1", {}, "No LoRA to compare yet"), el("p", {}, "Train one, or bring a file in: Blend, Library. Stop and keep writes one at any moment of a training."), el("a", { class: "button primary", href: address("train", project.id) }, "Go to Train")));
    return () => {};
  }
  // Every LoRA of the project's runs: [value of a choice, what it is called, {run, step}].
  const files = runs.flatMap((run) => run.files.map((file) => {
    const step = file.step === null ? "the finished LoRA" : `step ${file.step}`;
    return [`${run.id}|${file.step}`, runs.length + cards.length > 1 ? `${run.id}, ${step}` : step, { run: run.id, step: file.step }];
  }));
  const others = cards.map((card) => [`file|${card.key}`, `${card.title} (${card.project ? `trained in ${card.project}` : "library"})`, { file: card.key }]);
  const blind = makeTournaments();
  const grid = makeGrid({ project, files: [...files, ...others], defaults, start: (id, over) => blind.start(id, over).then((begun) => begun && show("blind")) });
  const strength = files.length ? makeCalibration({ files }) : { node: el("p", { class: "card" }, "Best strength is measured for a LoRA that this project trained, as it needs the pictures.") };
  const parts = { grid, blind, strength };
  const tabs = PARTS.map(([name, label]) => el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `part-${name}`, onclick: () => show(name) }, label));
  const panels = PARTS.map(([name]) => el("div", { role: "tabpanel", id: `part-${name}`, "aria-labelledby": `tab-${name}` }, parts[name].node));

  function show(wanted) {
    PARTS.forEach(([name], at) => {
      tabs[at].setAttribute("aria-selected", String(name === wanted));
      tabs[at].tabIndex = name === wanted ? 0 : -1;
      panels[at].hidden = name !== wanted;
    });
    parts[wanted].shown?.();
  }
  const bar = el("div", { class: "row tabs", role: "tablist", "aria-label": "What to compare", onkeydown: (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!way) return;
    const at = (tabs.indexOf(document.activeElement) + way + tabs.length) % tabs.length;
    show(PARTS[at][0]);
    tabs[at].focus();
  } }, tabs);
  room.replaceChildren(el("h1", {}, "Compare"), bar, panels[0], panels[1], panels[2]);
  show("grid");
  return () => Object.values(parts).forEach((part) => part.leave?.());
}
