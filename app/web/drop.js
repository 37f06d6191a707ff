// Dropped folders and chosen files, sent in batches with their relative paths.
import { Refused } from "/web/core.js";

const BATCH_FILES = 100;
const BATCH_BYTES = 16e6;
const AT_ONCE = 2;

/** The files of a drop with their relative paths. Entries must be asked for before the first await: then they are gone. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found;
}

async function walk(entry, above, found) {
  const path = above + entry.name;
  if (entry.name.startsWith(".")) return;
  if (entry.isFile) {
    const file = await new Promise((yes, no) => entry.file(yes, no)).catch(() => null);
    if (file) found.push({ file, path });
    return;
  }
  const reader = entry.createReader();
  // A browser lists a hundred at a time, and an empty list at the end.
  for (;;) {
    const some = await new Promise((yes, no) => reader.readEntries(yes, no)).catch(() => []);
    if (!some.length) return;
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

/**
 * Sends files to a project. `told({done, total})` in bytes. Gives {saved, rejected: [[name, why]], failed: [error]}; one
 * batch that fails does not take the others with it. `signal` aborts; what has arrived by then stays.
 */
export async function send(project, files, told, signal) {
  const total = files.reduce((sum, one) => sum + one.file.size, 0);
  const result = { saved: [], rejected: [], failed: [] };
  const waiting = batches(files);
  const sent = new Map();
  const worker = async () => {
    for (let batch = waiting.shift(); batch && !signal.aborted; batch = waiting.shift()) {
      const mine = batch;
      try {
        const answer = await upload(project, mine, signal, (bytes) => {
          sent.set(mine, bytes);
          told({ done: Math.min(total, [...sent.values()].reduce((sum, one) => sum + one, 0)), total });
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

/** One request. fetch tells no progress of what it sends, so this is the older way. */
function upload(project, batch, signal, told) {
  return new Promise((yes, no) => {
    const form = new FormData();
    for (const { file, path } of batch) form.append("files", file, path);
    const request = new XMLHttpRequest();
    request.open("POST", `/api/projects/${encodeURIComponent(project)}/images`);
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
