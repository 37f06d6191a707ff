// One LoRA of a blend: its strengths on the denoiser, on the text encoders and by block, and where its weight lies.
import { el, plural, tell } from "/web/core.js";
import { fillFromZero } from "/web/signed.js";

const REACH = 2; // the sliders' ends; numbers up to 4 can be typed

const NAMES = { text: "text encoder", mid: "middle", other: "the rest" };
const nameOf = (block) => NAMES[block] || block.replace("_", " ");

/** A slider with a box for the number; `set` moves both. */
function makeStrength(label, value, changed, least = -REACH) {
  const slider = el("input", { type: "range", min: least, max: REACH, step: 0.01, value, "aria-label": `${label}, slider` });
  const box = el("input", { type: "number", min: -4, max: 4, step: 0.05, value, "aria-label": label, class: "number" });
  const fill = fillFromZero(slider);
  const take = (from, to) => () => {
    const number = Number(from.value);
    if (from.value === "" || !(Math.abs(number) <= 4)) return;
    to.value = number;
    fill();
    changed(number);
  };
  slider.addEventListener("input", take(slider, box));
  box.addEventListener("input", take(box, slider));
  return { node: el("div", { class: "strength" }, slider, box), set: (number) => ((slider.value = number), (box.value = number), fill()) };
}

/** A row; `use()` gives what the API takes, `spelled()` the same for people. */
export function makeRow({ use, card, word, blocks, changed, removed, weigh }) {
  const title = card?.title || use.file;
  const now = { unet: use.unet, text: use.text, blocks: { ...(use.blocks || {}) } };
  let isLinked = now.text === now.unet;
  const unet = makeStrength(`${title}, strength`, now.unet, (value) => {
    now.unet = value;
    if (isLinked) text.set((now.text = value));
    changed();
  });
  const text = makeStrength(`${title}, text encoder`, now.text, (value) => {
    now.text = value;
    isLinked = linked.checked = false;
    changed();
  });
  const linked = el("input", { type: "checkbox", checked: isLinked, onchange: () => {
    isLinked = linked.checked;
    if (!isLinked) return;
    text.set((now.text = now.unet));
    changed();
  } });
  const sliders = new Map();
  const inside = el("div", { class: "blocks" });
  const trouble = el("div");
  const details = el("details", { class: "inner", ontoggle: () => details.open && !inside.childElementCount && fill() },
    el("summary", {}, "Text encoder and blocks"),
    el("div", { class: "strength-line" }, el("span", {}, "Text encoder"), text.node, el("label", { class: "check" }, linked, " as the strength")),
    trouble, inside);

  /** Bars of where the weight lies, and a multiplier for each block that the LoRA has. */
  async function fill() {
    inside.replaceChildren(el("p", { class: "subdued" }, "Looking where its weight lies…"));
    let found;
    try {
      found = await weigh();
      tell(trouble, null);
    } catch (error) {
      inside.replaceChildren();
      return tell(trouble, error);
    }
    const most = Math.max(...found.map((one) => one.norm / one.base)) || 1;
    inside.replaceChildren(
      el("p", { class: "subdued" }, "The bars: how much of each block's weights it changes at strength 1. The sliders multiply the strength there."),
      ...found.map(({ block, norm, base, layers }) => {
        const share = norm / base;
        const one = makeStrength(`${title}, ${nameOf(block)}`, now.blocks[block] ?? 1, (value) => {
          now.blocks[block] = value;
          if (value === 1) delete now.blocks[block];
          changed();
        }, 0);
        sliders.set(block, one);
        return el("div", { class: "strength-line" }, el("span", {}, nameOf(block)),
          el("div", { class: "bar", role: "img", "aria-label": `${nameOf(block)}: changes ${(100 * share).toPrecision(2)} % in ${layers} layers`, title: `${(100 * share).toPrecision(2)} % of the base's norm, ${layers} layers` },
            el("div", { style: { width: `${(100 * share) / most}%` } })),
          one.node);
      }),
      el("button", { type: "button", class: "quiet small", onclick: () => { now.blocks = {}; sliders.forEach((one) => one.set(1)); changed(); } }, "All blocks at 1"),
    );
  }

  const node = el("div", { class: "lora" },
    el("div", { class: "row" }, el("b", {}, title), word && el("span", { class: "badge" }, `brought in by the word ${word}`),
      el("button", { type: "button", class: "quiet small away", "aria-label": `Take ${title} out`, onclick: removed }, "×")),
    unet.node, details);
  const touched = () => blocks.filter((block) => (now.blocks[block] ?? 1) !== 1);
  return {
    node,
    word,
    file: use.file,
    use: () => ({ file: use.file, unet: now.unet, text: now.text, blocks: Object.fromEntries(touched().map((block) => [block, now.blocks[block]])) }),
    spelled: () => `${title} ${now.unet.toFixed(2)}${now.text === now.unet ? "" : ` (text ${now.text.toFixed(2)})`}${touched().length ? `, ${plural(touched().length, "block")} changed` : ""}`,
  };
}
