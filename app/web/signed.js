// Sliders over numbers on both sides of 0: the filled part begins at 0, which has a mark.

/** Makes a range input draw its fill from 0; gives what draws it anew, to be called when the value was set by a program. */
export function fillFromZero(slider) {
  const share = (value) => (value - slider.min) / (slider.max - slider.min);
  const draw = () => {
    const ends = [share(0), share(slider.value)].sort((a, b) => a - b);
    for (const [name, value] of [["zero", share(0)], ["from", ends[0]], ["to", ends[1]]]) slider.style.setProperty(`--${name}`, value);
  };
  slider.classList.add("signed");
  slider.addEventListener("input", draw);
  draw();
  return draw;
}
