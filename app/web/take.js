// Take it home: the file, what is in it, and where it goes.
import { address, bytes, copyButton, el, get, newest, tell } from "/web/core.js";

/** A card that `draw(run, project)` fills once the run has a file. */
export function makeTake() {
  const trouble = el("div");
  const body = el("div");
  const node = el("section", { class: "card take", hidden: true, "aria-label": "Take it home" }, el("h2", {}, "Take it home"), trouble, body);
  const latest = newest();
  let drawn = "";

  function draw(run, project) {
    node.hidden = !run.files.length && !run.embedding;
    const key = JSON.stringify([run.id, run.files, run.embedding]);
    if (key === drawn || node.hidden) return;
    drawn = key;
    if (!run.files.length) return body.replaceChildren(embedding(run.embedding));
    let chosen = run.files[0];
    const link = el("a", { class: "button primary" });
    const facts = el("div");
    const uses = el("div");
    const label = (file) => (file.step === null ? "finished" : `step ${file.step}`);
    const show = () => {
      link.href = chosen.url;
      link.download = chosen.name;
      link.textContent = `Download (${bytes(chosen.size)})`;
      facts.replaceChildren(el("p", { class: "file-name" }, chosen.name));
      describe(run, chosen, facts, uses, trouble, latest);
    };
    const select = el("select", { "aria-label": "Which checkpoint", onchange: () => { chosen = run.files[select.selectedIndex]; show(); } }, run.files.map((file) => el("option", {}, label(file))));
    body.replaceChildren(el("div", {},
      el("div", { class: "row" }, link, run.files.length > 1 && select, el("a", { class: "button", href: address("studio", project, run.id) }, "Try it in the Studio")),
      facts,
      uses,
      run.embedding && embedding(run.embedding),
    ));
    show();
  }
  return { node, draw };
}

/** The trigger word's own vectors: without this file a LoRA that was trained with them meets another word. */
function embedding(file) {
  const word = file.name.replace(/\.safetensors$/, "");
  return el("div", {},
    el("div", { class: "row" }, el("a", { class: "button", href: file.url, download: file.name }, `Download the embedding (${bytes(file.size)})`)),
    el("p", { class: "file-name" }, file.name),
    el("p", {}, "What the trigger word learnt. A1111 and Forge: into embeddings, and write ", el("b", {}, word), " in the prompt. ComfyUI: into models/embeddings, and write ", el("b", {}, `embedding:${word}`), "."));
}

/** What is inside the file, its trigger word among it: that of the training, whatever the project's is by now. */
async function describe(run, file, room, uses, trouble, latest) {
  try {
    const found = await latest(get(`/runs/${encodeURIComponent(run.id)}/metadata${file.step === null ? "" : `?step=${file.step}`}`));
    if (!found) return; // another checkpoint was chosen meanwhile
    const fields = Object.entries(found.metadata);
    const trigger = found.metadata["modelspec.trigger_phrase"] || "";
    uses.replaceChildren(...howTo(found.name, trigger, "lora_adapter_metadata" in found.metadata));
    room.replaceChildren(
      ...(trigger ? [el("p", { class: "row" }, el("span", {}, "Trigger word: ", el("b", {}, trigger)), copyButton("Copy", () => trigger))] : []),
      el("p", { class: "file-name" }, found.name),
      el("p", { class: "subdued" }, `${bytes(found.size)} · hash ${found.autov3.slice(0, 12)} (AutoV3) · SHA-256 ${found.sha256.slice(0, 10)}`),
      el("details", {}, el("summary", {}, `${fields.length} facts are written inside the file`),
        el("table", {}, el("tbody", {}, fields.map(([name, value]) => el("tr", {}, el("td", { class: "tick" }, "✓"), el("th", { scope: "row" }, name), el("td", {}, value)))))),
    );
    tell(trouble, null);
  } catch (error) {
    tell(trouble, error);
  }
}

function howTo(name, trigger, inPeftForm) {
  const stem = name.replace(/\.safetensors$/, "");
  const prompt = `${trigger ? `${trigger}, ` : ""}a castle <lora:${stem}:0.8>`;
  const code = `pipe.load_lora_weights(".", weight_name="${name}")`;
  const part = (title, ...lines) => el("details", {}, el("summary", {}, title), lines);
  const copied = (text) => el("p", { class: "row" }, el("code", {}, text), copyButton("Copy", () => text));
  const inDiffusers = part("diffusers", copied(code), el("p", {}, "The strength is set by pipe.set_adapters."));
  if (inPeftForm) return [el("p", {}, "This file is in peft form, which diffusers alone reads whole. For other programs: ", el("code", {}, `impasto convert ${name} --to kohya --output NEW.safetensors`)), inDiffusers];
  return [
    part("A1111 and Forge", el("p", {}, "Put the file into models/Lora, press Refresh on the Lora tab, and write in the prompt:"), copied(prompt)),
    part("ComfyUI", el("p", {}, "Put the file into models/loras, press R, and place a Load LoRA node between the checkpoint and the rest. strength_model and strength_clip are the strength.")),
    part("InvokeAI", el("p", {}, "Models, Add Model, give the file's path, Install. Then add it under LoRAs beside the prompt and set its weight.")),
    inDiffusers,
  ];
}
