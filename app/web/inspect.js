// What may be wrong with pictures: those that are alike side by side, each with a button that leaves it out.
import { el, get, newest, plural, poll } from "/web/core.js";

const KINDS = { same: "The same file", alike: "Nearly the same", small: "Too small", shape: "Odd shape", dark: "Very dark", bright: "Very bright", blurred: "May be blurred" };
const MOST = 60;

export function makeInspect(base, kit, view) {
  const told = el("p", { class: "subdued", role: "status" });
  const bar = el("progress", { max: 1, "aria-label": "Pictures looked at", hidden: true });
  const list = el("div", { class: "flaws" });
  const node = el("div", { class: "card inspect" }, told, bar, list);
  const latest = newest();
  let stop = null;
  let last = "";

  function show() {
    stop?.();
    stop = poll(async () => {
      if (!node.isConnected) return stop();
      const found = await latest(get(`${base}/inspection`)).catch((error) => (kit.tell(error), stop(), null));
      if (!found) return;
      draw(found);
      if (found.done >= found.total) stop();
    }, 1.5);
  }

  function draw(found) {
    bar.hidden = found.done >= found.total;
    bar.value = found.total ? found.done / found.total : 1;
    const state = bar.hidden ? `${plural(found.total, "picture")} looked at` : `Looking at ${found.done} of ${plural(found.total, "picture")}`;
    told.textContent = [state, found.left ? `${found.left} more are not looked at: the folder is very large` : "", found.flaws.length ? plural(found.flaws.length, "remark") + (found.flaws.length > MOST ? `, the first ${MOST} are shown` : "") : bar.hidden ? "nothing is odd" : ""].filter(Boolean).join(" · ");
    const key = JSON.stringify(found.flaws);
    if (key === last) return;
    last = key;
    list.replaceChildren(...found.flaws.slice(0, MOST).map(card));
  }

  function card(flaw) {
    const images = flaw.pictures.map((name) => kit.images().find((image) => image.rel === name)).filter(Boolean);
    const twice = images.length > 1;
    const only = (kept) => kit.exclude(Object.fromEntries(images.filter((image) => image !== kept).map((image) => [image.rel, true])));
    return el("article", { class: "flaw", "aria-label": KINDS[flaw.kind] },
      el("p", {}, el("strong", {}, KINDS[flaw.kind]), el("span", { class: "subdued" }, ` ${flaw.reason}`)),
      el("div", { class: "row" }, images.slice(0, 8).map((image) => el("figure", {},
        el("button", { type: "button", class: "look", "aria-label": `View ${image.rel}`, onclick: () => view(image) }, el("img", { src: `${image.thumb}&w=192`, alt: image.rel, loading: "lazy" })),
        el("figcaption", { class: "subdued", title: image.rel }, `${image.rel.split("/").pop()} · ${image.width} × ${image.height}`),
        el("button", { type: "button", class: "small", "aria-label": twice && images.length > 2 ? `Keep only ${image.rel}` : `Leave out ${image.rel}`, onclick: () => (twice && images.length > 2 ? only(image) : kit.exclude({ [image.rel]: true })) }, twice && images.length > 2 ? "Keep only this" : "Leave out")))));
  }

  return { node, show, leave: () => stop?.() };
}
