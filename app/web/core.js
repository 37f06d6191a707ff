// What every screen shares: asking the REST API, building elements, knowing the address, telling errors.

/** A refused request, in the API's three sentences. `problems` says it again for each field. */
export class Refused extends Error {
  constructor(status, told) {
    super(told.what || "The window does not answer");
    this.status = status;
    this.what = this.message;
    this.where = told.where || "";
    this.hint = told.hint || "";
    this.problems = told.problems || [];
  }
}

/** Asks a route under /api and gives its JSON; text stays text, and 204 is null. Throws Refused. */
export async function ask(method, path, body, { signal, text } = {}) {
  const given = { method, signal, headers: {} };
  if (body !== undefined) {
    given.headers["Content-Type"] = text ? "application/toml" : "application/json";
    given.body = text ? body : JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(`/api${path}`, given);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, {
      what: "The window does not answer",
      hint: "Start impasto again in the terminal; a training goes on without it.",
    });
  }
  if (!answer.ok) {
    throw new Refused(answer.status, await answer.json().catch(() => ({ what: `The window answers ${answer.status}` })));
  }
  if (answer.status === 204) return null;
  const kind = answer.headers.get("Content-Type") || "";
  return kind.includes("json") ? answer.json() : answer.text();
}

export const get = (path, more) => ask("GET", path, undefined, more);
export const post = (path, body = {}, more) => ask("POST", path, body, more);
export const put = (path, body, more) => ask("PUT", path, body, more);
export const patch = (path, body, more) => ask("PATCH", path, body, more);

/**
 * For what can be asked again before it is answered: gives `fresh(asking)`, which waits for the asking and gives null, also
 * in place of its error, when a newer one has begun meanwhile. `fresh()` alone only overtakes those before.
 */
export function newest() {
  let turn = 0;
  return async (asking) => {
    const mine = ++turn;
    try {
      const answer = await asking;
      return mine === turn ? answer : null;
    } catch (error) {
      if (mine === turn) throw error;
      return null;
    }
  };
}

/** For what is written: gives `inTurn(work)`, which begins each work when those before have ended, well or not. */
export function inTurn() {
  let last = Promise.resolve();
  return (work) => {
    const mine = last.then(work);
    last = mine.catch(() => {});
    return mine;
  };
}

/** An element. `on...` are listeners, `data`/`style` objects, `class` and ARIA names attributes; children are nodes or text. */
export function el(tag, given = {}, ...children) {
  const [name, space] = tag.startsWith("svg:") ? [tag.slice(4), "http://www.w3.org/2000/svg"] : [tag, null];
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(made.dataset, value);
    else if (key === "style") Object.assign(made.style, value);
    else if (!space && key in made && !key.startsWith("aria") && !["list", "form", "class"].includes(key)) made[key] = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Where the address leads: #/ is home, #/ID/SCREEN a project's screen, #/ID/train/RUN one of its runs. */
export function place() {
  const [project = "", screen = "home", run = ""] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  return { project, screen: project ? screen : "home", run };
}

/** The address of a screen. */
export function address(screen, project = "", run = "") {
  if (screen === "home") return "#/";
  return `#/${[project, screen, run].filter(Boolean).map(encodeURIComponent).join("/")}`;
}

export function go(screen, project, run) {
  location.hash = address(screen, project, run);
}

/** What a project is called until it is given a name or gets pictures out of a named folder. */
export const UNNAMED = "New LoRA";

/** The name of the folder that dropped or chosen files come in; empty for loose files. */
export const folderOf = (files) => (files[0]?.path.includes("/") ? files[0].path.split("/")[0].slice(0, 80) : "");

const shown = new Map();

/** Calls `show(place)` each time this screen comes up, and what it returned when it goes away. */
export function onShow(screen, show) {
  shown.set(screen, show);
  if (document.body.dataset.screen === screen) change();
}

let leave = null;
let last = "";

/** Brings up the screen that the address names. */
export function change() {
  const now = place();
  const key = `${location.hash}|${shown.has(now.screen)}`;
  document.body.dataset.screen = now.screen;
  document.body.dataset.project = now.project;
  if (key === last) return;
  last = key;
  // One that stayed open on a screen that is gone could not be seen, and would keep the page from being touched.
  for (const dialog of document.querySelectorAll("dialog[open]")) {
    dialog.dispatchEvent(new Event("cancel"));
    if (dialog.open) dialog.close();
  }
  if (leave) leave();
  const show = shown.get(now.screen);
  leave = (show && show(now)) || null;
  document.dispatchEvent(new CustomEvent("impasto:place", { detail: now }));
}

/** Calls an async `look` now and `seconds` after each end, only while the page is seen. Returns what stops it. */
export function poll(look, seconds = 1) {
  let timer = 0;
  let stopped = false;
  let busy = false;
  const again = async () => {
    clearTimeout(timer);
    if (stopped || busy || document.hidden) return;
    busy = true;
    try {
      await look();
    } finally {
      busy = false;
      if (!stopped) timer = setTimeout(again, seconds * 1000);
    }
  };
  document.addEventListener("visibilitychange", again);
  again();
  return () => {
    stopped = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", again);
  };
}

/** An error as a card: what, where, hint, and a button that copies it all. */
export function errorCard(error) {
  const told = error instanceof Refused ? error : { what: error.message || String(error), where: "", hint: "", problems: [] };
  const details = () =>
    [told.what, told.where, told.hint, error.status ? `status ${error.status}` : "", location.hash, navigator.userAgent]
      .concat((told.problems || []).map((problem) => `${problem.where}: ${problem.what} ${problem.hint || ""}`))
      .filter(Boolean)
      .join("\n");
  return el(
    "div",
    { class: "error-card", role: "alert" },
    el("p", { class: "error-what" }, told.what + (/[.!?]$/.test(told.what) ? "" : ".")),
    told.where && el("p", { class: "error-where" }, told.where),
    told.hint && el("p", { class: "error-hint" }, told.hint),
    copyButton("Copy details", details),
  );
}

/** A small button that copies what `text()` gives, and says so. */
export function copyButton(label, text) {
  const button = el("button", { type: "button", class: "quiet small" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      const area = el("textarea", { value: text(), readOnly: true, rows: 6, "aria-label": "Details to copy" });
      button.replaceWith(area);
      area.select();
      return;
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** Puts an error card into `room`, in the place of the one before; null takes it away. */
export function tell(room, error) {
  const isNew = error && !room.childElementCount;
  room.replaceChildren(...(error ? [errorCard(error)] : []));
  if (isNew) room.scrollIntoView({ block: "nearest" });
}

/** A line at the foot of the page that goes by itself, or with its screen; `undo` adds a button. Of many the last three stay. */
export function toast(text, undo) {
  let room = document.getElementById("toasts");
  if (!room) {
    room = el("div", { id: "toasts", role: "status", "aria-live": "polite" });
    document.body.append(room);
    document.addEventListener("impasto:place", () => room.querySelectorAll("button").forEach((one) => one.parentElement.remove()));
  }
  while (room.childElementCount > 2) room.firstElementChild.remove();
  const line = el("div", { class: "toast" }, text);
  if (undo) {
    line.append(el("button", { type: "button", class: "quiet small", onclick: () => (line.remove(), undo()) }, "Undo"));
  }
  room.append(line);
  setTimeout(() => line.remove(), undo ? 10000 : 4000);
}

/** Asks a question with two buttons; resolves to true for the first. */
export function confirmed(question, yes, no = "Cancel") {
  return new Promise((answered) => {
    const dialog = el("dialog", { class: "question", "aria-label": question });
    const close = (answer) => (dialog.close(), dialog.remove(), answered(answer));
    dialog.append(
      el("p", {}, question),
      el(
        "div",
        { class: "row" },
        el("button", { type: "button", class: "primary", onclick: () => close(true) }, yes),
        el("button", { type: "button", autofocus: true, onclick: () => close(false) }, no),
      ),
    );
    dialog.addEventListener("cancel", () => close(false));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** What a run's state is called. */
export const STATES = {
  waiting: "Waits its turn",
  starting: "Starting",
  running: "Training",
  paused: "Paused",
  stopped: "Stopped",
  finished: "Finished",
  failed: "Training failed",
  lost: "Training ended unexpectedly",
};

/** Bytes in words: 2.1 MB. */
export function bytes(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KB", "MB", "GB"];
  let unit = 0;
  while (count >= 1000 && unit < 3) {
    count /= 1000;
    unit += 1;
  }
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

/** Seconds in words, as coarse as they are sure: about 4 min. */
export function about(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 10) return "a few seconds";
  if (seconds < 90) return `about ${Math.round(seconds / 5) * 5} s`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} min`;
  return `about ${(seconds / 3600).toFixed(1)} h`;
}

/** A learning rate as people write it: 1e-4, 2.5e-4. */
export function rate(value) {
  if (!value) return "0";
  const [digits, power] = value.toExponential(2).split("e");
  return `${Number(digits)}e${Number(power)}`;
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
