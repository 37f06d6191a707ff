// The queue: what Start does while something trains, and the list of runs that wait, on the Train screen.
import { about, address, ask, confirmed, el, get, newest, plural, poll, post, put, tell, toast } from "/web/core.js";

/** Starts a run of the project at `path`; while another one trains, asks whether it is to wait its turn. Null: neither. */
export const startOrQueue = (path, body = {}) => nowOrLater(() => post(`${path}/runs`, body), () => post(`${path}/queue`, body));

/** Goes on with the run at `path`, asking the same. Null: neither. */
export const resumeOrQueue = (path, force = false, posting = () => {}) =>
  nowOrLater(() => (posting(), post(`${path}/${force ? "resume-anyway" : "resume"}`)), () => (posting(), post(`${path}/queue`, { force })));

async function nowOrLater(begin, wait) {
  const { at_work: other, entries } = await get("/queue");
  if (!other) return begin();
  const turn = entries.length ? `, after ${plural(entries.length, "other")} that ${entries.length === 1 ? "waits" : "wait"}` : "";
  const left = other.seconds_left ? ` (${about(other.seconds_left)} left)` : "";
  const question = `Another training is going on${left}. One at a time is fastest: this one can begin when it has ended${turn}.`;
  if (!(await confirmed(question, "Add to the queue"))) return null;
  const run = await wait();
  toast("Added to the queue.");
  return run;
}

/** The card of the queue; seen while something waits. `changed()` is called when others wait. Returns its node and what ends it. */
export function makeQueue(changed) {
  const list = el("ol", { class: "waiting" });
  const facts = el("p", { class: "subdued", role: "status" });
  const bad = el("div");
  const trouble = el("div");
  const buttons = el("div", { class: "row" });
  const node = el("section", { class: "card queue", "aria-label": "Queue", hidden: true }, el("h2", {}, "Queue"), bad, list, facts, buttons, trouble);
  const latest = newest();
  let drawn = "";
  let dragged = "";
  let order = null; // not known yet

  async function act(what) {
    try {
      await what();
      tell(trouble, null);
    } catch (error) {
      tell(trouble, error);
    }
    await look();
  }

  const move = (run, to) => act(async () => {
    const others = order.filter((one) => one !== run);
    others.splice(Math.max(0, Math.min(to, others.length)), 0, run);
    if (others.join() !== order.join()) await put("/queue", { order: others });
  });

  async function cancel(entry) {
    const kept = entry.resumes ? "It stays as it was stopped." : "Nothing of it was trained yet; its settings stay in the project.";
    if (!(await confirmed(`Take “${entry.project_name}” (${entry.title}) out of the queue? ${kept}`, "Take out"))) return;
    await act(() => ask("DELETE", `/queue/${encodeURIComponent(entry.run)}`));
  }

  function line(entry, index, all) {
    const step = (label, mark, to) => el("button", {
      type: "button", class: "quiet small", "aria-label": `${label}: ${entry.project_name}, number ${index + 1}`, title: label,
      disabled: to < 0 || to >= all.length, onclick: () => move(entry.run, to), data: { key: `${entry.run} ${label}` },
    }, mark);
    const takes = entry.seconds === null ? "" : ` · ${about(entry.seconds)}`;
    const added = entry.added ? ` · added ${new Date(entry.added * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}` : "";
    const begins = entry.starts_in ? ` · begins in ${about(entry.starts_in)}` : "";
    return el("li", {
      draggable: true, data: { run: entry.run },
      ondragstart: (event) => ((dragged = entry.run), event.dataTransfer.setData("text/plain", entry.run)),
      ondragover: (event) => dragged && event.preventDefault(),
      ondrop: (event) => (event.preventDefault(), event.stopPropagation(), dragged && move(dragged, index), (dragged = "")),
      ondragend: () => (dragged = ""),
    }, el("div", { class: "row" },
      el("span", { class: "what" }, el("a", { href: address("train", entry.project, entry.run) }, entry.project_name), el("span", { class: "subdued" }, ` ${entry.title}${added}${takes}${begins}`)),
      step("Earlier", "↑", index - 1), step("Later", "↓", index + 1),
      el("button", { type: "button", class: "quiet small", "aria-label": `Take out: ${entry.project_name}, number ${index + 1}`, onclick: () => cancel(entry) }, "Take out")));
  }

  /** Why the queue stands still, or what became of the run before. */
  function words(found) {
    const now = found.at_work;
    const lines = now ? [el("p", {}, "Training now: ", el("a", { href: address("train", now.project, now.id) }, now.id))] : [];
    if (found.before) lines.push(el("p", { class: found.before.state === "paused" ? "" : "error" }, el("a", { href: address("train", found.before.project, found.before.id) }, "The run before"), `: ${found.before.sentence}`));
    if (found.why) lines.push(el("p", {}, el("b", {}, found.why)));
    return lines;
  }

  function draw(found) {
    node.hidden = !found.entries.length;
    const before = order;
    order = found.entries.map((entry) => entry.run);
    if (before && [...before].sort().join() !== [...order].sort().join()) changed();
    const focused = node.contains(document.activeElement) ? document.activeElement.dataset.key : "";
    list.replaceChildren(...found.entries.map(line));
    bad.replaceChildren(...words(found));
    facts.textContent = found.held ? "Nothing begins until you go on." : "The next one begins when the one before has ended, also when that was stopped or has failed, as long as Impasto runs; the browser may be closed. A pause holds the queue.";
    const path = found.held ? "go-on" : "hold";
    buttons.replaceChildren(el("button", { type: "button", class: found.held ? "primary" : "", data: { key: "hold" }, onclick: () => act(() => post(`/queue/${path}`)) }, found.held ? "Go on with the queue" : "Hold the queue"));
    if (focused) node.querySelector(`[data-key="${CSS.escape(focused)}"]:not(:disabled)`)?.focus();
  }

  async function look() {
    const found = await latest(get("/queue")).catch(() => null); // what the window does not answer is told on the screen
    const now = JSON.stringify(found && { ...found, at_work: found.at_work?.id, entries: found.entries.map((entry) => ({ ...entry, starts_in: about(entry.starts_in) })) });
    if (!found || now === drawn || dragged) return;
    drawn = now;
    draw(found);
  }

  return { node, close: poll(look, 2) };
}
