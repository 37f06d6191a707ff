// Samples as they grow: a row for each prompt, a column for each step, and one large beside the base's.
import { el } from "/web/core.js";

/** A strip that `draw(runId, samples)` fills; a sample is an event with step, path, prompt and seed. */
export function makeSamples() {
  const none = el("p", { class: "subdued" }, "The first samples appear once the base model is loaded.");
  const slider = el("input", { type: "range", min: 0, value: 0, step: 1, "aria-label": "Sample in time", oninput: () => { follow = false; big(); } });
  const words = el("p", { class: "subdued" });
  const large = el("div", { class: "large" });
  const strip = el("div", { class: "strip" });
  const node = el("section", { class: "card samples", "aria-label": "Samples" }, el("h2", {}, "Samples"), none, large, el("label", { class: "field" }, words, slider), strip);
  let rows = new Map();
  let steps = [];
  let run = "";
  let follow = true;
  let count = -1;

  const address = (sample) => `/api/runs/${encodeURIComponent(run)}/samples/${encodeURIComponent(sample.path.split("/").pop())}`;
  const picture = (sample, name) => el("img", { src: address(sample), alt: `${sample.prompt}, ${name}`, decoding: "async" });
  const named = (step) => (step === 0 ? "base" : `step ${step}`);

  function big() {
    const step = steps[Number(slider.value)];
    words.textContent = step === undefined ? "" : `${step === 0 ? "The base model" : `Step ${step}`}, beside the base. Drag to go through time.`;
    slider.setAttribute("aria-valuetext", step === undefined ? "" : named(step));
    large.replaceChildren(...[...rows.values()].map((samples) => {
      const [now, base] = [samples.get(step), samples.get(0)];
      const figure = (sample, name) => el("figure", {}, picture(sample, name), el("figcaption", {}, name));
      return el("div", { class: "pair" }, base && step !== 0 && figure(base, "base"), now && figure(now, named(step)));
    }));
  }

  function draw(id, samples) {
    if (id === run && samples.length === count) return;
    if (id !== run) follow = true;
    run = id;
    count = samples.length;
    rows = new Map();
    for (const sample of samples) {
      const key = `${sample.prompt}\n${sample.seed}`;
      rows.set(key, (rows.get(key) || new Map()).set(sample.step, sample));
    }
    steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => a - b);
    none.hidden = steps.length > 0;
    slider.parentElement.hidden = steps.length < 2;
    slider.max = Math.max(0, steps.length - 1);
    if (follow) slider.value = slider.max;
    strip.replaceChildren(...[...rows].map(([key, some]) => el("div", { class: "strip-row" }, el("p", { class: "prompt" }, key.split("\n")[0]),
      el("div", { class: "frames" }, steps.filter((step) => some.has(step)).map((step) => el("button", { type: "button", class: "frame", "aria-label": `${key.split("\n")[0]}, ${named(step)}`, onclick: () => { follow = false; slider.value = steps.indexOf(step); big(); } },
        picture(some.get(step), named(step)), el("span", {}, named(step))))))));
    big();
    for (const frames of strip.querySelectorAll(".frames")) frames.scrollLeft = frames.scrollWidth;
  }

  draw("", []);
  return { node, draw };
}
