// The loss as a picture: the raw line faint, the smoothed one strong, the held-out one dashed.
import { el } from "/web/core.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM] = [640, 220, 48, 24];
const MOST = 400;

/** An exponential mean that starts at the first value and not at zero. */
export function smooth(points, keep = 0.95) {
  let sum = 0;
  let weight = 0;
  return points.map(([step, value]) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return [step, sum / weight];
  });
}

/** At most about `most` points: means of neighbours. */
export function thin(points, most = MOST) {
  const size = Math.ceil(points.length / most);
  if (size < 2) return points;
  const made = [];
  for (let at = 0; at < points.length; at += size) {
    const part = points.slice(at, at + size);
    made.push([part[part.length - 1][0], part.reduce((all, one) => all + one[1], 0) / part.length]);
  }
  return made;
}

/** A chart that `draw(losses, heldOut, steps)` fills; the lists hold [step, value]. */
export function makeChart() {
  const note = el("p", { class: "subdued" }, "The loss appears after the first steps.");
  const value = el("p", { class: "subdued value", "aria-live": "off" });
  const svg = el("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", class: "chart", "aria-label": "Loss" });
  const node = el("figure", { class: "loss" }, note, svg, value);
  let points = [];
  let place = null;
  let marked = -1;
  let last = ""; // what is said while nothing is marked

  const mark = (index) => {
    if (!points.length) return;
    marked = Math.max(0, Math.min(points.length - 1, index));
    const [step, loss] = points[marked];
    value.textContent = `Step ${step}: loss ${loss.toFixed(4)}`;
    svg.querySelector(".cursor")?.remove();
    svg.append(el("svg:line", { class: "cursor", x1: place.x(step), x2: place.x(step), y1: 6, y2: HEIGHT - BOTTOM }));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    let near = 0;
    points.forEach(([step], index) => { if (place && Math.abs(place.x(step) - at) < Math.abs(place.x(points[near][0]) - at)) near = index; });
    mark(near);
  });
  const unmark = () => {
    marked = -1;
    svg.querySelector(".cursor")?.remove();
    value.textContent = last;
  };
  svg.addEventListener("pointerleave", unmark);
  svg.addEventListener("blur", unmark);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!move) return;
    event.preventDefault();
    mark((marked < 0 ? points.length - 1 : marked) + move);
  });

  function draw(losses, heldOut, steps) {
    const usable = losses.filter(([, loss]) => Number.isFinite(loss));
    note.hidden = usable.length > 0;
    svg.style.display = usable.length ? "" : "none";
    if (!usable.length) return;
    points = thin(usable);
    const strong = thin(smooth(usable));
    const held = heldOut.filter(([, loss]) => Number.isFinite(loss));
    const sorted = usable.map(([, loss]) => loss).sort((a, b) => a - b);
    // One wild step must not flatten the rest.
    const top = Math.max(sorted[Math.floor(sorted.length * 0.98)], ...held.map(([, loss]) => loss), 1e-6) * 1.1;
    const end = Math.max(steps, usable[usable.length - 1][0], 1);
    place = {
      x: (step) => LEFT + (step / end) * (WIDTH - LEFT - 8),
      y: (loss) => HEIGHT - BOTTOM - (Math.min(loss, top) / top) * (HEIGHT - BOTTOM - 8),
    };
    const line = (some, kind) => el("svg:polyline", { class: kind, points: some.map(([step, loss]) => `${place.x(step).toFixed(1)},${place.y(loss).toFixed(1)}`).join(" ") });
    const ticks = [0, 0.5, 1].flatMap((share) => [
      el("svg:line", { class: "grid-line", x1: LEFT, x2: WIDTH - 8, y1: place.y(top * share), y2: place.y(top * share) }),
      el("svg:text", { x: LEFT - 6, y: place.y(top * share) + 4, "text-anchor": "end" }, (top * share).toPrecision(2)),
      el("svg:text", { x: place.x(Math.round(end * share)), y: HEIGHT - 6, "text-anchor": share === 1 ? "end" : "middle" }, String(Math.round(end * share))),
    ]);
    // A line of one point would not be seen.
    const dot = (some, kind) => (some.length === 1 ? [el("svg:circle", { class: kind, cx: place.x(some[0][0]), cy: place.y(some[0][1]), r: 4 })] : []);
    const dots = [...dot(points, "dot"), ...dot(held, "dot held-dot")];
    svg.replaceChildren(...ticks, line(points, "raw"), line(strong, "strong"), line(held, "held"), ...dots);
    const [step] = usable[usable.length - 1];
    const now = strong[strong.length - 1][1];
    const out = held.length ? `, held out ${held[held.length - 1][1].toFixed(3)}` : "";
    svg.setAttribute("aria-label", `Loss ${now.toFixed(3)} at step ${step}${out}`);
    last = `Loss ${now.toFixed(3)} (smoothed) at step ${step}${out}. Dashed: pictures kept aside.`;
    if (marked < 0) value.textContent = last;
    else mark(marked);
  }

  draw([], [], 1);
  return { node, draw };
}
