// Blends by name, and a blend as one file: saving, loading, deleting, exporting.
import { ask, confirmed, el, get, poll, post, put, tell, toast } from "/web/core.js";

/** The line below the LoRAs. `loras()` gives what is to be kept, `load(loras)` takes what was. */
export function makeSaved(address, defaults, { loras, load, exported, trouble }) {
  const name = el("input", { "aria-label": "Name of the blend", placeholder: "Name", maxLength: 60 });
  const list = el("select", { "aria-label": "Saved blends" });
  const button = (label, act) => {
    const made = el("button", { type: "button", class: "small", onclick: async () => {
      made.disabled = true;
      try {
        await act();
        tell(trouble, null);
      } catch (error) {
        tell(trouble, error);
      } finally {
        made.disabled = false;
        arrange();
      }
    } }, label);
    return made;
  };
  const path = () => `/blends/${encodeURIComponent(list.value)}`;
  let known = defaults.blends;
  let count = 0;

  const keep = button("Save", async () => {
    const title = name.value.trim();
    if (known.includes(title) && !(await confirmed(`Replace the blend “${title}”?`, "Replace"))) return;
    known = (await put(`/blends/${encodeURIComponent(title)}`, { loras: loras() })).blends;
    fill(title);
    toast(`Saved as ${title}.`);
  });
  const write = button("Export as one LoRA", async () => {
    const { id } = await post(`${address}/blend/export`, { name: name.value.trim(), loras: loras() });
    const done = await ended(id);
    if (!done.answer) throw new Error(done.problem || "It was given up");
    toast(`In the library now: ${name.value.trim()}. At strength 1 it does what these do together.`);
    exported();
  });
  const open = button("Load", async () => {
    const found = await get(path());
    if (found.missing.length) toast(`Not in the library any more: ${found.missing.join(", ")}`);
    name.value = list.value;
    await load(found.loras);
  });
  const remove = button("Delete", async () => {
    if (!(await confirmed(`Delete the blend “${list.value}”? Its LoRAs stay.`, "Delete"))) return;
    await ask("DELETE", path());
    known = known.filter((one) => one !== list.value);
    fill();
  });

  function ended(id) {
    return new Promise((answered, failed) => {
      const stop = poll(async () => {
        const found = await get(`/blend/${id}`).catch((error) => (stop(), failed(error)));
        if (found && ["done", "failed", "cancelled"].includes(found.state)) (stop(), answered(found));
      }, 0.3);
    });
  }

  function fill(chosen) {
    list.replaceChildren(...known.map((one) => el("option", { value: one, selected: one === chosen }, one)));
    arrange();
  }

  function arrange() {
    const isNamed = name.value.trim() !== "";
    keep.disabled = write.disabled = !count || !isNamed;
    open.disabled = remove.disabled = !known.length;
    loading.hidden = !known.length;
  }

  name.addEventListener("input", arrange);
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") (event.preventDefault(), keep.click()); });
  const loading = el("div", { class: "row" }, list, open, remove);
  fill();
  return {
    node: el("div", { class: "saved" }, el("div", { class: "row" }, name, keep, write), loading),
    changed: (number) => ((count = number), arrange()),
  };
}
