"""Data sets and loaders: CIFAR-10/100, digits, class folders of small images, and folders laid out like ImageNet.

Small images live on the device as one uint8 tensor and are cropped, flipped and normalised in batches, with the
distribution of torchvision's transforms. Everything random is a function of (seed, epoch, step).
A further data set is an entry in `DATASETS`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from aig import distributed
from aig.console import InputError, progress_bar, say
from aig.distributed import ALONE, World
from aig.environment import derive_seed, without_empty_folders
from aig.images import Normaliser, centred, photo_transform, read_image
from aig.runtime import available_cores

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std per channel, in units of [0, 1]
PHOTOGRAPHS = "photographs"  # a folder laid out like ImageNet, beside the names in DATASETS
AUGMENTATIONS = ("crop", "crop+flip")
SPLIT_BY = "names"  # how --split chooses; recorded by trainings, because another version may do it in another way
CALIBRATION = 2000  # training images to choose thresholds on
IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class SmallImages:
    """A set of small images. Raises ValueError for images or labels of another shape, type or range."""

    images: Tensor  # (N, H, W, 3) uint8
    labels: Tensor  # (N,) int64, from 0 to K - 1
    classes: list[str]  # the names of the K classes
    files: Sequence[str] = ()  # the paths of the N images, none where they are not files

    def __post_init__(self) -> None:
        images, labels = torch.as_tensor(self.images), torch.as_tensor(self.labels)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), not {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 ({len(images)},), not {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()} for {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> SmallImages:
        files = [self.files[index] for index in indices.tolist()] if self.files else ()
        return SmallImages(self.images[indices], self.labels[indices], self.classes, files)


# ---------------------------------------------------------------------------------------------- small images: reading


@contextmanager
def downloading(name: str, root: Path, otherwise: str = "") -> Iterator[None]:
    """Around the download of a data set into `root`: of several processes the first one does it.

    Raises InputError if it cannot be had; `otherwise` says what to do then.
    """
    try:
        with distributed.world().main_first(), without_empty_folders(root):
            yield
    except (OSError, RuntimeError) as error:
        how = otherwise or "try --dataset digits, which needs no download"
        raise InputError(f"{name} is not in {root} and cannot be downloaded: {how}") from error


def load_cifar(name: str, root: Path, train: bool) -> SmallImages:
    """CIFAR from `root`, downloaded if it is not there. Raises InputError if it cannot be had."""
    from torchvision import datasets  # here, because importing torchvision takes seconds

    source = getattr(datasets, name)
    archive = f"put {source.filename} (from {source.url}) into {root}, or try --dataset digits, which needs no download"
    with downloading(name, root, archive):
        found = source(root, train, download=True)  # downloads only what is not there
    return SmallImages(torch.from_numpy(found.data), torch.tensor(found.targets), list(found.classes))


def load_digits(root: Path, train: bool) -> SmallImages:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    part = indices[0 if train else 1]
    grey = torch.from_numpy(np.rint(digits.images[part] * (255 / 16)).astype(np.uint8))  # (N, 8, 8), 0..16 before
    labels = torch.from_numpy(digits.target[part]).long()
    return SmallImages(grey[..., None].repeat(1, 1, 1, 3), labels, [str(name) for name in digits.target_names])


def load_folder(root: Path, train: bool, split: float | None = None) -> SmallImages:
    """One folder per class, images of any size, brought to 32x32: short side resized, centre cropped."""
    found = open_split(root, train, ("test", "val"), split)
    files, labels = [path for path, _ in found.samples], [label for _, label in found.samples]
    size = DATASETS["folder"].size
    shrink = centred(size, size)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        pixels = pool.map(lambda path: shrink(read_image(path)), files)
        images = torch.stack(list(progress_bar(pixels, f"reading {found.root}", len(files), "image")))
    return SmallImages(images.permute(0, 2, 3, 1).contiguous(), torch.tensor(labels), found.classes, files)


@dataclass(frozen=True)
class Source:
    """A data set of small images."""

    load: Callable[..., SmallImages]  # (folder, train or test) -> its images; raises InputError
    augment: str  # of training, see `SmallImageLoader`
    statistics: Statistics | None  # to normalise with; None measures the training images
    size: int  # height and width in pixels

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augmentation {self.augment!r}: choose from {', '.join(AUGMENTATIONS)}")


DATASETS = {
    # The original's constants; its std is the mean of the images' own stds, smaller than the std of all pixels
    "cifar10": Source(
        partial(load_cifar, "CIFAR10"), "crop+flip", ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), 32
    ),
    "cifar100": Source(
        partial(load_cifar, "CIFAR100"), "crop+flip", ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), 32
    ),
    "folder": Source(load_folder, "crop+flip", None, 32),
    "digits": Source(load_digits, "crop", None, 8),
}


# ---------------------------------------------------------------------------------------------- class folders


def open_split(root: Path, train: bool, tests: Sequence[str], split: float | None) -> Any:
    """torchvision's ImageFolder of the training or the test images in `root`.

    Args:
        tests: names that the folder of the test images may have, beside `train`.
        split: with it, `root` itself holds the class folders, and this fraction of each class is held out for the test,
            chosen by the names of the files: another image in a class moves at most one of those that were there.

    Raises:
        InputError: if there is no such folder, no class in it, or a class without images.
    """
    if not root.is_dir():
        raise InputError(f"no such folder: {root}")
    if not split:
        names = ("train",) if train else tests
        for name in names:
            if (root / name).is_dir():
                return open_image_folder(root / name)
        how = f"expected one folder per class inside it; if {root} holds the class folders themselves, add --split 0.2"
        raise InputError(f"no folder {' or '.join(f'{name}/' for name in names)} in {root}: {how}")
    if any((root / name).is_dir() for name in ("train", *tests)):
        raise InputError(f"{root} is split already: leave out --split")
    found = open_image_folder(root)
    classes: dict[int, list[str]] = {}
    for path, label in found.samples:
        classes.setdefault(label, []).append(path)
    kept = set()
    for paths in classes.values():
        drawn = sorted(paths, key=lambda path: sha256(os.fsencode(os.path.relpath(path, root))).digest())
        held_out = min(max(1, round(split * len(drawn))), len(drawn) - 1)
        kept.update(drawn[held_out:] if train else drawn[:held_out])
    if not kept:
        raise InputError(f"--split: each class in {root} has a single image, so none can be held out")
    found.samples = [sample for sample in found.samples if sample[0] in kept]
    return found


def tested_split(
    asked: float | None, data: str, own: dict[str, Any], given: Container[str], source: str
) -> float | None:
    """The `split` of a test: that of the training, none for other images that are split already, or that asked for.

    Args:
        asked: the split that was given, else that of the training.
        data: the folder of the images.
        own: the flags that `source`, a checkpoint, records.
        given: names of the flags that were given.

    Raises:
        InputError: if some of these test images were trained on.
    """
    if own.get("split") is None:
        return asked
    root = Path(data)
    if root.resolve() != Path(str(own.get("data"))).resolve():
        already = any((root / name).is_dir() for name in ("train", "test", "val"))
        return None if already and "split" not in given else asked
    check_split_rule(own, source)
    if asked > own["split"]:
        raise InputError(f"--split {asked:g}: {source} was trained with --split {own['split']}, so some of these test "
                         "images were trained on: leave it out")
    return asked


def check_split_rule(own: dict[str, Any], source: str) -> None:
    """Raises InputError if the images of a training were split by an earlier version, in another way."""
    if own.get("split") is not None and own.get("split_by") != SPLIT_BY:
        raise InputError(f"{source} was trained with the --split of an earlier version, which held out other images: "
                         "train it anew")


def open_image_folder(folder: Path) -> Any:
    """torchvision's ImageFolder. Raises InputError if it has no classes, or a class without images."""
    from torchvision import datasets

    try:
        return datasets.ImageFolder(folder)
    except OSError as error:  # no class folder, a class folder without images, or one that cannot be read
        raise InputError(str(error).split(" Supported extensions")[0].rstrip(".") + f" (in {folder})") from error


def check_classes(train: list[str], other: list[str], where: str) -> None:
    """Raises InputError naming the classes that only one of the two lists has."""
    if train != other:
        differing = sorted(set(train) ^ set(other))
        raise InputError(f"the classes of {where} differ from those trained on: {', '.join(differing[:5]) or 'order'}")


# ---------------------------------------------------------------------------------------------- choosing images


def pixel_statistics(images: SmallImages) -> Statistics:
    """The mean and std of images, to normalise with."""
    count, total, squares = 0, 0.0, 0.0
    for chunk in images.images.split(1024):
        pixels = (chunk.permute(0, 3, 1, 2).double() / 255).movedim(1, 0).flatten(1)  # (3, pixels)
        count += pixels.shape[1]
        total, squares = total + pixels.sum(1), squares + pixels.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), [max(value, 1 / 255) for value in std.tolist()]  # images of one colour must not divide by 0


def hold_out(images: SmallImages, count: int) -> tuple[SmallImages, SmallImages]:
    """Splits off `count` images, always the same ones whatever the seed of the run: (the rest, those held out)."""
    if count > len(images) - 2:
        raise InputError(f"--val-size {count}: there are only {len(images)} training images, and two must remain")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.subset(order[count:]), images.subset(order[:count])


def subset_indices(size: int, count: int, flag: str = "") -> Tensor:
    """Indices of `count` of `size` images, always the same ones. Raises InputError if a flag asks for too many."""
    if flag and count > size:
        raise InputError(f"{flag} {count}: there are only {size} images")
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))[:count]


# ---------------------------------------------------------------------------------------------- loaders


class Loader:
    """Batches of `count` images, `batch_size` in all processes together; each of the `world` gets its shard."""

    classes: list[str]
    labels: Tensor  # (N,), those of all images, before shuffling
    files: Sequence[str]  # the paths of all images, none where they are not files
    size: tuple[int, int]  # (H, W) of an image
    normaliser: Normaliser  # turns pixels into the network's input

    def __init__(self, count: int, batch_size: int, seed: int, training: bool, world: World) -> None:
        self.batch_size, self.seed, self.training, self.world = batch_size, seed, training, world
        # BatchNorm of a gate needs two images in every process: training leaves out a last batch that is too small
        last = count % batch_size
        self.count, self.dropped = count, last if training and last < 2 * world.size else 0
        self.num_images = count - self.dropped  # in an epoch

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches()

    def images_in(self, step: int) -> int:
        """Images in batch `step`, counted from 1, of all processes."""
        return min(self.batch_size, self.num_images - (step - 1) * self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in their order: shuffled in training."""
        if not self.training:
            return torch.arange(self.num_images)
        shuffle = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", epoch))
        return torch.randperm(self.count, generator=shuffle)[: self.num_images]

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images (N, 3, H, W) float32, channels last, and labels (N,), from step `start` of the epoch on.

        They are this process's shard of each batch, which may be empty in evaluation.
        """
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """An image of evaluation as the network sees it, (3, H, W) uint8 on the CPU. Raises InputError."""
        raise NotImplementedError


class SmallImageLoader(Loader):
    """Batches from a uint8 tensor on the device, without worker processes.

    Random numbers are drawn for the whole batch; each process takes its shard of them.

    Args:
        augment: None for evaluation (in order, as they are), or "crop" or "crop+flip": shuffled, with torchvision's
            RandomCrop(size, padding=size // 8), the padding black before normalising, and RandomHorizontalFlip().
        seed: of shuffling and augmentation.
    """

    def __init__(
        self,
        source: SmallImages,
        batch_size: int,
        normalisation: Statistics,
        *,
        augment: str | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        world: World = ALONE,
    ) -> None:
        super().__init__(len(source), batch_size, seed, augment is not None, world)
        self.classes, self.files, self.augment = source.classes, source.files, augment
        self.size = tuple(source.images.shape[1:3])  # (H, W)
        p = self.padding = self.size[0] // 8 if augment else 0
        self.images = torch.nn.functional.pad(source.images, (0, 0, p, p, p, p)).to(device)  # (N, H + 2p, W + 2p, 3)
        self.labels = source.labels.to(device)
        self.normaliser = Normaliser(*normalisation, device)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        order = self.order(epoch).to(device)
        for step in range(start, len(self)):
            first, count = step * self.batch_size, self.images_in(step + 1)
            shard = self.world.shard(count)
            indices = order[first : first + count][shard]
            if self.augment:
                random = torch.Generator(device).manual_seed(derive_seed(self.seed, "augment", epoch, step))
                pixels = self.crop(indices, *(drawn[shard] for drawn in self.draw(count, random)))
            else:
                pixels = self.images[first : first + count][shard]
            yield self.normaliser.rows(pixels), self.labels[indices]

    def pixels(self, index: int) -> Tensor:
        return self.images[index].permute(2, 0, 1).cpu()

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


# ---------------------------------------------------------------------------------------------- photographs


class SeededImages(Dataset):
    """Images under the keys (seed, index): the random transform is a function of the key, in whatever process.

    Paths are one array: workers would copy every page of a list, one reference count after the other.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels, self.transform = np.array([label for _, label in samples]), transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """The transformed image and its label. Raises InputError if it cannot be decoded."""
        seed, index = key
        image = read_image(os.fsdecode(self.paths[index]))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU, too
            return self.transform(image), int(self.labels[index])


class ShuffledKeys:
    """A batch sampler for a DataLoader: lists of (seed, index) keys, this process's shard of each batch of a loader."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.epoch, self.start = loader, 0, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        loader = self.loader
        order = loader.order(self.epoch).tolist()
        for first in range(self.start * loader.batch_size, len(order), loader.batch_size):
            batch = order[first : first + loader.batch_size]
            shard = batch[loader.world.shard(len(batch))]
            yield [(derive_seed(loader.seed, "augment", self.epoch, index), index) for index in shard]


def collate(items: list[tuple[Tensor, int]]) -> Sequence[Tensor]:
    """Stacks images (N, 3, H, W) uint8 and labels (N,); N may be 0."""
    empty = torch.zeros(0, 3, 0, 0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    return default_collate(items) if items else empty


def default_workers() -> int:
    """This process's share of the cores; torch's number of threads says nothing about them under torchrun."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_signals_to_the_trainer(worker: int) -> None:
    """Lets a worker live on when its whole process group or job is told to stop, for training to save its step."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PhotoLoader(Loader):
    """Batches of photographs in class folders, decoded by worker processes.

    Args:
        source: the images, as `open_split` opens them.
        augment: tells training from evaluation.
        size: height and width of the images, in pixels.
        workers: number of processes; 0 decodes in this one.

    Raises:
        InputError: from `batches`, if a file cannot be decoded.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        augment: bool,
        size: int = 224,
        seed: int = 0,
        workers: int = 4,
        device: torch.device | str = "cpu",
        world: World = ALONE,
    ) -> None:
        super().__init__(len(source.samples), batch_size, seed, augment, world)
        self.classes, self.device, self.size = source.classes, torch.device(device), (size, size)
        self.files = [path for path, _ in source.samples]
        self.labels = torch.tensor([label for _, label in source.samples])
        self.keys = ShuffledKeys(self)
        options = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
        self.loader = DataLoader(
            SeededImages(source.samples, photo_transform(size, augment)),
            batch_sampler=self.keys,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else starting an epoch would draw from the generator of the gates' noise
            **options,
        )
        self.normaliser = Normaliser(*IMAGENET_STATISTICS, device)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.keys.epoch, self.keys.start = epoch, start
        try:
            for batch in self.loader:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield self.normaliser(images.to(torch.float32, memory_format=torch.channels_last)), labels
        except InputError as error:  # what a worker raises has its whole traceback in the message
            raise InputError(str(error).rpartition("InputError: ")[2]) from None

    def pixels(self, index: int) -> Tensor:
        return self.loader.dataset[0, index][0]


# ---------------------------------------------------------------------------------------------- what a run uses


@dataclass(frozen=True)
class Choice:
    """Which images a run uses: what its flags, and the checkpoint it goes on from, say of its data."""

    dataset: str = PHOTOGRAPHS  # or a key of DATASETS
    data: str = ""  # the folder
    split: float | None = None  # see `open_split`
    train_size: int | None = None  # how many training images to use; None: all
    val_size: int = 0  # how many of them to hold out
    test_size: int | None = None  # how many images to test on; None: all
    image_size: int = 224  # of photographs
    test: bool = False  # evaluate on the test images; else train, and validate on those held out or on the test images
    needs_training: bool = False  # whether a test needs the training images, too
    calibrates: bool = False  # whether a test needs some of them as they are, those held out if there are any
    classes: list[str] | None = None  # this, mean and std: as recorded in a checkpoint
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class Batching:
    """How images are brought to the device: arguments of the loaders."""

    batch_size: int
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    workers: int = 0


@dataclass
class Loaders:
    """The images of a run; those that nothing needs are None."""

    train: Loader | None
    val: Loader
    normalisation: Statistics
    calibration: Loader | None = None  # up to CALIBRATION training images, as in evaluation


def open_loaders(choice: Choice, batching: Batching) -> Loaders:
    """The loaders of a training or a test, small images normalised as the checkpoint's were.

    Raises InputError if the images do not fit, or cannot be had.
    """
    if choice.dataset == PHOTOGRAPHS:
        return photo_loaders(choice, batching)
    source, root = DATASETS[choice.dataset], Path(choice.data)
    if choice.split and choice.dataset != "folder":
        raise InputError(f"--split is for --dataset folder: {choice.dataset} has a test set of its own")
    load = partial(source.load, root, split=choice.split) if choice.split else partial(source.load, root)
    evaluated = load(train=False)
    height, width = evaluated.images.shape[1:3]
    if (height, width) != (source.size, source.size):
        raise ValueError(f"{choice.dataset} has images of {height} x {width} pixels, but DATASETS says {source.size}")
    check_classes(choice.classes or evaluated.classes, evaluated.classes, f"--dataset {choice.dataset}")
    normalisation = (choice.mean, choice.std) if choice.mean else source.statistics
    training, train, held_out = not choice.test or choice.needs_training, None, None
    if training or choice.calibrates or normalisation is None:
        train = load(train=True)
        check_classes(train.classes, evaluated.classes, "the test images")
        if choice.val_size:
            train, held_out = hold_out(train, choice.val_size)
            evaluated = evaluated if choice.test else held_out
        if choice.train_size:
            train = train.subset(subset_indices(len(train), choice.train_size, "--train-size"))
        normalisation = normalisation or pixel_statistics(train)
    if choice.test_size:
        evaluated = evaluated.subset(subset_indices(len(evaluated), choice.test_size, "--test-size"))
    how = {name: value for name, value in vars(batching).items() if name != "workers"}
    loader = partial(SmallImageLoader, normalisation=normalisation, **how)
    calibration = None
    if choice.calibrates:
        some = held_out or train
        calibration = loader(some.subset(subset_indices(len(some), CALIBRATION)))
    if not choice.val_size and not choice.test:
        say("the validation set is the test set, as in the original: choose models honestly with --val-size")
    return Loaders(
        loader(train, augment=source.augment) if training else None, loader(evaluated), normalisation, calibration
    )


def photo_loaders(choice: Choice, batching: Batching) -> Loaders:
    """`open_loaders` for photographs."""
    if not choice.data:
        raise InputError("name the folder of the images, with train/ and val/ inside: train_img.py IMAGENET_FOLDER")
    root, loader = Path(choice.data), partial(PhotoLoader, size=choice.image_size, **vars(batching))
    found = open_split(root, False, ("val",), choice.split)
    if choice.test_size:
        keep_some(found, choice.test_size, "--test-size")
    val = loader(found, augment=False)
    check_classes(choice.classes or val.classes, val.classes, str(root))
    train, calibration = None, None
    if not choice.test or choice.needs_training or choice.calibrates:
        found = open_split(root, True, ("val",), choice.split)
        train = loader(found, augment=True)
        check_classes(train.classes, val.classes, f"{root}/val")
        if choice.calibrates:
            keep_some(found, CALIBRATION)
            calibration = loader(found, augment=False)
    return Loaders(train, val, IMAGENET_STATISTICS, calibration)


def keep_some(found: Any, count: int, flag: str = "") -> None:
    """Leaves `count` images in an ImageFolder, see `subset_indices`."""
    found.samples = [found.samples[index] for index in subset_indices(len(found.samples), count, flag).tolist()]
