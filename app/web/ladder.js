// Rendered strengths, and what to show between two of them. Knows nothing of the page or the network.

export class Ladder {
  constructor() {
    this.rungs = []; // [strength, address], in order
  }

  add(strength, url) {
    if (this.rungs.some(([known]) => known === strength)) return;
    this.rungs = [...this.rungs, [strength, url]].sort((a, b) => a[0] - b[0]);
  }

  /** {below, above, share, exact}: the two neighbours of a strength and how far it is to the upper one; null when empty. */
  at(strength) {
    if (!this.rungs.length) return null;
    const same = this.rungs.find(([known]) => Math.abs(known - strength) < 1e-9);
    if (same) return { below: same, above: same, share: 0, exact: true };
    const below = [...this.rungs].reverse().find(([known]) => known < strength);
    const above = this.rungs.find(([known]) => known > strength);
    if (!below || !above) return { below: below || above, above: below || above, share: 0, exact: false };
    return { below, above, share: (strength - below[0]) / (above[0] - below[0]), exact: false };
  }
}
