"""Datasets and loaders: CIFAR-10/100, digits, class folders of small images, and ImageNet-layout folders.

Small images live on the device as one uint8 tensor and are cropped, flipped and normalised in batches, with the
distribution of torchvision's transforms. Everything random is a function of (seed, epoch, step).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import processes
from processes import World
from utils import InputError, derive_seed, get_mean_and_std, progress_bar, without_empty_folders

SMALL_DATASETS = ("cifar10", "cifar100", "folder", "digits")
SMALL_SIZE, DIGITS_SIZE = 32, 8
IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
CIFAR = {  # class, archive, normalisation
    # CIFAR-10: the original's constants; its std is the mean of the images' own stds, smaller than that of all pixels
    "cifar10": (datasets.CIFAR10, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    "cifar100": (datasets.CIFAR100, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
}


def small_transform(dataset: str) -> Callable[[Image.Image], Tensor]:
    """What brings an image of any size to that of a small data set, (3, H, W) uint8."""
    size = DIGITS_SIZE if dataset == "digits" else SMALL_SIZE
    return lambda image: TF.pil_to_tensor(shrink(image, size))


@dataclass(frozen=True)
class SmallImages:
    """A set of small images: images (N, H, W, 3) uint8, labels (N,) int64, the names of the K classes."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> SmallImages:
        return SmallImages(self.images[indices], self.labels[indices], self.classes)


# ---------------------------------------------------------------------------------------------- small images: reading


def load_small_images(dataset: str, root: str | Path, train: bool) -> SmallImages:
    """The training or the test images of a small data set.

    Args:
        dataset: one of SMALL_DATASETS.
        root: where CIFAR is, or is downloaded to; for "folder", where `train/` and `test/` (or `val/`) are.

    Raises:
        InputError: if the data is missing, cannot be had, or cannot be read.
    """
    if dataset == "digits":
        return _digits(train)
    if dataset == "folder":
        return _class_folder(Path(root), train)
    return _cifar(dataset, Path(root), train)


def _cifar(dataset: str, root: Path, train: bool) -> SmallImages:
    source = CIFAR[dataset][0]
    try:
        with processes.world().leader_first(), without_empty_folders(root):
            found = source(root, train, download=True)  # downloads only what is not there
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{dataset} is not in {root} and cannot be downloaded: put {source.filename} (from {source.url}) into "
            f"{root}, or try --dataset digits, which needs no download"
        ) from error
    return SmallImages(torch.from_numpy(found.data), torch.tensor(found.targets), list(found.classes))


def _digits(train: bool) -> SmallImages:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fixed stratified 80/20 split."""
    digits = load_digits()
    indices = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    chosen = indices[0 if train else 1]
    grey = torch.from_numpy(np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8))  # (N, 8, 8), 0..16 before
    labels = torch.from_numpy(digits.target[chosen]).long()
    return SmallImages(grey[..., None].repeat(1, 1, 1, 3), labels, [str(name) for name in digits.target_names])


def _class_folder(root: Path, train: bool) -> SmallImages:
    """One folder per class, images of any size, brought to 32x32: short side resized, centre cropped."""
    split = find_split(root, ("train",) if train else ("test", "val"))
    found = open_image_folder(split)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        arrays = pool.map(_read_small, [path for path, _ in found.samples])
        images = torch.from_numpy(np.stack(list(progress_bar(arrays, f"reading {split}", len(found), "image"))))
    return SmallImages(images, torch.tensor(found.targets), found.classes)


def _read_small(path: str) -> np.ndarray:
    return np.asarray(shrink(read_image(path), SMALL_SIZE))


def shrink(image: Image.Image, size: int) -> Image.Image:
    """The image with its short side resized, and its centre cropped, to `size` pixels."""
    return image if image.size == (size, size) else TF.center_crop(TF.resize(image, size), size)


def find_split(root: Path, names: tuple[str, ...]) -> Path:
    """The first of these folders that exists under root. Raises InputError if none does."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    wanted = " or ".join(f"{name}/" for name in names)
    raise InputError(f"no folder {wanted} in {root}: expected one folder per class inside")


def open_image_folder(folder: Path, transform: Any = None) -> datasets.ImageFolder:
    """torchvision's ImageFolder. Raises InputError if it has no classes, or a class without images."""
    try:
        return datasets.ImageFolder(folder, transform, loader=read_image)
    except FileNotFoundError as error:  # no class folder, or a class folder without images
        raise InputError(str(error).split(" Supported extensions")[0].rstrip(".") + f" (in {folder})") from error


def read_image(path: str) -> Image.Image:
    """An image file as RGB, whatever its mode. Raises InputError naming the file if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # else Pillow warns
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path} ({error}): repair or remove it") from error


def same_classes(train: list[str], other: list[str], where: str) -> None:
    """Raises InputError naming the classes that only one of the two lists has."""
    if train != other:
        differing = sorted(set(train) ^ set(other))
        raise InputError(f"the classes of {where} differ from those trained on: {', '.join(differing[:5]) or 'order'}")


# ---------------------------------------------------------------------------------------------- small images: batches


def pixel_statistics(dataset: str, images: SmallImages) -> tuple[list[float], list[float]]:
    """The mean and std to normalise with: the known constants for CIFAR, measured on these images otherwise."""
    if dataset in CIFAR:
        mean, std = CIFAR[dataset][1]
        return list(mean), list(std)
    chunks = zip(images.images.split(1024), images.labels.split(1024), strict=True)
    mean, std = get_mean_and_std((chunk.permute(0, 3, 1, 2), labels) for chunk, labels in chunks)
    return mean, [max(value, 1 / 255) for value in std]  # images of one colour must not divide by 0


def hold_out(images: SmallImages, count: int) -> tuple[SmallImages, SmallImages]:
    """Splits off `count` images, always the same ones whatever the seed of the run: (the rest, those held out)."""
    if count > len(images) - 2:
        raise InputError(f"--val-size {count}: there are only {len(images)} training images, and two must remain")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.subset(order[count:]), images.subset(order[:count])


def choose(images: SmallImages, count: int, flag: str) -> SmallImages:
    """`count` of the images, see `chosen`."""
    return images.subset(chosen(len(images), count, flag))


def chosen(size: int, count: int, flag: str) -> Tensor:
    """Indices of `count` of `size` images, always the same ones. Raises InputError if there are not so many."""
    if count > size:
        raise InputError(f"{flag} {count}: there are only {size} images")
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count]


def odd_images(count: int, batch_size: int, world: World) -> int:
    """Images of the last training batch if they are too few: BatchNorm of a gate needs two in every process."""
    last = count % batch_size
    return last if last < 2 * world.size else 0


class SmallImageLoader:
    """Batches of normalised images from a uint8 tensor on the device, without worker processes.

    Args:
        source: the images.
        batch_size: images per batch, of all processes together; the last one is smaller, and left out when training
            if it is too small, see `odd_images`.
        normalisation: mean and std per channel, in units of [0, 1].
        augment: None for evaluation (in order, as they are), or "crop" or "crop+flip": shuffled, with torchvision's
            RandomCrop(size, padding=size // 8), the padding black before normalising, and RandomHorizontalFlip().
        seed: of shuffling and augmentation.
        device: where the images are kept.
        world: the processes, each of which gets its share of every batch, whatever is random in it included.
    """

    def __init__(
        self,
        source: SmallImages,
        batch_size: int,
        normalisation: tuple[list[float], list[float]],
        *,
        augment: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        world: World = processes.ALONE,
    ) -> None:
        self.classes, self.batch_size, self.augment, self.seed = source.classes, batch_size, augment, seed
        self.world = world
        self.dropped = odd_images(len(source), batch_size, world) if augment else 0
        self.num_images = len(source) - self.dropped
        self.size = source.images.shape[1:3]  # (H, W)
        self.padding = self.size[0] // 8 if augment else 0
        p = self.padding
        self.images = torch.nn.functional.pad(source.images, (0, 0, p, p, p, p)).to(device)  # (N, H + 2p, W + 2p, 3)
        self.labels = source.labels.to(device)
        mean, std = (255 * torch.tensor(values, dtype=torch.float32, device=device) for values in normalisation)
        self.scale, self.shift = (values.repeat(self.size[1]) for values in (1 / std, -mean / std))  # (W * 3,)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (N, 3, H, W) float32, channels last, and labels (N,), from step `start` of the epoch on.

        They are this process's share of each batch, which may be empty in evaluation.
        """
        device = self.images.device
        if self.augment:
            shuffle = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", epoch))
            order = torch.randperm(len(self.labels), generator=shuffle)[: self.num_images].to(device)
        for step in range(start, len(self)):
            batch = slice(step * self.batch_size, min((step + 1) * self.batch_size, self.num_images))
            share = self.world.share(batch.stop - batch.start)
            if self.augment:
                random = torch.Generator(device).manual_seed(derive_seed(self.seed, "augment", epoch, step))
                chosen = order[batch][share]
                draws = (drawn[share] for drawn in self.draw(batch.stop - batch.start, random))
                yield self.normalise(self.crop(chosen, *draws)), self.labels[chosen]
            else:
                yield self.normalise(self.images[batch][share]), self.labels[batch][share]

    def draw(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random top and left edges of the crops in the padded images, and who is flipped: three (N,) tensors."""
        device = self.images.device
        top, left = torch.randint(2 * self.padding + 1, (2, count), generator=random, device=device)
        flip = torch.rand(count, generator=random, device=device) < (0.5 if self.augment == "crop+flip" else 0)
        return top, left, flip

    def crop(self, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Gathers the crops of the images at `indices`, mirrored where `flip`: (N, H, W, 3) uint8."""
        height, width = (torch.arange(side, device=self.images.device) for side in self.size)
        rows = top[:, None] + height  # (N, H)
        columns = left[:, None] + torch.where(flip[:, None], width.flip(0), width)  # (N, W)
        full_height, full_width = self.images.shape[1:3]
        rows = indices[:, None] * full_height + rows  # (N, H), of all images below each other
        pixels = rows[:, :, None] * full_width + columns[:, None, :]  # (N, H, W)
        # one index per pixel into a flat list of pixels: several times faster than indexing three dimensions
        return self.images.flatten(0, 2).index_select(0, pixels.flatten()).view(*pixels.shape, 3)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in channels-last layout, zero mean and unit variance."""
        rows = torch.addcmul(self.shift, images.flatten(2).float(), self.scale)  # (N, H, W * 3): long inner loops
        return rows.view(images.shape).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------- photographs


def photo_transform(size: int, train: bool) -> Callable[[Image.Image], Tensor]:
    """The transform of an RGB image to (3, size, size) uint8: the usual ones of ImageNet, for 224 and in proportion."""
    if train:
        crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        crop = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*crop, v2.PILToTensor()])


class SeededImages(Dataset):
    """Images under the keys (seed, index): the random transform is a function of the key, in whatever process."""

    def __init__(self, folder: datasets.ImageFolder, transform: Callable[[Image.Image], Tensor]) -> None:
        self.folder, self.transform = folder, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | InputError:
        """The transformed image and its label; an error as a value, because workers mangle what they raise."""
        seed, index = key
        path, label = self.folder.samples[index]
        try:
            image = read_image(path)
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), label


class Batches:
    """A batch sampler that yields lists of (seed, index) keys, in a random order for training.

    They are this process's share of each batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, shuffle: bool, world: World) -> None:
        self.dropped = odd_images(count, batch_size, world) if shuffle else 0
        self.count, self.batch_size, self.seed, self.shuffle, self.world = count, batch_size, seed, shuffle, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return -(-(self.count - self.dropped) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = range(self.count)
        if self.shuffle:
            random = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", self.epoch))
            order = torch.randperm(self.count, generator=random).tolist()
        order = order[: self.count - self.dropped]
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            share = batch[self.world.share(len(batch))]
            yield [(derive_seed(self.seed, "augment", self.epoch, index), index) for index in share]


def collate(items: list[tuple[Tensor, int] | InputError]) -> tuple[Tensor, Tensor] | InputError:
    """Stacks images (N, 3, H, W) uint8 and labels (N,), or hands on the first error; N may be 0."""
    if not items:
        return torch.zeros(0, 3, 0, 0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    for item in items:
        if isinstance(item, InputError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def default_workers() -> int:
    """Four, or this process's share of the cores if that is less; torch's threads would tell nothing under torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, cores // processes.local_size()))


def leave_signals_to_the_trainer(worker: int) -> None:
    """Lets a worker live on when its whole process group or job is told to stop, for training to save its step."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PhotoLoader:
    """Batches of normalised photographs from a folder with one folder per class, decoded by worker processes.

    Args:
        folder: of class folders.
        batch_size, seed, world: as for `SmallImageLoader`; `augment` tells training from evaluation.
        size: height and width of the images, in pixels.
        workers: number of processes; 0 decodes in this one.
        device: where the batches go.
        count: use only so many of the images, see `chosen`.

    Raises:
        InputError: if there is no class, or a class without images; from `batches`, if a file cannot be decoded.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        *,
        augment: bool,
        size: int = 224,
        seed: int = 0,
        workers: int = 4,
        device: torch.device | str = "cpu",
        world: World = processes.ALONE,
        count: int | None = None,
    ) -> None:
        source = open_image_folder(folder)
        if count:
            source.samples = [source.samples[index] for index in chosen(len(source), count, "--test-size").tolist()]
        self.classes, self.device, self.size = source.classes, torch.device(device), (size, size)
        self.batch_size, self.world = batch_size, world
        self.labels = torch.tensor([label for _, label in source.samples])
        self.sampler = Batches(len(source), batch_size, seed, shuffle=augment, world=world)
        self.dropped = self.sampler.dropped
        self.num_images = len(source) - self.dropped
        options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        self.loader = DataLoader(
            SeededImages(source, photo_transform(size, augment)),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting an epoch would draw from the generator of the gates' noise
            **options,
        )
        mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in IMAGENET_STATISTICS)
        self.scale, self.shift = 1 / std, -mean / std

    def __len__(self) -> int:
        return len(self.sampler)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (N, 3, H, W) float32, channels last, and labels (N,), from step `start` of the epoch on.

        They are this process's share of each batch, which may be empty in evaluation.
        """
        self.sampler.epoch, self.sampler.start = epoch, start
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            images = images.to(torch.float32, memory_format=torch.channels_last)
            yield torch.addcmul(self.shift, images, self.scale), labels
