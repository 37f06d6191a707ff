// Where pictures come from: a place to drop them, files chosen, or the path of a folder that is read where it lies.
import { el, put } from "/web/core.js";
import { chosenFiles } from "/web/drop.js";

/** `receive(files)` takes chosen ones; `load` reads the pictures anew after another folder was named; `tell` shows an error. */
export function makeZone(base, receive, load, tell) {
  const input = (label, folder) => {
    const field = el("input", { type: "file", multiple: true, hidden: true, "aria-label": label, onchange: () => { receive(chosenFiles(field)); field.value = ""; } });
    if (folder) field.webkitdirectory = true;
    return [field, el("button", { type: "button", class: folder ? "primary" : "", onclick: () => field.click() }, label)];
  };
  const path = el("input", { "aria-label": "Path of a folder", placeholder: "or type a folder's path: nothing is copied" });
  const use = async (folder) => {
    try {
      await put(`${base}/source`, { folder });
      await load();
    } catch (error) {
      tell(error);
    }
  };
  return el("section", { class: "zone large", "aria-label": "Add pictures" },
    el("div", { class: "add" }, el("p", { class: "big" }, "Drop a folder of pictures here"), el("div", { class: "row" }, input("Choose a folder", true), input("Choose files", false))),
    el("p", { class: "where subdued" }),
    el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (path.value.trim()) use(path.value); } }, path, el("button", { type: "submit" }, "Use this folder"),
      el("button", { type: "button", class: "quiet back", hidden: true, onclick: () => use("own") }, "Back to dropped pictures")));
}
