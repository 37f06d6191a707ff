"""How near pictures as a set come to a style: textures, edges and colours, whatever is drawn (torch module)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from trainers.measures.recognition import BATCH, EfficientNetLite0, Features, judged_planes

EARLY_BLOCKS = (0, 2, 4)
"""Blocks whose maps are read, the last of the first three stages: strides 2, 4 and 8, receptive fields of lines and fills."""


def early_features(images: Sequence[Image.Image], judge: EfficientNetLite0) -> Features:
    """(N, 16 + 24 + 40): the mean of each channel of the early maps over a picture, any size; (0, 80) for no pictures."""
    found = [np.zeros((0, 80), dtype=np.float32)]
    for start in range(0, len(images), BATCH):
        with torch.inference_mode():
            maps = functional.relu6(judge._bn0(judge._conv_stem(judged_planes(images[start : start + BATCH]))))
            means = []
            for number, block in enumerate(judge._blocks[: EARLY_BLOCKS[-1] + 1]):
                maps = block(maps)
                if number in EARLY_BLOCKS:
                    means.append(maps.mean((2, 3)))
        found.append(torch.cat(means, 1).numpy())
    return np.concatenate(found)


def style_distance(pictures: Features, style: Features, usual: Features) -> float:
    """Distance of the mean of `pictures` (N, D) from the mean of `style` (M, D); 0 for the same set.

    The root mean square over channels of the difference, each channel in standard deviations over `usual` (P, D): pictures in
    several other styles. About 1 between two unlike styles of the same things.
    """
    spread = usual.std(0, dtype=np.float64)
    shift = (pictures.mean(0, dtype=np.float64) - style.mean(0, dtype=np.float64)) / np.maximum(spread, 1e-6)
    return float(np.sqrt((shift**2).mean()))
