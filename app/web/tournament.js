// A blind tournament: two pictures without labels, by mouse or keys, and the ranking once it is asked for.
import { ask, confirmed, el, get, newest, plural, post, tell } from "/web/core.js";

const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "same" };

export function makeTournaments() {
  const trouble = el("div");
  const list = el("div", { class: "row" });
  const question = el("p", { role: "status" });
  const left = el("img", { alt: "The left picture" });
  const right = el("img", { alt: "The right picture" });
  const side = (better, image) => el("button", { type: "button", "aria-label": `The ${better} one is better`, onclick: () => judge(better) }, image);
  const duel = el("div", { class: "duel" }, side("left", left), side("right", right));
  const answers = el("div", { class: "row" },
    el("button", { type: "button", onclick: () => judge("left") }, "← Left is better"),
    el("button", { type: "button", onclick: () => judge("same") }, "↓ No difference"),
    el("button", { type: "button", onclick: () => judge("right") }, "Right is better →"),
    el("button", { type: "button", class: "quiet", onclick: () => change((id) => post(`/tournaments/${id}/undo`)) }, "Take back"));
  const ranking = el("div");
  const reveal = el("button", { type: "button", class: "small", onclick: () => (open = !open, showRanking()) }, "Show ranking");
  const field = el("section", { class: "card view", "aria-label": "Pair", hidden: true }, question, duel, answers, el("div", { class: "row" }, reveal), ranking);
  const none = el("p", { class: "subdued" }, "Draw a grid first: its rows or columns then compete, two pictures at a time, without a label.");
  const node = el("div", { class: "view" }, el("div", { class: "card" }, none, list), trouble, field);

  let current = null; // {id, pair}
  let busy = false;
  let open = false;
  const [listed, ranked, paired] = [newest(), newest(), newest()];

  /** Gives the tournaments; null where a newer list is on its way. */
  async function showList() {
    const found = await listed(get("/tournaments"));
    if (!found) return null;
    const { tournaments } = found;
    none.hidden = tournaments.length > 0;
    list.replaceChildren(...tournaments.map((one) => el("span", { class: "row" },
      el("button", { type: "button", class: "small", "aria-pressed": String(one.id === current?.id), onclick: () => choose(one.id) },
        `${plural(one.contestants, one.kind)}, ${new Date(one.created * 1000).toLocaleString()}, ${one.judged} judged`),
      el("button", { type: "button", class: "quiet small", "aria-label": "Delete this tournament", onclick: () => remove(one.id) }, "×"))));
    return tournaments;
  }

  const attempt = async (work) => {
    tell(trouble, null);
    try {
      return await work();
    } catch (error) {
      tell(trouble, error);
      return null;
    }
  };

  async function remove(id) {
    if (!(await confirmed("Delete this tournament and what was judged?", "Delete"))) return;
    await attempt(async () => {
      await ask("DELETE", `/tournaments/${id}`);
      if (current?.id === id) field.hidden = true, (current = null);
      await showList();
    });
  }

  const choose = (id) => attempt(async () => {
    open = false;
    const found = await paired(get(`/tournaments/${id}`));
    if (!found) return; // another one was chosen meanwhile
    show(id, found);
    await showList();
  });

  function show(id, found) {
    current = { id, pair: found.pair };
    field.hidden = false;
    [left.src, right.src] = [found.left, found.right];
    question.textContent = `Which is better? Pair ${found.pair + 1}: ${found.about}`;
    showRanking();
  }

  async function change(work) {
    if (busy || !current) return;
    busy = true;
    const { id } = current;
    const found = await attempt(() => work(id));
    busy = false;
    if (found && id === current?.id) show(id, found); // else another one was chosen meanwhile
  }

  const judge = (better) => change((id) => post(`/tournaments/${id}/judgements`, { pair: current.pair, better }));

  async function showRanking() {
    reveal.textContent = open ? "Hide ranking" : "Show ranking";
    reveal.setAttribute("aria-expanded", String(open));
    if (!open) return ranking.replaceChildren();
    const found = await attempt(() => ranked(get(`/tournaments/${current.id}/ranking`)));
    if (!found || !open) return;
    const most = Math.max(1, ...found.places.map((one) => Math.abs(one.worth) + one.margin));
    const x = (value) => 100 + (value / most) * 96;
    const bar = (one) => el("svg:svg", { viewBox: "0 0 200 18", role: "img", "aria-label": `${one.worth.toFixed(2)} ± ${one.margin.toFixed(2)}` },
      el("svg:line", { class: "zero", x1: 100, x2: 100, y1: 0, y2: 18 }), el("svg:line", { x1: x(one.worth - one.margin), x2: x(one.worth + one.margin), y1: 9, y2: 9 }), el("svg:circle", { cx: x(one.worth), cy: 9, r: 4 }));
    const rows = found.places.map((one, at) => el("tr", {}, el("td", {}, String(at + 1)), el("th", { scope: "row" }, one.name), el("td", {}, bar(one)), el("td", {}, `${one.worth.toFixed(2)} ± ${one.margin.toFixed(2)}`), el("td", {}, plural(one.compared, "pair"))));
    ranking.replaceChildren(el("p", {}, found.words), el("table", { class: "places" }, el("tbody", {}, rows)),
      el("p", { class: "subdued" }, "Worth in natural logarithms against the mean, with its 95 % interval: one more is preferred e times as often."));
  }

  function onKey(event) {
    if (field.hidden || !node.offsetParent || !KEYS[event.key] || event.target.closest("input, textarea, select, [role=tab]")) return;
    event.preventDefault();
    judge(KEYS[event.key]);
  }
  document.addEventListener("keydown", onKey);

  /** Begins one from a grid; whether that went well. */
  async function start(grid, over) {
    const { id } = await post("/tournaments", { grid, over });
    await choose(id);
    return true;
  }

  const shown = () => attempt(async () => {
    const found = await showList();
    if (!current && found?.length) await choose(found[0].id);
  });
  return { node, start, shown, leave: () => document.removeEventListener("keydown", onKey) };
}
