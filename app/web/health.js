// The health of a folder: what there is to train on, what was left out, and what may be wrong.
import { el, plural } from "/web/core.js";

/** The card that `draw(health)` fills. */
export function makeHealth() {
  const node = el("section", { class: "card health", "aria-label": "Health of the folder" });
  let told = "";

  function draw(found) {
    const key = JSON.stringify(found);
    if (key === told) return; // a thousand cards would be laid out anew for nothing
    told = key;
    const facts = [plural(found.count, "picture") + " to train on"];
    if (found.excluded) facts.push(`${found.excluded} excluded`);
    if (found.count) facts.push(`smallest side ${found.smallest_side} px (${found.smallest})`);
    facts.push(found.no_caption.length ? `${found.no_caption.length} without a caption` : "all have captions");
    if (found.too_long.length) facts.push(`${found.too_long.length} with a caption that is too long`);
    const said = (problem) => el("li", {}, [problem.where, problem.what, problem.hint].filter(Boolean).join(": "));
    node.replaceChildren(
      el("p", {}, facts.join(" · ")),
      ...(found.unreadable.length ? [el("details", { open: found.unreadable.length < 6 }, el("summary", {}, `${plural(found.unreadable.length, "file")} left out`), el("ul", {}, found.unreadable.map(said)))] : []),
      ...(found.problems.length ? [el("ul", { class: "problems" }, found.problems.map(said))] : []),
    );
  }

  return { node, draw };
}
