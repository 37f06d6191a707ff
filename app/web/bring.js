// LoRA files brought into the library: sent with their progress, and given up when somebody says so.
import { bytes, el, plural, tell, toast } from "/web/core.js";
import { sendFiles } from "/web/drop.js";

let current = null; // {count, size, done, stop, draw, after, trouble}: one at a time; it goes on while another screen is seen

const warn = (event) => event.preventDefault();

/** The line that tells of it. `bring(files, unread)` sends; `after()` is called when files may have come. */
export function makeBringing(trouble, after) {
  const words = el("span", { role: "status" });
  const bar = el("progress", { max: 1, value: 0, "aria-label": "Files sent" });
  const stop = el("button", { type: "button", class: "small", onclick: () => current?.stop.abort() }, "Cancel");
  const node = el("div", { class: "row bringing", hidden: true }, words, bar, stop);

  function draw() {
    node.hidden = !current;
    if (!current) return;
    const { count, done, size } = current;
    const isSent = done >= size;
    words.textContent = isSent ? `Checking ${plural(count, "file")}…` : `Adding ${plural(count, "file")}: ${bytes(done)} of ${bytes(size)}`;
    stop.hidden = isSent; // what the window has, it takes
    if (isSent) bar.removeAttribute("value");
    else bar.value = done / size;
  }

  async function bring(files, unread) {
    if (current) return toast("Wait until the files before these have been added.");
    if (!files.length) return tell(trouble, unread.length ? refusedFiles(unread) : null);
    const size = files.reduce((sum, one) => sum + one.file.size, 0);
    current = { count: files.length, size, done: 0, stop: new AbortController(), draw, after, trouble };
    window.addEventListener("beforeunload", warn);
    draw();
    try {
      const found = await sendFiles("/library/files", files, current.stop.signal, (done) => ((current.done = Math.min(done, size)), current.draw()));
      const bad = [...unread, ...found.rejected];
      report(bad.length ? refusedFiles(bad) : null);
      toast(`${plural(found.saved.length, "file")} added.`);
    } catch (error) {
      if (error.name === "AbortError") toast("Given up: nothing was added.");
      else report(error);
    }
    const ended = current;
    current = null;
    window.removeEventListener("beforeunload", warn);
    ended.draw();
    ended.after();
  }

  if (current) Object.assign(current, { draw, after, trouble }); // begun before the screen was left
  draw();
  return { node, bring };
}

/** Says it where the library is seen now, and where it is not, at the foot of the page. */
function report(error) {
  const { trouble } = current;
  tell(trouble, error);
  const isSeen = trouble.isConnected && trouble.parentElement.offsetParent !== null;
  if (error && !isSeen) toast([error.what || error.message, error.hint].filter(Boolean).join(" "));
}

const refusedFiles = (bad) => new Error(bad.map(([name, why]) => `${name}: ${why}`).join(" "));
