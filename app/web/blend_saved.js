// Blends by name, and a blend as one file: saving, loading, deleting, exporting.
import { ask, confirmed, el, get, poll, post, put, tell, toast } from "/web/core.js";

const TYPES = { loha: "LoHa", lokr: "LoKr", full: "full difference" };
const needsRank = (kind) => kind !== "lora" && !kind.includes("dora"); // the one is joined without loss, the other not exported

const percent = (share) => (share > 0 && share < 0.001 ? "under 0.1 %" : `${Number((100 * share).toPrecision(2))} %`);

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
  const rank = el("input", { type: "number", min: 1, max: 4096, step: 1, value: 64, "aria-label": "Rank of the export", class: "number" });
  const why = el("span", {});
  const cut = el("div", { class: "cut-rank", hidden: true }, el("label", { class: "row" }, "Rank of the export ", rank), el("p", { class: "subdued" }, why));
  const told = el("p", { class: "subdued", role: "status", hidden: true });

  const keep = button("Save", async () => {
    const title = name.value.trim();
    if (known.includes(title) && !(await confirmed(`Replace the blend “${title}”?`, "Replace"))) return;
    known = (await put(`/blends/${encodeURIComponent(title)}`, { loras: loras() })).blends;
    fill(title);
    toast(`Saved as ${title}.`);
  });
  const write = button("Export as one LoRA", async () => {
    const wanted = cut.hidden ? null : Number(rank.value);
    const { id } = await post(`${address}/blend/export`, { name: name.value.trim(), loras: loras(), rank: wanted });
    const done = await ended(id);
    if (!done.answer) throw new Error(done.problem || "It was given up");
    const { overall_error: overall, worst_error: worst, remarks } = done.answer;
    const lost = wanted === null ? "" : `${name.value.trim()}, cut to rank ${wanted}: it lacks ${percent(overall)} of what the blend changes, ${percent(worst)} in the layer where most is lost.`;
    told.textContent = [lost, ...remarks].filter(Boolean).join(" ");
    told.hidden = !told.textContent;
    if (remarks.length) toast(remarks.join(" "));
    toast(`In the library now: ${name.value.trim()}.${wanted === null ? " At strength 1 it does what these do together." : ""}`);
    exported();
  });
  const open = button("Load", async () => {
    const chosen = list.value;
    const found = await get(path());
    if (found.missing.length) toast(`Not in the library any more: ${found.missing.join(", ")}`);
    name.value = chosen;
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

  /** A rank is asked for only where something is in the blend that is no LoRA. */
  function changed(cards) {
    count = cards.length;
    const types = [...new Set(cards.flatMap((card) => card?.kinds || []))].filter(needsRank);
    cut.hidden = !types.length;
    why.textContent = `No LoRA holds exactly what a ${types.map((kind) => TYPES[kind] || kind).join(" or a ")} changes: of each layer’s sum the export keeps that many of the strongest directions. A higher rank loses less and makes a larger file; after it you read how much was lost.`;
    arrange();
  }

  name.addEventListener("input", arrange);
  name.addEventListener("keydown", (event) => { if (event.key === "Enter") (event.preventDefault(), keep.click()); });
  const loading = el("div", { class: "row" }, list, open, remove);
  fill();
  return {
    node: el("div", { class: "saved" }, el("div", { class: "row" }, name, keep, write), cut, told, loading),
    changed,
  };
}
