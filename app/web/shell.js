// The head of the page: the name, the steps of a project, light or dark.
import { address, change, el, get, newest, place } from "/web/core.js";

const STEPS = [
  ["images", "Images"],
  ["recipe", "Recipe"],
  ["train", "Train"],
  ["studio", "Studio"],
  ["blend", "Blend"],
  ["compare", "Compare"],
];

function follow(dark) {
  document.body.classList.toggle("dark", dark);
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
}

function themeButton() {
  const seen = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("impasto-theme");
  } catch {
    // A browser that keeps nothing follows the system.
  }
  const isDark = () => (chosen ? chosen === "dark" : seen.matches);
  const button = el("button", { type: "button", class: "quiet small", id: "theme" });
  const draw = () => {
    follow(isDark());
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to light" : "Switch to dark");
  };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("impasto-theme", chosen);
    } catch {
      // For this page only, then.
    }
    draw();
  });
  seen.addEventListener("change", draw);
  draw();
  return button;
}

/** Fills the header, and from then on shows the screen that the address names. */
export function mount(element) {
  const project = el("span", { class: "project-name" });
  const steps = el("nav", { class: "steps", "aria-label": "Steps" });
  element.replaceChildren(
    el(
      "header",
      { class: "topbar" },
      el("a", { class: "brand", href: "#/", "aria-label": "Impasto, all projects" }, el("span", { class: "mark", "aria-hidden": "true" }), "Impasto"),
      project,
      steps,
      themeButton(),
    ),
  );
  const latest = newest();
  let known = "";
  const draw = async () => {
    const now = place();
    steps.hidden = !now.project;
    steps.replaceChildren(
      ...(now.project ? STEPS : []).map(([screen, label]) =>
        el("a", { href: address(screen, now.project), "aria-current": screen === now.screen ? "page" : null }, label),
      ),
    );
    if (!now.project) {
      project.textContent = known = "";
      document.title = "Impasto";
      return;
    }
    if (known === now.project) return;
    known = now.project;
    project.textContent = "";
    try {
      const found = await latest(get(`/projects/${encodeURIComponent(now.project)}`));
      if (known === found?.id) {
        project.textContent = found.name;
        document.title = `${found.name} – Impasto`;
      }
    } catch {
      known = ""; // the screen itself says what is wrong
    }
  };
  document.addEventListener("impasto:place", draw);
  document.addEventListener("impasto:named", () => ((known = ""), draw()));
  window.addEventListener("hashchange", change);
  change();
  draw();
}
