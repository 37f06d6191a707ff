// One setting as a labelled control, with its help and the place where a problem is told.
import { el, rate } from "/web/core.js";

/** What a text field says: a number where it is one, else the text as it is, which the check then refuses in words. */
export function numberOf(text, optional) {
  const clean = text.trim();
  if (!clean) return optional ? null : "";
  const number = Number(clean.replace(/^(-?\d*),(\d+)/, "$1.$2")); // many write 0,5
  return Number.isFinite(number) ? number : clean;
}

/** The limits of a number in words; empty without any. */
function limits({ least, most, above, below }) {
  const from = least !== null ? `at least ${least}` : above !== null ? `more than ${above}` : "";
  const to = most !== null ? `at most ${most}` : below !== null ? `less than ${below}` : "";
  const both = [from, to].filter(Boolean).join(", ");
  return both && `${both[0].toUpperCase()}${both.slice(1)}.`;
}

/** A control for `setting`. `changed(value)` is called when the person is done; `show(value)` and `problem(text)` draw. */
export function makeField(setting, changed, label = setting.label) {
  const id = `field-${setting.name.replace(/\W/g, "-")}`;
  const fault = el("p", { class: "fault", id: `${id}-fault`, role: "alert" });
  const help = el("p", { class: "help", id: `${id}-help` }, [setting.help, limits(setting)].filter(Boolean).join(" "));
  const { control, draw } = makeControl(setting, { id, "aria-describedby": `${id}-fault ${id}-help` }, changed);
  const node = el("div", { class: "field setting", data: { name: setting.name } }, el("label", { for: id }, label), control, fault, help);
  const problem = (text) => {
    fault.textContent = text || "";
    if (text) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  // What a person is typing is never written over.
  const show = (value) => document.activeElement !== control && draw(value);
  return { node, control, show, draw, problem };
}

/** {control, draw(value)} for a kind of setting. */
function makeControl(setting, same, changed) {
  const options = () => setting.choices.map((one) => el("option", { value: one }, one));
  let control;
  switch (setting.kind) {
    case "switch":
      control = el("input", { ...same, type: "checkbox", onchange: () => changed(control.checked) });
      return { control, draw: (value) => (control.checked = Boolean(value)) };
    case "choice":
      control = el("select", { ...same, onchange: () => changed(control.value) }, options());
      return { control, draw: (value) => (control.value = value) };
    case "choices": {
      const chosen = () => [...control.selectedOptions].map((one) => one.value);
      control = el("select", { ...same, multiple: true, size: setting.choices.length, onchange: () => changed(chosen()) }, options());
      return { control, draw: (value) => { for (const one of control.options) one.selected = value.includes(one.value); } };
    }
    case "list": {
      const lines = () => control.value.split("\n").map((line) => line.trim()).filter(Boolean);
      control = el("textarea", { ...same, rows: 4, placeholder: "one per line", onchange: () => changed(lines()) });
      return { control, draw: (value) => (control.value = value.join("\n")) };
    }
    case "pairs": {
      // "to_q = 32": what is no number goes on as it is, and the check refuses it in words.
      const pair = (line) => {
        const [name, ...rest] = line.split("=");
        return [name.trim().replace(/^"(.*)"$/, "$1"), numberOf(rest.join("="), false)];
      };
      const pairs = () => Object.fromEntries(control.value.split("\n").filter((line) => line.trim()).map(pair));
      control = el("textarea", { ...same, rows: 3, placeholder: "one per line: to_q = 32", onchange: () => changed(pairs()) });
      return { control, draw: (value) => (control.value = Object.entries(value ?? {}).map((pair) => pair.join(" = ")).join("\n")) };
    }
    default: {
      const isText = setting.kind === "text";
      const typed = () => (isText ? control.value : numberOf(control.value, setting.optional));
      control = el("input", { ...same, type: "text", inputMode: isText ? "text" : "decimal", placeholder: setting.optional ? "automatic" : "", onchange: () => changed(typed()) });
      const text = (value) => (setting.name.endsWith("learning_rate") ? rate(value) : String(value));
      return { control, draw: (value) => (control.value = value === null || value === undefined ? "" : text(value)) };
    }
  }
}

/**
 * A slider with a box for the exact value; `moved(value)` is called while it is dragged. `logarithmic` runs over powers of
 * ten. A value beyond the slider's ends is shown in the box.
 */
export function makeSlider(setting, changed, moved, { label, least, most, step = 1, logarithmic = false, help }) {
  const field = makeField(help ? { ...setting, help } : setting, changed, label);
  const scale = logarithmic ? Math.log10 : Number;
  const slider = el("input", { type: "range", min: scale(least), max: scale(most), step: logarithmic ? 0.01 : step, "aria-label": `${label}, slider` });
  const value = () => (logarithmic ? Number((10 ** Number(slider.value)).toPrecision(2)) : Number(slider.value));
  const text = (number) => (number === null || number === undefined ? "automatic" : logarithmic ? rate(number) : String(number));
  slider.addEventListener("input", () => {
    field.draw(value());
    slider.setAttribute("aria-valuetext", text(value()));
    moved(value());
  });
  slider.addEventListener("change", () => changed(value()));
  const room = el("div", { class: "slide" }, slider);
  field.control.before(room);
  room.append(field.control);
  const show = (number, whenUnset) => {
    const place = number ?? whenUnset;
    field.show(number);
    const known = place !== null && place !== undefined && document.activeElement !== slider;
    if (known) slider.value = logarithmic && !(place > 0) ? scale(least) : scale(place);  // 0 has no logarithm: it is off
    slider.setAttribute("aria-valuetext", text(number));
  };
  return { ...field, show };
}
