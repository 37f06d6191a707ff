// Dropped folders and chosen files, sent in batches with their relative paths.
import { Refused, folderOf, plural, toast } from "/web/core.js";

const BATCH_FILES = 100;
const BATCH_BYTES = 16e6;
const AT_ONCE = 2;

/** Takes what is dropped anywhere on the page: `receive(files, unread)`. Returns what ends that. */
export function takeDrops(receive) {
  const over = (event) => (event.preventDefault(), document.body.classList.add("dropping"));
  const away = (event) => event.relatedTarget || document.body.classList.remove("dropping");
  const drop = async (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const { files, unread } = await droppedFiles(event.dataTransfer);
    receive(files, unread);
  };
  const pairs = [["dragover", over], ["dragleave", away], ["drop", drop]];
  for (const [kind, listener] of pairs) window.addEventListener(kind, listener);
  return () => pairs.forEach(([kind, listener]) => window.removeEventListener(kind, listener));
}

/** {files: [{file, path}], unread: [[path, why]]} of a drop. Entries must be asked for before the first await: then they are gone. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const found = { files: [], unread: [] };
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

async function walk(entry, above, found) {
  const path = above + entry.name;
  if (entry.name.startsWith(".")) return;
  const missed = (error) => found.unread.push([path, `the browser could not read it (${error.name || error})`]);
  if (entry.isFile) {
    const file = await new Promise((yes, no) => entry.file(yes, no)).catch(missed);
    if (file instanceof File) found.files.push({ file, path });
    return;
  }
  const reader = entry.createReader();
  // A browser lists a hundred at a time, and an empty list at the end.
  for (;;) {
    const some = await new Promise((yes, no) => reader.readEntries(yes, no)).catch(missed);
    if (!Array.isArray(some) || !some.length) return;
    for (const inner of some) await walk(inner, `${path}/`, found);
  }
}

/** The files of an input, with their relative paths when a folder was chosen. */
export function chosenFiles(input) {
  return [...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
}

/** A caption travels with its picture: batches are cut between names without ending. */
export function batches(files) {
  const groups = new Map();
  for (const one of files) {
    const stem = one.path.replace(/\.[^./]*$/, "").toLowerCase();
    groups.set(stem, [...(groups.get(stem) || []), one]);
  }
  const made = [];
  let now = [];
  let size = 0;
  for (const group of groups.values()) {
    const more = group.reduce((sum, one) => sum + one.file.size, 0);
    if (now.length && (now.length + group.length > BATCH_FILES || size + more > BATCH_BYTES)) {
      made.push(now);
      now = [];
      size = 0;
    }
    now.push(...group);
    size += more;
  }
  return now.length ? [...made, now] : made;
}

let current = null; // {project, count, folder, done, total, stop}: one upload at a time, whichever screen is seen
const watchers = new Map();

const warn = (event) => event.preventDefault();

/** Calls `watch(upload, result)` as an upload to this project goes on; at its end `result` is there. Returns what ends that. */
export function watchUpload(project, watch) {
  watchers.set(project, watch);
  if (current?.project === project) watch(current, null);
  return () => watchers.get(project) === watch && watchers.delete(project);
}

/**
 * Sends files to a project, also while another screen is seen; what has arrived when it is stopped stays. The watcher gets
 * {saved, rejected: [[name, why]], failed: [error]}. Gives false, and takes nothing, while another upload goes on.
 */
export function startUpload(project, files, unread = []) {
  if (current) {
    toast("Wait until the files before these have been added.");
    return false;
  }
  const total = files.reduce((sum, one) => sum + one.file.size, 0);
  const upload = { project, count: files.length, folder: folderOf(files), done: 0, total, stop: new AbortController() };
  current = upload;
  window.addEventListener("beforeunload", warn);
  const told = (done) => {
    upload.done = done;
    watchers.get(project)?.(upload, null);
  };
  told(0);
  send(project, files, told, upload.stop.signal).then((result) => {
    current = null;
    window.removeEventListener("beforeunload", warn);
    const all = { ...result, rejected: [...unread, ...result.rejected] };
    const watch = watchers.get(project);
    if (watch) watch(upload, all);
    else toast(`${plural(all.saved.length, "file")} added, ${all.rejected.length + all.failed.length} not.`);
  });
  return true;
}

/** Two requests at a time; one batch that fails does not take the others with it. `told(done)` in bytes. */
async function send(project, files, told, signal) {
  const result = { saved: [], rejected: [], failed: [] };
  const waiting = batches(files);
  const sent = new Map();
  const worker = async () => {
    for (let batch = waiting.shift(); batch && !signal.aborted; batch = waiting.shift()) {
      const mine = batch;
      try {
        const answer = await sendFiles(`/projects/${encodeURIComponent(project)}/images`, mine, signal, (bytes) => {
          sent.set(mine, bytes);
          told([...sent.values()].reduce((sum, one) => sum + one, 0));
        });
        result.saved.push(...answer.saved);
        result.rejected.push(...answer.rejected);
      } catch (error) {
        if (error.name !== "AbortError") result.failed.push(error);
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  return result;
}

/** One request of files to a route. fetch tells no progress of what it sends, so this is the older way. Throws Refused. */
export function sendFiles(route, files, signal, told) {
  return new Promise((yes, no) => {
    const form = new FormData();
    for (const { file, path } of files) form.append("files", file, path);
    const request = new XMLHttpRequest();
    request.open("POST", `/api${route}`);
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => told(event.loaded));
    request.addEventListener("load", () => {
      if (request.status < 300) yes(request.response);
      else no(new Refused(request.status, request.response || { what: `The window answers ${request.status}` }));
    });
    const broken = { what: "The upload broke off", hint: "See that impasto still runs, and drop the files again." };
    request.addEventListener("error", () => no(new Refused(0, broken)));
    request.addEventListener("abort", () => no(new DOMException("aborted", "AbortError")));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
