// Train: where it stands, what it costs, what it draws, and the ways to stop it. All of it is read from the run folder.
import { STATES, about, address, ask, bytes, confirmed, copyButton, el, get, go, newest, onShow, plural, poll, post, tell, toast } from "/web/core.js";
import { makeChart } from "/web/chart.js";
import { makeQueue, resumeOrQueue } from "/web/queue.js";
import { makeSamples } from "/web/samples.js";
import { makeTake } from "/web/take.js";

const ASKS = [
  ["pause", "Pause"],
  ["stop", "Stop and keep"],
  ["sample-now", "Sample now"],
  ["save-now", "Save now"],
  ["resume", "Resume"],
  ["resume-anyway", "Resume all the same"],
];

const NEWS = { "sample-now": "Samples are drawn after this step.", "save-now": "A LoRA as it stands is written after this step." };

export function mount(element) {
  const room = el("div");
  element.replaceChildren(room);
  onShow("train", (place) => show(room, place));
}

function show(room, place) {
  let gone = false;
  const none = { id: "", leave: () => {}, list: () => {} };
  let run = none;
  let again = 0;
  const trouble = el("div");
  const latest = newest();
  const queue = makeQueue(() => refresh());
  const inner = el("div", { class: "run" }, trouble);
  room.replaceChildren(queue.node, inner);
  const find = () => get(`/projects/${encodeURIComponent(place.project)}`);
  const begin = (project) => {
    const id = place.run || (project.latest && project.latest.id);
    if (id) run = follow(inner, project, id);
    else inner.replaceChildren(el("div", { class: "card none" }, el("h1", {}, "Nothing has been trained yet"), el("p", {}, "Look over the settings and press Start."), el("a", { class: "button primary", href: address("recipe", place.project) }, "Go to Recipe")));
  };
  /** A run that is taken out of the queue before it began is gone. */
  async function refresh() {
    const project = await latest(find()).catch(() => {
      if (!gone) again = setTimeout(refresh, 2000); // the queue tells a change only once
    });
    if (!project || gone || !run.id) return;
    if (project.runs.includes(run.id)) return run.list(project.runs);
    run.leave();
    run = none;
    if (place.run) go("train", place.project);
    else begin(project);
  }

  find().then((project) => gone || begin(project)).catch((error) => gone || tell(trouble, error));
  return () => {
    gone = true;
    clearTimeout(again);
    queue.close();
    run.leave();
  };
}

/** Builds the screen of one run and keeps it up to date. Returns its id, `list(runs)` for the menu, and what ends it. */
function follow(room, project, id) {
  const path = `/runs/${encodeURIComponent(id)}`;
  const trouble = el("div");
  const phase = el("h1", {}, "…");
  const bar = el("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  const facts = el("p", { class: "facts" });
  const sentence = el("p", { class: "sentence", role: "status" });
  const warnings = el("ul", { class: "warnings" });
  const buttons = el("div", { class: "row" });
  const chart = makeChart();
  const samples = makeSamples();
  const take = makeTake();
  const log = makeLog(path);
  const runs = el("select", { "aria-label": "Run", onchange: () => go("train", project.id, runs.value) });
  const list = (all) => {
    runs.hidden = all.length < 2;
    runs.replaceChildren(...[...all].reverse().map((one) => el("option", { value: one, selected: one === id }, one)));
  };
  list(project.runs);
  room.replaceChildren(
    el("section", { class: "card standing", "aria-label": "Where it stands" }, el("div", { class: "row top" }, phase, runs), bar, facts, sentence, warnings, buttons, trouble),
    take.node,
    el("div", { class: "two" }, samples.node, el("section", { class: "card", "aria-label": "Loss" }, el("h2", {}, "Loss"), chart.node)),
    log.node,
  );
  const told = { since: 0, losses: new Map(), held: new Map(), samples: new Map() };
  const latest = newest();
  let asking = "";
  let gone = false;
  let drawnButtons = "";

  async function look() {
    try {
      let status;
      let news = 0;
      do {
        status = await latest(get(`${path}/status?since=${told.since}`));
        if (!status) return; // asked again meanwhile, or the screen was left
        told.since = status.next;
        status.events.forEach(takeIn);
        news += status.events.length;
      } while (status.more);
      tell(trouble, null);
      draw(status, news > 0);
    } catch (error) {
      tell(trouble, error);
    }
  }

  function takeIn(event) {
    if (event.type === "step") {
      told.losses.set(event.step, event.loss);
      if (event.held_out_loss !== null) told.held.set(event.step, event.held_out_loss);
    } else if (event.type === "sample") told.samples.set(event.path, event);
    else if (event.type === "recovered") { // the later steps are told once more
      for (const map of [told.losses, told.held]) for (const step of [...map.keys()]) if (step > event.step) map.delete(step);
      for (const [name, sample] of [...told.samples]) if (sample.step > event.step) told.samples.delete(name);
    }
  }

  function draw(status, hasNews) {
    const working = ["starting", "running"].includes(status.state);
    const asked = { stop: "Stopping after this step", pause: "Pausing after this step" }[status.asked];
    phase.textContent = working ? asked || status.phase_words || STATES.starting : STATES[status.state];
    const counted = status.phase === "train" || !working || !status.total ? [status.step, status.steps] : [status.done, status.total];
    bar.max = counted[1] || 1;
    if (working && !counted[1]) bar.removeAttribute("value");
    else bar.value = counted[0];
    facts.textContent = [
      working && ["prior", "cache"].includes(status.phase) && status.total ? `picture ${status.done} of ${status.total}` : "",
      status.steps ? `step ${status.step} of ${status.steps}` : "",
      status.seconds_left !== null ? `${about(status.seconds_left)} left` : "",
      status.seconds_per_step ? `${status.seconds_per_step.toFixed(2)} s a step` : "",
      status.memory ? `memory ${bytes(status.memory)}` : "",
      status.device,
    ].filter(Boolean).join(" · ");
    sentence.textContent = working ? "" : status.sentence;
    sentence.classList.toggle("bad", ["failed", "lost"].includes(status.state));
    warnings.replaceChildren(...status.warnings.map((one) => el("li", {}, one)));
    drawButtons(status);
    document.title = working && status.steps ? `${Math.floor((100 * status.step) / status.steps)} % – ${project.name}` : `${project.name} – Impasto`;
    const sorted = (map) => [...map].sort((a, b) => a[0] - b[0]);
    if (hasNews) chart.draw(sorted(told.losses), sorted(told.held), status.steps);
    samples.draw(id, [...told.samples.values()]);
    take.draw(status, project.id);
  }

  function drawButtons(status) {
    const key = JSON.stringify([status.can, status.state, asking]);
    if (key === drawnButtons) return;
    drawnButtons = key;
    const focused = document.activeElement && buttons.contains(document.activeElement) ? document.activeElement.textContent : "";
    const made = ASKS.filter(([what]) => status.can.includes(what)).map(([what, label]) => el("button", {
      type: "button", class: ["resume", "stop"].includes(what) ? "primary" : "", disabled: asking === what, onclick: () => request(what),
    }, label));
    if (["failed", "lost"].includes(status.state)) {
      made.push(copyDetails(status));
      made.push(el("a", { class: "button", href: `/api${path}/report`, download: "" }, "Download a report"));
    }
    if (!["starting", "running"].includes(status.state)) {
      made.push(el("a", { class: "button", href: address("recipe", project.id) }, "Change the recipe"));
      made.push(el("button", { type: "button", class: "quiet", onclick: () => remove(status) }, "Delete this run"));
    }
    buttons.replaceChildren(...made);
    made.find((one) => one.textContent === focused)?.focus();
  }

  async function request(what) {
    const posting = () => (asking = what); // not yet while a question is open
    try {
      if (what.startsWith("resume")) await resumeOrQueue(path, what === "resume-anyway", posting);
      else await (posting(), post(`${path}/${what}`));
      if (NEWS[what]) toast(NEWS[what]);
      asking = "";
      if (!gone) await look();
    } catch (error) {
      asking = "";
      tell(trouble, error);
    }
  }

  async function remove(status) {
    const file = status.files.length ? `, with ${plural(status.files.length, "LoRA file")} in it` : "";
    if (!(await confirmed(`Delete this run and its samples${file}? What you downloaded stays.`, "Delete"))) return;
    try {
      await ask("DELETE", path);
      toast("The run was deleted.");
      go("images", project.id);
    } catch (error) {
      tell(trouble, error);
    }
  }

  function copyDetails(status) {
    let lines = [];
    get(`${path}/log`).then((found) => (lines = found.lines)).catch(() => {});
    return copyButton("Copy details", () => [status.sentence, id, ...lines.slice(-60)].join("\n"));
  }

  const halt = poll(look, 1);
  const leave = () => {
    gone = true;
    latest();
    halt();
    log.close();
    document.title = `${project.name} – Impasto`;
  };
  return { id, list, leave };
}

/** The process's own words, folded; asked for only while they are seen. */
function makeLog(path) {
  const text = el("pre", { tabIndex: 0, "aria-label": "Log" });
  const latest = newest();
  let halt = null;
  const node = el("details", { class: "log" }, el("summary", {}, "Log"), text);
  const look = async () => {
    const found = await latest(get(`${path}/log`)).catch(() => null);
    if (!found) return;
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
    text.textContent = found.lines.join("\n") || "Nothing was said yet.";
    if (atEnd) text.scrollTop = text.scrollHeight;
  };
  const close = () => (halt && halt(), (halt = null));
  node.addEventListener("toggle", () => (node.open ? (halt = poll(look, 3)) : close()));
  return { node, close };
}
