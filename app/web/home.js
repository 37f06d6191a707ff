// Home: every project as a card with its best picture and where it stands, and the way to a new one.
import { STATES, UNNAMED, about, address, ask, confirmed, el, folderOf, get, go, newest, onShow, patch, place, poll, post, tell } from "/web/core.js";
import { startUpload, takeDrops } from "/web/drop.js";
import { resumeOrQueue, startOrQueue } from "/web/queue.js";

/** Builds the screen; it looks again every few seconds while it is seen. */
export function mount(element) {
  const trouble = el("div");
  const heading = el("h1", {}, "Your pictures, as a style of your own");
  const tagline = el("p", { class: "subdued" }, "Drop a folder anywhere on this page and train a LoRA from it. Everything stays on this machine.");
  const fresh = el("button", { type: "button", class: "primary", onclick: () => act(fresh, makeNew) }, "New LoRA");
  const sample = el("button", { type: "button", hidden: true, onclick: () => act(sample, trySample) }, "Try with our sample (about 3 minutes)");
  const cards = el("div", { class: "cards" });
  element.replaceChildren(el("div", { class: "hero" }, heading, tagline, el("div", { class: "row" }, fresh, sample)), trouble, cards);

  async function act(button, what) {
    button.disabled = true;
    tell(trouble, null);
    try {
      await what();
    } catch (error) {
      tell(trouble, error);
    } finally {
      button.disabled = false;
    }
  }

  async function makeNew() {
    const made = await post("/projects", { name: UNNAMED });
    go("images", made.id);
  }

  /** A folder dropped here is a project of its name. */
  async function takeIn(files, unread) {
    if (!files.length && !unread.length) return;
    const made = await post("/projects", { name: folderOf(files) || UNNAMED });
    if (startUpload(made.id, files, unread)) go("images", made.id);
    else await ask("DELETE", `/projects/${made.id}`);
  }

  /** The pictures that ship, used from their place: one press trains. */
  async function trySample() {
    const made = await post("/sample");
    const run = await startOrQueue(`/projects/${made.id}`);
    if (place().screen !== "home") return; // gone elsewhere meanwhile, which also answers the question with no
    go(run ? "train" : "images", made.id, run?.id);
  }

  async function rename(project) {
    const field = el("input", { value: project.name, maxLength: 80, "aria-label": "Name of the project" });
    const dialog = el("dialog", { class: "question piece", "aria-label": "Rename the project" });
    const room = el("div");
    const save = async () => {
      try {
        await patch(`/projects/${project.id}`, { name: field.value });
        dialog.close();
        await look();
      } catch (error) {
        tell(room, error);
      }
    };
    dialog.append(
      el("form", { onsubmit: (event) => (event.preventDefault(), save()) }, field, room,
        el("div", { class: "row" }, el("button", { type: "submit", class: "primary" }, "Rename"),
          el("button", { type: "button", onclick: () => dialog.close() }, "Cancel"))),
    );
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    field.select();
  }

  async function remove(project) {
    const copied = project.source === "own" ? "The pictures copied into it are deleted." : "Your own folder stays as it is.";
    if (!(await confirmed(`Delete the project “${project.name}”? ${copied} Finished LoRAs stay in the folder of runs.`, "Delete"))) return;
    await act(fresh, async () => {
      await ask("DELETE", `/projects/${project.id}`);
      await look();
    });
  }

  function card(project) {
    const run = project.latest;
    const target = address(run ? "train" : "images", project.id);
    const cover = project.cover
      ? el("img", { src: project.cover, alt: `Newest sample of ${project.name}`, loading: "lazy" })
      : el("div", { class: "none" }, "No sample yet");
    const actions = [el("a", { class: "button small", href: target }, "Open")];
    if (run && run.can.includes("resume")) {
      const resume = el("button", { type: "button", class: "small", onclick: () => act(resume, async () => {
        if (await resumeOrQueue(`/runs/${encodeURIComponent(run.id)}`) && place().screen === "home") go("train", project.id, run.id);
      }) }, "Resume");
      actions.push(resume);
    }
    if (run && run.files.length) actions.push(el("a", { class: "button small", href: address("studio", project.id) }, "Studio"));
    actions.push(
      el("button", { type: "button", class: "quiet small", "aria-label": `Rename ${project.name}`, onclick: () => rename(project) }, "Rename"),
      el("button", { type: "button", class: "quiet small", "aria-label": `Delete ${project.name}`, onclick: () => remove(project) }, "Delete"),
    );
    return el("article", { class: "card project" },
      el("a", { class: "cover", href: target, "aria-label": `Open ${project.name}` }, cover),
      el("div", { class: "about" }, el("h2", {}, el("a", { href: target }, project.name)), ...standing(run), el("div", { class: "row" }, actions)));
  }

  function standing(run) {
    if (!run) return [el("p", { class: "subdued" }, "Not trained yet")];
    const at = run.steps ? `, step ${run.step} of ${run.steps}` : "";
    const left = run.seconds_left ? `, ${about(run.seconds_left)} left` : "";
    const lines = [el("p", {}, `${STATES[run.state] || run.state}${at}${left}`)];
    if (["starting", "running"].includes(run.state)) {
      lines.push(el("progress", { max: run.steps || 1, value: run.step, "aria-label": "Steps done" }));
    }
    return lines;
  }

  const latest = newest();
  let drawn = "";
  async function look() {
    try {
      const found = await latest(get("/projects"));
      if (!found) return;
      const { projects } = found;
      const now = JSON.stringify(projects);
      if (now === drawn) return;
      tell(trouble, null);
      drawn = now;
      sample.hidden = projects.length > 0;
      heading.textContent = projects.length ? "Your LoRAs" : "Your pictures, as a style of your own";
      const focused = cards.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
      cards.replaceChildren(...projects.map(card));
      if (focused) [...cards.querySelectorAll("[aria-label]")].find((one) => one.getAttribute("aria-label") === focused)?.focus();
    } catch (error) {
      drawn = "";
      tell(trouble, error);
    }
  }

  onShow("home", () => {
    drawn = "";
    const endDrops = takeDrops((files, unread) => act(fresh, () => takeIn(files, unread)));
    const halt = poll(look, 3);
    return () => (endDrops(), halt());
  });
}
