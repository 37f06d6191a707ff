"""Which strength a LoRA should have: a measured curve of likeness to its folder against drift without its trigger. No torch.

The same noise is drawn at several strengths: for some of the folder's captions; where captions end with the trigger, as a
style's do, for as many new subjects with it, for a LoRA knows the folder's own by heart at strengths that say little of any
other; and for captions without the trigger. **Similarity** is 1 - d(s) / d(0): d is the distance of the drawn pictures, as a
set, from the folder's (trainers.measures.likeness), so 0 is the base and 1 the folder itself. **Drift** is the root mean
square difference of a picture without the trigger from the base's own on the same noise, against that of two of the base's
pictures of different prompts: 0 is the base, 1 another picture altogether.

Both are fitted by smooth curves, and the suggested strength is where fitted similarity - PRICE x fitted drift is highest: a
hundredth more of similarity is worth taking only while it costs less than a tenth of drift.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainers.cells import Cell, LoraUse
from trainers.dataset.captions import ARTICLES, shared_words, without
from trainers.dataset.folder import Example
from trainers.errors import DatasetError
from trainers.measures.likeness import describe_all, pixels_apart, set_distance, spread_of
from trainers.measures.pixels import read_pixels

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
PRICE = 0.1
"""Similarity given up for a drift of 1."""
STEP = 0.05
"""To what the suggested strength is rounded."""
_PROMPTS, _PLAIN, _WANTED = 12, 4, 24
_DRAWS = 200
# Where captions share nothing, or nothing is left of them.
_COMMON = ("a fox", "a red apple", "a house", "a car")
# What is drawn in a style beside the folder's own subjects.
_NEW = (
    "a fox", "a red apple", "a tree", "a bird", "a cup", "a chair", "a mushroom", "a bicycle", "a star", "a hat", "a clock",
    "a boat", "a lamp", "a shoe", "a bear", "a drum", "a spoon", "a tent",
)  # fmt: skip

Numbers = NDArray[np.float64]
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Plan:
    """What is drawn: every prompt at every strength on one noise. `wanted` are pictures of the folder."""

    strengths: tuple[float, ...]
    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    wanted: tuple[Path, ...]
    seed: int

    def cells(self, lora: Path) -> list[Cell]:
        """The pictures to draw, strength by strength, of each the prompts and then the plain ones."""
        prompts = (*self.prompts, *self.plain)
        return [self.cell(lora, prompt, strength) for strength in self.strengths for prompt in prompts]

    def cell(self, lora: Path, prompt: str, strength: float) -> Cell:
        """One picture of them, or one like them."""
        return Cell(prompt=prompt, seed=self.seed, loras=(LoraUse(path=str(lora), unet=strength, text=strength),))

    def place(self, strength: int, prompt: int) -> int:
        """The cell of a strength's and a prompt's number; plain prompts count on after the others."""
        return strength * (len(self.prompts) + len(self.plain)) + prompt


@dataclass(frozen=True)
class Point:
    """What was measured at one strength."""

    strength: float
    similarity: float
    drift: float


@dataclass(frozen=True)
class Calibration:
    """The measured points, the fitted curves' polynomials (lowest power first), and what follows from them."""

    points: tuple[Point, ...]
    similarity_fit: tuple[float, ...]
    drift_fit: tuple[float, ...]
    suggested: float
    error: float
    """Standard deviation of the suggestion when the prompts are drawn again from these (bootstrap)."""

    def at(self, strength: float) -> Point:
        """The fitted curves at a strength."""
        return Point(strength, float(_value(self.similarity_fit, strength)), float(_value(self.drift_fit, strength)))

    @property
    def words(self) -> str:
        """What is suggested, and against what."""
        best, whole = self.at(self.suggested), self.at(1.0)
        text = (
            f"Suggested strength {self.suggested:.2f} (± {self.error:.2f}): {best.similarity:.0%} of the way from the base to "
            f"the folder, drift {best.drift:.2f}; at strength 1 {whole.similarity:.0%} and {whole.drift:.2f}."
        )
        if best.similarity < 0.1:
            text += " This LoRA hardly brings the pictures nearer to the folder."
        elif self.suggested >= self.points[-1].strength:
            text += " That is the end of what was tried: the best may lie beyond."
        return text


def make_plan(
    examples: Sequence[Example],
    trigger: str = "",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    new: Sequence[str] = (),
) -> Plan:
    """Prompts out of a folder's captions, evenly spread over it; the trigger is what all share unless it is named.

    `new`: prompts with the trigger in place of the new subjects. Raises DatasetError for a folder without captioned
    pictures, ValueError without strength 0 or with fewer than 4 strengths.
    """
    ordered = tuple(sorted(set(strengths)))
    if 0.0 not in ordered or len(ordered) < 4:
        raise ValueError("a curve needs strength 0 and at least three others")
    captions = [one.caption for one in examples if one.caption]
    if not captions:
        raise DatasetError("No picture of this folder has a caption", hint="Name the folder that the LoRA was trained on.")
    trigger = trigger or shared_words(captions)
    new = list(new) or _new_prompts(captions, trigger)
    own = _spread(list(dict.fromkeys(captions)), _PROMPTS - len(new[: _PROMPTS // 2]))
    plain = [without(caption, trigger) for caption in own] if trigger else []
    plain = _spread([text for text in dict.fromkeys(plain) if set(text.lower().split()) - ARTICLES], _PLAIN)
    plain += [text for text in _COMMON if text not in plain][: _PLAIN - len(plain)]
    wanted = tuple(one.path for one in _spread(list(examples), _WANTED))
    return Plan(ordered, (*own, *new[: _PROMPTS // 2]), tuple(plain), wanted, seed)


def _new_prompts(captions: Sequence[str], trigger: str) -> list[str]:
    """New subjects with the trigger, where every caption is a subject and then the trigger; else none."""
    if not trigger or not all(caption.endswith(trigger) and without(caption, trigger) for caption in captions):
        return []
    known = {word for caption in captions for word in caption.lower().replace(",", " ").split()}
    between = captions[0].removesuffix(trigger)[len(captions[0].removesuffix(trigger).rstrip(" ,")) :]
    return [f"{subject}{between}{trigger}" for subject in _NEW if subject.split()[-1] not in known]


def _spread(things: list[Thing], count: int) -> list[Thing]:
    """At most `count` of them, evenly spread."""
    if len(things) <= count:
        return things
    return [things[round(at)] for at in np.linspace(0, len(things) - 1, count)]


def calibrate(plan: Plan, drawn: Mapping[int, Image.Image], wanted: Sequence[Image.Image]) -> Calibration:
    """The curve and the suggestion; `drawn` by cell of `plan`, all of one size, `wanted` the pictures of `plan.wanted`."""
    count, zero = len(plan.prompts), plan.strengths.index(0.0)
    told = np.stack(
        [describe_all([drawn[plan.place(at, prompt)] for prompt in range(count)]) for at in range(len(plan.strengths))]
    )  # (S, P, D)
    truth = describe_all(wanted)
    spread = spread_of(told[zero], truth)
    drifts = _drifts(plan, drawn, zero)  # (S, Q)

    def curves(prompts: NDArray[np.int64], plain: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
        apart = np.array([set_distance(row[prompts], truth, spread) for row in told])
        return 1.0 - apart / max(apart[zero], 1e-9), drifts[:, plain].mean(1)

    similarity, drift = curves(np.arange(count), np.arange(len(plan.plain)))
    fits = _fits(plan.strengths, similarity, drift)
    draw = np.random.default_rng(0)
    again = [
        _best(plan.strengths, *_fits(plan.strengths, *curves(*(draw.integers(0, n, n) for n in (count, len(plan.plain))))))
        for _ in range(_DRAWS)
    ]
    points = tuple(
        Point(strength, float(near), float(far)) for strength, near, far in zip(plan.strengths, similarity, drift, strict=True)
    )
    best = round(_best(plan.strengths, *fits) / STEP) * STEP
    near_fit, far_fit = (tuple(float(part) for part in fit) for fit in fits)
    return Calibration(points, near_fit, far_fit, round(best, 2), float(np.std(again)))


def _drifts(plan: Plan, drawn: Mapping[int, Image.Image], zero: int) -> Numbers:
    """(S, Q): how far each plain prompt's picture is from the base's, against what two of the base's are apart."""
    count = len(plan.prompts)
    pixels = np.stack(
        [
            [read_pixels(drawn[plan.place(at, count + prompt)]) for prompt in range(len(plan.plain))]
            for at in range(len(plan.strengths))
        ]
    )
    base = pixels[zero]
    others = [pixels_apart(first, second) for first, second in itertools.combinations(base, 2)]
    usual = float(np.mean(others)) if others else 255.0
    return np.array([[pixels_apart(one, own) for one, own in zip(row, base, strict=True)] for row in pixels]) / max(usual, 1e-9)


def _fits(strengths: Sequence[float], similarity: Numbers, drift: Numbers) -> tuple[Numbers, Numbers]:
    """Polynomials through 0 at strength 0, by least squares: a cubic for similarity, a parabola for drift."""
    return _fit(strengths, similarity, 3), _fit(strengths, drift, 2)


def _fit(strengths: Sequence[float], values: Numbers, degree: int) -> Numbers:
    at = np.asarray(strengths)
    powers = np.stack([at**power for power in range(1, degree + 1)], 1)
    found = np.linalg.lstsq(powers, values, rcond=None)[0]
    return np.concatenate([[0.0], found])


def _value(fit: Sequence[float], at: float | Numbers) -> Numbers:
    found: Numbers = np.polynomial.polynomial.polyval(np.asarray(at), np.asarray(fit))
    return found


def _best(strengths: Sequence[float], similarity: Numbers, drift: Numbers) -> float:
    """Where fitted similarity less the price of drift is highest, from 0 to the largest strength tried."""
    at = np.linspace(0.0, max(strengths), 601)
    return float(at[np.argmax(_value(similarity.tolist(), at) - PRICE * _value(drift.tolist(), at))])
