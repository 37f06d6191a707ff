// What training sees of each picture: drawn on it, dragged with the mouse, a finger or the arrow keys.
import { el, get, newest, put } from "/web/core.js";

const SEEN = 0.004; // a crop that cuts off less than this share of a side is not drawn
const clamp = (value) => Math.max(0, Math.min(1, value));
const place = (node, corner, size) => Object.assign(node.style, Object.fromEntries([["left", corner[0]], ["top", corner[1]], ["width", size[0]], ["height", size[1]]].map(([side, share]) => [side, `${100 * share}%`])));

export function makeCrops(base, kit, changed) {
  const listed = newest();
  let crops = {};
  let moves = 0; // crops that were saved
  const drawn = new Map(); // name -> its overlay in the grid
  const figure = el("div", { class: "figure" });
  const title = el("h2");
  const facts = el("p", { class: "subdued" });
  const middle = el("button", { type: "button", onclick: () => save(open, null) }, "Crop the middle");
  const step = (by) => { const shown = kit.images().filter((image) => !image.excluded); view(shown[(shown.findIndex((image) => image.rel === open.rel) + by + shown.length) % shown.length]); };
  const viewer = el("dialog", { class: "question viewer", "aria-label": "Picture" }, title, figure, facts,
    el("div", { class: "row" }, el("button", { type: "button", onclick: () => step(-1) }, "Previous"), el("button", { type: "button", onclick: () => step(1) }, "Next"), middle,
      el("button", { type: "button", autofocus: true, class: "primary", onclick: () => viewer.close() }, "Close")));
  let open = null;
  let large = null;

  async function load() {
    const before = moves;
    const found = await listed(get(`${base}/crops`)).catch(() => ({}));
    if (!found) return;
    if (before !== moves) return load(); // it may be older than what was saved meanwhile
    crops = found;
    for (const overlay of drawn.values()) overlay.draw();
    large?.draw();
    tellFacts();
  }

  async function save(image, at) {
    try {
      const now = await kit.save(() => put(`${base}/crops`, { [image.rel]: at }));
      moves += 1;
      Object.assign(crops, now); // not before: meanwhile they may have been read anew
      changed();
    } catch (error) {
      kit.tell(error);
    }
    drawn.get(image.rel)?.draw();
    if (open?.rel === image.rel) (large?.draw(), tellFacts());
  }

  /** The bright part over a picture. `inset`: the picture lies within a square, as the grid shows it. */
  function make(image, inset) {
    const box = el("span", { class: "crop", ...(inset ? {} : { tabIndex: 0, role: "img", "aria-label": `Crop of ${image.rel}: the arrow keys move it` }) });
    const holder = el("span", { class: "shade", hidden: true }, box); // just over the picture, so that only that is dimmed
    const part = inset ? [Math.min(1, image.width / image.height), Math.min(1, image.height / image.width)] : [1, 1];
    place(holder, part.map((share) => (1 - share) / 2), part);
    let at = null; // while it is being moved
    const draw = () => {
      const crop = crops[image.rel];
      holder.hidden = !crop || Math.max(...crop.room) < SEEN;
      if (!holder.hidden) place(box, at ? crop.room.map((room, axis) => at[axis] * room) : crop.box.slice(0, 2), crop.room.map((room) => 1 - room));
    };
    box.addEventListener("pointerdown", (event) => {
      if (event.button || (inset && event.pointerType !== "mouse")) return; // a finger on the grid scrolls
      const crop = crops[image.rel];
      const from = [event.clientX, event.clientY];
      const size = [holder.clientWidth, holder.clientHeight];
      const begun = crop.at;
      let moved = false;
      box.setPointerCapture(event.pointerId);
      const move = (now) => {
        const by = [now.clientX - from[0], now.clientY - from[1]];
        moved ||= Math.hypot(...by) > 3;
        if (!moved) return;
        at = crop.room.map((room, axis) => (room < SEEN ? begun[axis] : clamp(begun[axis] + by[axis] / size[axis] / room)));
        draw();
      };
      const end = async () => {
        box.removeEventListener("pointermove", move);
        if (!moved) return;
        // The click that follows would select the picture.
        box.addEventListener("click", (click) => click.preventDefault(), { once: true, capture: true });
        await save(image, at);
        at = null;
        draw();
      };
      box.addEventListener("pointermove", move);
      box.addEventListener("lostpointercapture", end, { once: true });
    });
    let timer = 0;
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
      if (!by) return;
      event.preventDefault();
      at = (at || crops[image.rel].at).map((part, axis) => clamp(part + by[axis]));
      draw();
      clearTimeout(timer);
      timer = setTimeout(async () => { const last = at; await save(image, last); if (at === last) at = null; draw(); }, 400);
    });
    draw();
    return { node: holder, draw };
  }

  function view(image) {
    open = image;
    large = make(image, false);
    figure.replaceChildren(el("img", { src: `${image.thumb}&w=768`, alt: image.rel, draggable: false, width: image.width, height: image.height }), large.node);
    // As large as it fits: a crop is judged by eye.
    figure.style.setProperty("--shape", image.width / image.height);
    title.textContent = image.rel;
    tellFacts();
    if (!viewer.open) viewer.showModal();
  }

  function tellFacts() {
    if (!open) return;
    const crop = crops[open.rel];
    const cut = crop ? 1 - (1 - crop.room[0]) * (1 - crop.room[1]) : 0;
    middle.disabled = !crop?.moved;
    facts.textContent = [`${open.width} × ${open.height} px`, ...(crop ? [`trained at ${crop.size.join(" × ")}`, cut >= SEEN ? `${Math.round(1000 * cut) / 10} % cut off: drag the bright part` : "nothing cut off", ...(crop.enlarged > 1 ? [`enlarged ${crop.enlarged.toFixed(1)} times`] : [])] : [])].join(" · ");
  }

  return {
    viewer,
    load,
    view,
    overlay: (image) => {
      const made = make(image, true);
      drawn.set(image.rel, made);
      return made.node;
    },
  };
}
