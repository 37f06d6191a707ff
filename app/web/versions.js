// Versions of the dataset: which one each run trained on, what changed, and the way back.
import { address, el, get, newest, place, plural, post, tell, toast } from "/web/core.js";

/** The folded list of a project's versions; `reload` draws its pictures anew, `save` does what it is given in its turn. Returns its node. */
export function makeVersions(base, reload, save) {
  const listed = newest();
  const list = el("ol", { class: "versions" });
  const trouble = el("div");
  const keep = el("button", { type: "button", class: "small", onclick: () => act(async () => { await show(save(() => post(`${base}/versions`))); toast("This version is kept."); }) }, "Keep this version");
  const node = el("details", { class: "versions-of" }, el("summary", {}, "Versions"), el("div", { class: "card" },
    el("p", { class: "help" }, "Every run pins the captions, crops and choice of pictures that it trained on. Going back changes those, never a picture."), list, keep, trouble));
  node.addEventListener("toggle", () => node.open && act(() => show(get(`${base}/versions`))));

  const show = async (asking) => {
    const found = await listed(asking);
    if (found) draw(found);
  };

  async function act(what) {
    try {
      await what();
      tell(trouble, null);
    } catch (error) {
      tell(trouble, error);
    }
  }

  const back = (id, isUndo) => act(async () => {
    const went = await save(() => post(`${base}/versions/${id}/back`)); // after a caption that is just being left
    await reload();
    await show(get(`${base}/versions`));
    const gone = went.gone.length ? ` ${plural(went.gone.length, "picture")} of it ${went.gone.length === 1 ? "is" : "are"} gone or changed.` : "";
    const out = went.left_out.length ? ` ${plural(went.left_out.length, "newer picture")} left out.` : "";
    toast(isUndo ? "As it was." : `Back at that version.${gone}${out}`, isUndo ? undefined : () => back(went.before, true));
  });

  function changes(one) {
    if (one.is_first) return plural(one.pictures, "picture");
    const parts = [["added", "added"], ["removed", "removed"], ["replaced", "replaced"]].map(([key, word]) => one[key].length && `${plural(one[key].length, "picture")} ${word}`);
    parts.push(one.captions.length && `${plural(one.captions.length, "caption")} changed`, one.other.length && `${plural(one.other.length, "crop")} changed`);
    return parts.filter(Boolean).join(", ") || "the same as the one before";
  }

  function details(one) {
    const lines = [...["added", "removed", "replaced"].flatMap((kind) => one[kind].map((name) => `${kind}: ${name}`)), ...one.other.map((name) => `crop: ${name}`)];
    const captions = one.captions.map((change) => el("li", {}, `${change.name}: `, el("del", {}, change.before || "(none)"), " ", el("ins", {}, change.after || "(none)")));
    if (one.is_first || !(lines.length + captions.length)) return null;
    return el("details", {}, el("summary", {}, "What changed"), el("ul", {}, [...lines.map((line) => el("li", {}, line)), ...captions]));
  }

  function draw(found) {
    const here = place().project;
    const line = (one) => el("li", {},
      el("div", { class: "row" }, el("code", { title: one.id }, one.id.slice(0, 8)), el("span", {}, new Date(one.pinned * 1000).toLocaleString()), el("span", { class: "subdued" }, changes(one)),
        one.is_present ? el("b", {}, "as it is now") : el("button", { type: "button", class: "small", "aria-label": `Go back to this version: ${one.id.slice(0, 8)}`, onclick: () => back(one.id) }, "Go back to this version")),
      one.runs.length ? el("div", { class: "subdued" }, "trained by ", one.runs.flatMap((run, index) => [index ? ", " : "", el("a", { href: address("train", here, run) }, run)])) : null,
      details(one));
    list.replaceChildren(...found.versions.map(line));
    keep.hidden = found.versions.some((one) => one.is_present);
    if (!found.versions.length) list.append(el("li", { class: "subdued" }, "None yet: the first run makes one."));
  }

  return node;
}
