// One setting as a labelled control, with its help and the place where a problem is told.
import { el, rate } from "/web/core.js";

/** What a text field says: a number where it is one, else the text as it is, which the check then refuses in words. */
export function numberOf(text, optional) {
  const clean = text.trim();
  if (!clean) return optional ? null : "";
  return Number.isFinite(Number(clean)) ? Number(clean) : clean;
}

/** A control for `setting`. `changed(value)` is called when the person is done; `show(value)` and `problem(text)` draw. */
export function makeField(setting, changed, label = setting.label) {
  const id = `field-${setting.name.replace(/\W/g, "-")}`;
  const fault = el("p", { class: "fault", id: `${id}-fault`, role: "alert" });
  const help = el("p", { class: "help", id: `${id}-help` }, setting.help);
  const same = { id, "aria-describedby": `${id}-fault ${id}-help` };
  let control;
  let show;
  if (setting.kind === "switch") {
    control = el("input", { ...same, type: "checkbox", onchange: () => changed(control.checked) });
    show = (value) => (control.checked = Boolean(value));
  } else if (setting.kind === "choice") {
    control = el("select", { ...same, onchange: () => changed(control.value) }, setting.choices.map((one) => el("option", { value: one }, one)));
    show = (value) => (control.value = value);
  } else if (setting.kind === "choices") {
    control = el("select", { ...same, multiple: true, size: setting.choices.length, onchange: () => changed([...control.selectedOptions].map((one) => one.value)) }, setting.choices.map((one) => el("option", { value: one }, one)));
    show = (value) => { for (const one of control.options) one.selected = value.includes(one.value); };
  } else if (setting.kind === "list") {
    control = el("textarea", { ...same, rows: 4, placeholder: "one per line", onchange: () => changed(control.value.split("\n").map((line) => line.trim()).filter(Boolean)) });
    show = (value) => (control.value = value.join("\n"));
  } else {
    const isText = setting.kind === "text";
    control = el("input", { ...same, type: "text", inputMode: isText ? "text" : "decimal", placeholder: setting.optional ? "automatic" : "", onchange: () => changed(isText ? control.value : numberOf(control.value, setting.optional)) });
    show = (value) => (control.value = value === null || value === undefined ? "" : setting.name.endsWith("learning_rate") ? rate(value) : String(value));
  }
  const node = el("div", { class: "field setting", data: { name: setting.name } }, el("label", { for: id }, label), control, fault, help);
  return { node, control, show, problem: makeProblem(control, fault) };
}

/** A slider with a box for the exact value. `logarithmic` runs over powers of ten. */
export function makeSlider(setting, changed, { label, least, most, step = 1, logarithmic = false, help }) {
  const field = makeField(setting, changed, label);
  const slider = el("input", { type: "range", min: logarithmic ? Math.log10(least) : least, max: logarithmic ? Math.log10(most) : most, step: logarithmic ? 0.01 : step, "aria-label": `${label}, slider` });
  const value = () => (logarithmic ? Number((10 ** Number(slider.value)).toPrecision(2)) : Number(slider.value));
  const box = field.show;
  const text = (number) => (logarithmic ? rate(number) : String(number));
  slider.addEventListener("input", () => {
    field.control.value = text(value());
    slider.setAttribute("aria-valuetext", text(value()));
  });
  slider.addEventListener("change", () => changed(value()));
  field.control.before(el("div", { class: "slide" }, slider));
  field.node.querySelector(".slide").append(field.control);
  field.node.querySelector(".help").textContent = help || setting.help;
  field.show = (number) => {
    box(number);
    if (number) slider.value = logarithmic ? Math.log10(number) : number;
    slider.setAttribute("aria-valuetext", text(number));
  };
  return field;
}

function makeProblem(control, fault) {
  return (text) => {
    fault.textContent = text || "";
    if (text) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
}
