"""From an image file to the tensor that a network takes: reading, resizing, normalising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from aig.console import InputError
from aig.runtime import rgb


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, whatever its mode. Raises InputError naming the file if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # else Pillow warns
            return rgb(image)
    except FileNotFoundError:
        raise InputError(f"cannot read the image {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path} ({error}): repair or remove it") from error


def centred(size: int, short_side: int) -> Callable[[Image.Image], Tensor]:
    """The transform of an RGB image of any size to (3, size, size) uint8: short side resized, centre cropped."""
    from torchvision.transforms import v2  # here, because importing torchvision takes seconds

    return v2.Compose([v2.Resize(short_side), v2.CenterCrop(size), v2.PILToTensor()])


def photo_transform(size: int, train: bool) -> Callable[[Image.Image], Tensor]:
    """The usual transform of ImageNet, scaled from 224 to `size`: an RGB image -> (3, size, size) uint8."""
    from torchvision.transforms import v2

    if not train:
        return centred(size, photo_side(size))
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def photo_side(size: int) -> int:
    """Pixels of the short side of a photograph, as it is resized before its centre is cropped to `size`."""
    return round(size * 256 / 224)


class Normaliser:
    """(pixels / 255 - mean) / std, and back.

    Args:
        mean, std: per channel, in units of [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        values = (255 * torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
        self.mean, self.std = (each.view(3, 1, 1) for each in values)
        self.scale, self.shift = 1 / self.std, -self.mean / self.std

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) float in [0, 255] -> zero mean and unit variance."""
        return torch.addcmul(self.shift, pixels, self.scale)

    def rows(self, pixels: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in channels-last layout, zero mean and unit variance."""
        scale, shift = (values.flatten().repeat(pixels.shape[2]) for values in (self.scale, self.shift))  # (W * 3,)
        rows = torch.addcmul(shift, pixels.flatten(2).float(), scale)  # (N, H, W * 3): long inner loops
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> the whole numbers in [0, 255] that they were made from, as floats."""
        return (images * self.std + self.mean).round_().clamp_(0, 255)


@dataclass(frozen=True)
class Preprocess:
    """Makes the input of a network: PIL image of any size -> (3, size, size) float32.

    Attributes:
        size: height and width in pixels.
        mean, std: per channel, in units of [0, 1].
        photographs: crop as ImageNet does; else the whole short side is kept, as for small images.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    photographs: bool

    @property
    def short_side(self) -> int:
        """Of an image before its centre is cropped, in pixels."""
        return photo_side(self.size) if self.photographs else self.size

    def pixels(self, image: Image.Image) -> Tensor:
        """The image as the network sees it, (3, size, size) uint8."""
        return centred(self.size, self.short_side)(rgb(image))

    def __call__(self, image: Image.Image) -> Tensor:
        return Normaliser(self.mean, self.std)(self.pixels(image).float())
