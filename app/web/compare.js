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

/** The project, its runs with a LoRA, and the settings that the newest of these begins with. */
async function begin(id) {
  const project = await get(`/projects/${encodeURIComponent(id)}`);
  const runs = (await get("/runs")).runs.filter((one) => project.runs.includes(one.id) && one.files.length);
  return { project, runs, defaults: runs.length ? await get(`/runs/${encodeURIComponent(runs[0].id)}/studio`) : null };
}

function makeScreen(room, { project, runs, defaults }) {
  if (!runs.length) {
    room.replaceChildren(el("div", { class: "card" }, el("h1", {}, "No LoRA to compare yet"), el("p", {}, "Stop and keep writes one at any moment of a training."), el("a", { class: "button primary", href: address("train", project.id) }, "Go to Train")));
    return () => {};
  }
  // Every LoRA of the project: [value of a choice, what it is called, {run, step}].
  const files = runs.flatMap((run) => run.files.map((file) => {
    const step = file.step === null ? "finished" : `step ${file.step}`;
    return [`${run.id}|${file.step}`, runs.length > 1 ? `${run.id}, ${step}` : step, { run: run.id, step: file.step }];
  }));
  const blind = makeTournaments();
  const grid = makeGrid({ project, files, defaults, start: (id, over) => blind.start(id, over).then((begun) => begun && show("blind")) });
  const strength = makeCalibration({ project, files, defaults });
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
