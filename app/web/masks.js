// Masks: whether pictures are learnt whole, and what is left out of them as a veil over each picture.
import { el, get, newest, patch, plural, toast } from "/web/core.js";

/**
 * The switch for masks of the project at `base`; veils the pictures in `grid` that have one, and again when it is told
 * `impasto:read`. `reload` reads the folder, `save` does what it is given in its turn. Returns its node.
 */
export function makeMasks(base, grid, reload, save) {
  const box = el("input", { type: "checkbox", id: "use-masks", onchange: () => use(box.checked ? "auto" : "off") });
  const said = el("span", { class: "subdued", role: "status" });
  const node = el("section", { class: "masks", "aria-label": "Masks" }, el("div", { class: "row" }, box, el("label", { for: "use-masks" }, "Learn only what masks show"), said),
    el("span", { class: "help" }, "A mask is cat-masklabel.png, cat.mask.png or masks/cat.png for cat.jpg, white where it is learnt; else a picture's own transparency."));
  const listed = newest();
  let masks = {};

  async function look() {
    const found = await listed(get(`${base}/masks`)).catch(() => null); // the screen itself tells what is wrong
    if (!found) return;
    masks = found.masks;
    box.checked = found.setting !== "off";
    const count = Object.keys(masks).length;
    said.textContent = found.setting === "off" ? "" : count ? `${plural(count, "picture")} with a mask; all others are learnt whole` : "No picture has a mask or is transparent";
    veil();
  }

  async function use(setting) {
    try {
      await save(async () => {
        const { recipe } = await get(base);
        await patch(base, { recipe: { ...recipe, dataset: { ...(recipe.dataset || {}), masks: setting } } });
      });
      toast(setting === "off" ? "Pictures are learnt whole." : "Only what masks show is learnt.");
    } catch (error) {
      toast(error.message);
    }
    await reload(); // what is wrong with a mask is told with the folder's health
  }

  function veil() {
    for (const img of grid.querySelectorAll(".picture .thumb img:not(.veil)")) {
      const old = img.parentElement.querySelector(".veil");
      const source = masks[img.alt];
      if (old && old.getAttribute("src") === source) continue;
      old?.remove();
      if (source) img.after(el("img", { class: "veil", src: source, alt: `Mask of ${img.alt}`, loading: "lazy" }));
    }
  }

  grid.addEventListener("impasto:read", look);
  // The cards are drawn in slices.
  let resting = 0;
  new MutationObserver(() => {
    clearTimeout(resting);
    resting = setTimeout(look, 150);
  }).observe(grid, { childList: true });
  look();
  return node;
}
