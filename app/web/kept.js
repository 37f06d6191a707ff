// What stands on a screen and is saved nowhere else: kept in this tab, also while the page is loaded again.

/** What `keep` was given for this screen and project; `otherwise` without it, and in a browser that keeps nothing. */
export function kept(screen, project, otherwise) {
  try {
    return { ...otherwise, ...JSON.parse(sessionStorage.getItem(`impasto:${screen}:${project}`)) };
  } catch {
    return otherwise;
  }
}

export function keep(screen, project, value) {
  try {
    sessionStorage.setItem(`impasto:${screen}:${project}`, JSON.stringify(value));
  } catch {
    // Full or forbidden: then it is gone with the page.
  }
}
