// A picture that was drawn, kept as the picture of a LoRA's card.
import { el, put, tell, toast } from "/web/core.js";

/** Shows a card with a picture by its name; "" for its own again. */
export const choosePicture = (file, picture) => put("/library/picture", { file, picture });

/** A button for the picture on the screen; `card(key)` looks a LoRA up, `after()` is called when a card has changed. */
export function makeCardPicture({ card, after, trouble }) {
  let shown = { picture: "", files: [] };
  const node = el("button", { type: "button", class: "small", hidden: true, onclick: ask }, "Use as card picture");

  async function keep(key) {
    const before = card(key)?.chosen || "";
    const title = card(key)?.title || key;
    try {
      await choosePicture(key, shown.picture);
      tell(trouble, null);
      toast(`The picture of ${title} in the library now.`, () => choosePicture(key, before).then(after, (error) => tell(trouble, error)));
      after();
    } catch (error) {
      tell(trouble, error);
    }
  }

  /** Of several LoRAs one must be named. */
  function ask() {
    const { files } = shown;
    if (files.length === 1) return keep(files[0]);
    const dialog = el("dialog", { class: "question", "aria-label": "Card picture of which LoRA?" });
    const close = () => (dialog.close(), dialog.remove());
    dialog.append(el("p", {}, "It becomes the picture of which LoRA’s card?"),
      el("div", { class: "row" }, files.map((key) => el("button", { type: "button", onclick: () => (close(), keep(key)) }, card(key)?.title || key)),
        el("button", { type: "button", class: "quiet", onclick: close }, "Cancel")));
    dialog.addEventListener("cancel", close);
    document.body.append(dialog);
    dialog.showModal();
  }

  /** What is seen now: the picture's address, and the LoRAs that it was drawn with. */
  function drawn(url, files) {
    shown = { picture: url.split("/").pop(), files };
    node.hidden = !files.length;
  }
  return { node, drawn };
}
