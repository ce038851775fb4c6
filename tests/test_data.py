"""The batched augmentation is torchvision's, and batches are a function of (seed, epoch, step)."""

import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as TF

import train_img
from aig import data
from aig.console import InputError
from aig.data import DATASETS, Batching, Choice, SmallImageLoader, SmallImages
from aig.distributed import ALONE, World, world
from aig.images import photo_transform, read_image

UNIT = ([0.0, 0.0, 0.0], [1 / 255] * 3)  # a normalisation that gives back the pixels


def random_images(count, size=32, classes=10):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=random)
    return SmallImages(images, torch.arange(count) % classes, [f"class {k}" for k in range(classes)])


def test_crop_and_flip_are_torchvisions_on_the_same_offsets(device):
    source = random_images(100)
    loader = SmallImageLoader(source, 100, UNIT, augment="crop+flip", device=device)
    top, left = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    top, left = top.flatten(), left.flatten()  # every offset there is
    flip = torch.arange(81) % 2 == 0
    crops = loader.crop(*(values.to(device) for values in (torch.arange(81), top, left, flip))).cpu()
    for i in range(81):
        image = TF.crop(TF.pad(Image.fromarray(source.images[i].numpy()), 4), int(top[i]), int(left[i]), 32, 32)
        expected = np.asarray(TF.hflip(image) if flip[i] else image)
        np.testing.assert_array_equal(crops[i].numpy(), expected)


def test_offsets_are_uniform_and_flips_even(device):
    loader = SmallImageLoader(random_images(2), 2, UNIT, augment="crop+flip", device=device)
    n = 90_000
    top, left, flip = loader.draw(n, torch.Generator(device).manual_seed(0))
    for offsets in (top, left):
        counts = offsets.bincount().double()
        assert len(counts) == 9
        assert ((counts / n - 1 / 9).abs() < 4 * (1 / 9 * 8 / 9 / n) ** 0.5).all()
    assert abs(flip.double().mean() - 0.5) < 4 * 0.5 / n**0.5
    assert abs(torch.corrcoef(torch.stack([top, left]).double())[0, 1]) < 4 / n**0.5
    assert not SmallImageLoader(random_images(2), 2, UNIT, augment="crop").draw(n, torch.Generator())[2].any()


def test_padding_is_black_before_normalising():
    white = SmallImages(torch.full((200, 32, 32, 3), 255, dtype=torch.uint8), torch.zeros(200).long(), ["white"])
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    loader = SmallImageLoader(white, 200, (mean, std), augment="crop+flip", seed=1)
    images, _ = next(loader.batches(1))
    for channel in range(3):
        values = images[:, channel].unique()
        expected = torch.tensor([-mean[channel] / std[channel], (1 - mean[channel]) / std[channel]])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_batches_are_the_images_in_order_normalised(device):
    source = random_images(10)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    loader = SmallImageLoader(source, 4, (mean, std), device=device)
    images, labels = map(torch.cat, zip(*loader.batches(), strict=True))
    expected = torch.stack([TF.normalize(TF.to_tensor(image.numpy()), mean, std) for image in source.images])
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert images.device.type == labels.device.type == device.type
    assert torch.equal(labels.cpu(), source.labels)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    source = SmallImages(torch.zeros(200, 8, 8, 3, dtype=torch.uint8), torch.arange(200), ["name"] * 200)
    loader = SmallImageLoader(source, 32, UNIT, augment="crop")
    first, second = ([y for _, labels in loader.batches(epoch) for y in labels.tolist()] for epoch in (1, 2))
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second


def test_batches_depend_on_seed_epoch_and_step_alone(device):
    source, settings = random_images(100), {"augment": "crop+flip", "device": device}

    def images(seed, epoch, start=0):
        return [x for x, _ in SmallImageLoader(source, 16, UNIT, seed=seed, **settings).batches(epoch, start)]

    whole = images(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, images(1, 3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], images(1, 3, start=4), strict=True))
    assert not torch.equal(whole[0], images(2, 3)[0])
    assert not torch.equal(whole[0], images(1, 4)[0])


def test_augmentation_is_anew_in_each_step_epoch_and_run():
    """Of equal images, so that shuffling changes nothing."""
    source = SmallImages(random_images(1, 8).images.expand(32, 8, 8, 3), torch.zeros(32).long(), ["one"])

    def batches(seed, epoch):
        return [x for x, _ in SmallImageLoader(source, 16, UNIT, augment="crop", seed=seed).batches(epoch)]

    drawn = [*batches(1, 1), batches(1, 2)[0], batches(2, 1)[0]]
    assert not any(torch.equal(one, other) for k, one in enumerate(drawn) for other in drawn[:k])


@pytest.mark.parametrize(("count", "dropped", "steps"), [(33, 1, 2), (34, 0, 3), (32, 0, 2)])
def test_a_last_training_batch_of_one_image_is_left_out(count, dropped, steps):
    loader = SmallImageLoader(random_images(count), 16, UNIT, augment="crop")
    sizes = [len(y) for _, y in loader.batches(1)]
    assert (loader.dropped, len(loader), len(sizes), sum(sizes)) == (dropped, steps, steps, count - dropped)
    assert min(sizes) > 1
    assert sum(len(y) for _, y in SmallImageLoader(random_images(count), 16, UNIT).batches()) == count


def test_digits_are_all_there_split_evenly_over_the_classes():
    train, test = (data.load_digits("", train) for train in (True, False))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (8, 8, 3)
    assert train.images.max() == 255
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert ((share - 0.2).abs() < 0.01).all()


def test_held_out_images_are_disjoint_and_always_the_same():
    source = SmallImages(torch.zeros(50, 8, 8, 3, dtype=torch.uint8), torch.arange(50), ["name"] * 50)
    train, held_out = data.hold_out(source, 10)
    assert sorted([*train.labels.tolist(), *held_out.labels.tolist()]) == list(range(50))
    torch.manual_seed(7)  # of another run
    assert torch.equal(held_out.labels, data.hold_out(source, 10)[1].labels)
    assert len(data.hold_out(source, 48)[0]) == 2
    with pytest.raises(InputError, match="only 50 training images"):
        data.hold_out(source, 49)


@pytest.mark.parametrize(("count", "size"), [(37, 5), (2500, 2)])  # at once, and in parts
def test_mean_and_std_are_those_of_all_pixels(count, size):
    source = random_images(count, size)
    pixels = source.images.numpy().reshape(-1, 3) / 255
    mean, std = data.pixel_statistics(source)
    np.testing.assert_allclose([mean, std], [pixels.mean(0), pixels.std(0)], rtol=1e-12)


def test_images_of_one_colour_do_not_divide_by_zero():
    grey = SmallImages(torch.full((4, 8, 8, 3), 51, dtype=torch.uint8), torch.zeros(4).long(), ["grey"])
    mean, std = data.pixel_statistics(grey)
    assert (mean, std) == (pytest.approx([0.2] * 3), [1 / 255] * 3)


def test_cifar_keeps_the_originals_constants():
    mean, std = map(list, DATASETS["cifar10"].statistics)
    assert (mean, std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_torchvisions_training_and_test_set(name, tmp_path, monkeypatch):
    def torchvisions(root, train, download):
        assert (root, download) == (tmp_path, True)
        images = np.full((2, 32, 32, 3), 1 if train else 2, dtype=np.uint8)
        return SimpleNamespace(data=images, targets=[1, 0], classes=["ant", "bee"])

    original = getattr(torchvision.datasets, name)
    torchvisions.filename, torchvisions.url = original.filename, original.url
    monkeypatch.setattr(torchvision.datasets, name, torchvisions)
    for train, pixel in ((True, 1), (False, 2)):
        found = DATASETS[name.lower()].load(tmp_path, train=train)
        assert (found.images.shape, found.images.unique().item()) == ((2, 32, 32, 3), pixel)
        assert (found.labels.tolist(), found.classes) == ([1, 0], ["ant", "bee"])


def test_images_are_cropped_and_but_for_digits_flipped():
    augments = {name: source.augment for name, source in DATASETS.items()}
    assert augments == {"cifar10": "crop+flip", "cifar100": "crop+flip", "folder": "crop+flip", "digits": "crop"}
    assert data.open_loaders(Choice("digits"), Batching(64)).train.augment == "crop"


def test_what_is_drawn_for_a_seed_is_pinned():
    """A run that is resumed, or tested by another version, must find the same images held out and in the same order."""
    source = random_images(100)
    assert data.hold_out(source, 4)[1].labels.tolist() == [4, 9, 3, 0]
    assert data.subset_indices(100, 4).tolist() == [45, 15, 90, 32]
    loader = SmallImageLoader(source, 16, UNIT, augment="crop+flip", seed=1)
    assert loader.order(1)[:4].tolist() == [46, 15, 47, 85]
    images, labels = next(loader.batches(1))
    assert (labels[:4].tolist(), int(images[:4].double().sum())) == ([6, 5, 7, 5], 1345791)
    digits = DATASETS["digits"].load(Path(), train=False)
    assert digits.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]


def test_a_class_folder_is_read_as_it_is(image_folder, tmp_path):
    image_folder(tmp_path, train=4, test=3)
    images = data.load_folder(tmp_path, train=True)
    assert images.classes == ["ant", "bee"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(images.images[5], np.asarray(Image.open(tmp_path / "train/bee/1.png")))


@pytest.mark.parametrize("size", [(64, 40), (20, 33), (100, 100), (3, 500)])
def test_images_of_any_size_become_32_by_32(image_folder, tmp_path, size):
    image_folder(tmp_path, size=size, val=4)
    assert data.load_folder(tmp_path, train=False).images.shape == (8, 32, 32, 3)


def test_an_image_that_cannot_be_decoded_is_named(image_folder, tmp_path):
    image_folder(tmp_path, train=4)
    whole = (tmp_path / "train/ant/0.png").read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        (tmp_path / "train/ant/0.png").write_bytes(content)
        with pytest.raises(InputError, match=r"train/ant/0\.png"):
            data.load_folder(tmp_path, train=True)


@pytest.mark.parametrize("augment", [None, "crop+flip"])
def test_the_processes_share_each_batch_and_draw_as_one(device, augment):
    source, settings = random_images(20), {"augment": augment, "device": device}
    whole = list(SmallImageLoader(source, 8, UNIT, **settings).batches(2))
    shares = [list(SmallImageLoader(source, 8, UNIT, world=World(rank, 3), **settings).batches(2)) for rank in range(3)]
    assert len(whole) == len(shares[0]) + (augment is not None) == 3  # 4 images are too few for three in training
    for batch, *parts in zip(whole, *shares, strict=False):
        for values, *of_processes in zip(batch, *parts, strict=True):
            assert torch.equal(torch.cat(of_processes), values)


def test_one_process_is_a_world_of_its_own():
    assert world() is ALONE
    assert (ALONE.is_main, ALONE.size, ALONE.shard(7), ALONE.all_max(3, True)) == (True, 1, slice(0, 7), [3, True])


# ---------------------------------------------------------------------------------------------- photographs


def seeded(folder, train=True):
    source = data.open_image_folder(folder)
    return source, data.SeededImages(source.samples, photo_transform(24, train))


def test_an_image_seeds_the_generator_of_the_cpu_alone(image_folder, tmp_path, monkeypatch):
    """`torch.manual_seed` reseeds every device: all gate samples would coincide there."""
    _, images = seeded(image_folder(tmp_path, train=1) / "train")

    def refuse(*args):
        raise AssertionError("a device was seeded")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    for device in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(device, name, refuse, raising=False)
    before = torch.get_rng_state()
    first, second, other = (images[seed, 0][0] for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_share_of_the_paths_is_one_array(image_folder, tmp_path):
    classes = ["été", "c d", *([os.fsdecode(b"b\xff")] if sys.platform == "linux" else [])]  # macOS has UTF-8 only
    root = image_folder(tmp_path / "photos", classes=classes, train=2)
    source, images = seeded(root / "train", train=False)
    for values in (images.paths, images.labels):
        assert isinstance(values, np.ndarray)
        assert not values.dtype.hasobject
    for index, (path, label) in enumerate(source.samples):
        pixels, found = images[0, index]
        assert torch.equal(pixels, images.transform(read_image(path)))
        assert (type(found), found) == (int, label)


def test_workers_that_are_not_forked_can_be_given_their_work(image_folder, tmp_path):
    """As on macOS, and from Python 3.14 on: all of it is pickled."""
    _, images = seeded(image_folder(tmp_path, train=1) / "train")
    given = pickle.loads(pickle.dumps(images))
    assert torch.equal(given[5, 0][0], images[5, 0][0])
    for function in (data.collate, data.leave_signals_to_the_trainer):
        assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(("cores", "processes", "workers"), [(12, 1, 12), (12, 4, 3), (11, 4, 2), (2, 8, 1)])
def test_each_process_has_as_many_workers_as_its_share_of_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 99)
    assert data.default_workers() == train_img.make_parser().parse_args([]).workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert data.default_workers() == 99 // processes


# ---------------------------------------------------------------------------------------------- --split


def class_folders(root, **counts):
    """A folder per class with that number of images, each of one colour of its own."""
    for red, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (red, number, 0)).save(root / name / f"{number:02}.png")
    return root


def split_names(root, train, part=0.25):
    found = data.open_split(root, train, ("test", "val"), part)
    return [(path.rsplit("/", 1)[1], label) for path, label in found.samples]


def test_a_split_holds_out_the_same_part_of_each_class_every_time(tmp_path):
    root = class_folders(tmp_path, ant=20, bee=8, cow=2)
    train, test = (split_names(root, train) for train in (True, False))
    assert [sum(label == k for _, label in test) for k in range(3)] == [5, 2, 1]
    assert [sum(label == k for _, label in train) for k in range(3)] == [15, 6, 1]
    everything = [(path.rsplit("/", 1)[1], label) for path, label in data.open_image_folder(root).samples]
    assert sorted(train + test) == sorted(everything)
    assert (split_names(root, True), split_names(root, False)) == (train, test)
    assert train == [sample for sample in everything if sample in set(train)]  # in the folder's order
    assert test[:5] != [(f"{number:02}.png", 0) for number in range(5)]  # not just the first
    assert [name for name, label in test if label] == ["01.png", "06.png", "00.png"]  # pinned: runs depend on it


def test_an_image_that_is_added_moves_at_most_one_other(tmp_path):
    root = class_folders(tmp_path / "first", ant=20, bee=8)
    trained = set(split_names(root, True))
    shutil.move(root, tmp_path / "moved")
    root = tmp_path / "moved"
    assert set(split_names(root, True)) == trained
    for number in range(20, 40):
        shutil.copy(root / "ant" / "00.png", root / "ant" / f"{number}.png")
        before, trained = trained, set(split_names(root, True))
        assert len(before - trained) <= 1
        assert {sample for sample in trained ^ before if sample[1]} == set()  # the other class stays as it is


def test_a_test_keeps_to_the_split_of_the_training_or_to_that_of_other_images(image_folder, tmp_path):
    own = {"split": 0.25, "split_by": "names", "data": str(tmp_path / "mine")}
    other = image_folder(tmp_path / "other", train=1, test=1)
    (tmp_path / "mine" / "test").mkdir(parents=True)  # a class of this name
    for given, asked, root, split in (
        ((), 0.25, own["data"], 0.25),
        ((), 0.25, other, None),
        ("split", 0.25, own["data"], 0.25),
        ("split", 0.125, own["data"], 0.125),  # fewer of those that were held out
        ("split", 0.5, tmp_path / "more", 0.5),
        ("split", 0.5, other, 0.5),
    ):
        assert data.tested_split(asked, str(root), own, given, "FILE") == split
    assert data.tested_split(None, "data", {}, (), "FILE") is None
    with pytest.raises(InputError, match=r"--split 0.5: FILE was trained with --split 0.25, so some of these test"):
        data.tested_split(0.5, own["data"], own, ("split",), "FILE")


@pytest.mark.parametrize(("part", "held_out"), [(0.001, 1), (0.999, 9), (0.5, 5)])
def test_however_small_or_large_the_part_both_sides_get_images(tmp_path, part, held_out):
    root = class_folders(tmp_path, ant=10, bee=10)
    assert len(split_names(root, False, part)) == 2 * held_out
    assert len(split_names(root, True, part)) == 2 * (10 - held_out)


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_folder_that_is_split_already_cannot_be_split(image_folder, tmp_path, name):
    image_folder(tmp_path, **{name: 2})
    with pytest.raises(InputError, match="is split already: leave out --split"):
        data.load_folder(tmp_path, True, split=0.2)


def test_folders_that_are_not_split_are_told_how(tmp_path):
    class_folders(tmp_path, ant=4, bee=4)
    with pytest.raises(InputError, match=r"no folder train/ in .*add --split 0\.2"):
        data.load_folder(tmp_path, True)


def test_a_split_reaches_both_loaders(tmp_path):
    root = class_folders(tmp_path, ant=8, bee=8)
    choice = Choice(dataset="folder", data=str(root), split=0.25)
    loaders = data.open_loaders(choice, Batching(batch_size=4))
    assert (loaders.train.num_images, loaders.val.num_images) == (12, 4)
    assert loaders.val.labels.tolist() == [0, 0, 1, 1]
    tested = data.open_loaders(Choice(dataset="folder", data=str(root), split=0.25, test=True), Batching(4))
    assert tested.train is None
    assert torch.equal(tested.val.images, loaders.val.images)
    photographs = data.open_loaders(Choice(data=str(root), split=0.25, image_size=32), Batching(4))
    assert (photographs.train.num_images, photographs.val.num_images) == (12, 4)
    with pytest.raises(InputError, match="digits has a test set of its own"):
        data.open_loaders(Choice(dataset="digits", split=0.25), Batching(4))


# ---------------------------------------------------------------------------------------------- choosing images


def test_a_subset_does_not_depend_on_the_seed_of_the_run():
    chosen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chosen.append(data.open_loaders(Choice("digits", train_size=100), Batching(64, seed)).train)
    assert torch.equal(chosen[0].images, chosen[1].images)
    assert chosen[0].num_images == 100
    loaded = data.open_loaders(Choice("digits", train_size=100, val_size=50), Batching(64))
    assert (loaded.train.num_images, loaded.val.num_images) == (100, 50)
    assert data.open_loaders(Choice("digits", train_size=1437), Batching(64)).train.num_images == 1437
    with pytest.raises(InputError, match="--train-size 2000: there are only 1437 images"):
        data.open_loaders(Choice("digits", train_size=2000), Batching(64))


def test_a_test_on_a_subset_takes_always_the_same_images():
    tests = [data.open_loaders(Choice("digits", test=True, test_size=30), Batching(64, seed)).val for seed in (1, 2)]
    assert tests[0].num_images == 30
    assert torch.equal(tests[0].images, tests[1].images)


def test_thresholds_are_chosen_on_held_out_images_as_in_evaluation(monkeypatch, image_folder, tmp_path):
    def calibration(**choice):
        return data.open_loaders(Choice(**choice, test=True, calibrates=True), Batching(64)).calibration

    everything, some = DATASETS["digits"].load(Path(), train=True), calibration(dataset="digits", val_size=50)
    assert (some.num_images, some.training, some.augment) == (50, False, None)
    held_out = data.hold_out(everything, 50)[1]
    assert {image.numpy().tobytes() for image in some.images.cpu()} == {x.numpy().tobytes() for x in held_out.images}
    monkeypatch.setattr(data, "CALIBRATION", 30)
    assert calibration(dataset="digits", val_size=50).num_images == 30
    trained = {image.numpy().tobytes() for image in everything.images}
    assert {image.numpy().tobytes() for image in calibration(dataset="digits").images.cpu()} < trained
    image_folder(tmp_path, train=20, val=3)
    photographs = calibration(data=str(tmp_path), image_size=24)
    assert (photographs.num_images, photographs.training) == (30, False)
    assert all(path.startswith(str(tmp_path / "train")) for path in photographs.files)
    first, second = (torch.cat([images for images, _ in photographs.batches(epoch)]) for epoch in (1, 2))
    assert torch.equal(first, second)  # nothing is drawn at random


def test_a_test_on_a_subset_of_photographs_takes_always_the_same(image_folder, tmp_path):
    choice = Choice(data=str(image_folder(tmp_path, train=1, val=8)), image_size=24, test=True, test_size=5)
    first, second = (data.open_loaders(choice, Batching(4, seed)).val for seed in (1, 2))
    assert (first.num_images, first.files) == (5, second.files)


def test_a_test_is_on_the_test_images_though_training_held_out_others():
    own, whole = (
        data.open_loaders(Choice("digits", val_size=50, test=test, needs_training=test), Batching(64))
        for test in (True, False)
    )
    assert torch.equal(own.val.images, data.load_digits("", False).images)
    assert whole.val.num_images == 50
    assert torch.equal(own.train.images, whole.train.images)


def test_classes_of_training_and_test_images_that_differ_are_an_error(image_folder, tmp_path):
    image_folder(tmp_path, ("ant", "bee"), train=2)
    image_folder(tmp_path, ("ant", "cow"), val=2)
    for dataset in ("folder", data.PHOTOGRAPHS):
        with pytest.raises(InputError, match="differ from those trained on: bee, cow"):
            data.open_loaders(Choice(dataset, str(tmp_path), image_size=32), Batching(4))


def test_a_checkpoints_normalisation_and_classes_are_kept():
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "classes": list("0123456789")}
    for test in (True, False):
        loaders = data.open_loaders(Choice("digits", test=test, **own), Batching(64))
        assert loaders.normalisation == (own["mean"], own["std"])
    with pytest.raises(InputError, match="differ from those trained on: 0, x"):
        data.open_loaders(Choice("digits", test=True, classes=list("x123456789")), Batching(64))


def test_a_further_data_set_is_one_entry(monkeypatch):
    with pytest.raises(ValueError, match=r"augmentation 'flip': choose from crop, crop\+flip"):
        data.Source(random_images, "flip", None, 16)
    made = data.Source(lambda root, train: random_images(12 if train else 6, 16, 3), "crop", None, 16)
    monkeypatch.setitem(DATASETS, "stripes", made)
    loaders = data.open_loaders(Choice("stripes"), Batching(4))
    assert (loaders.train.size, loaders.train.num_images, len(loaders.val.classes)) == ((16, 16), 12, 3)
    assert next(loaders.train.batches(1))[0].shape == (4, 3, 16, 16)


# ---------------------------------------------------------------------------------------------- shares of photographs


@pytest.fixture
def photographs(image_folder, tmp_path):
    """`photographs(...)` -> a loader of 8 of them."""
    folder = image_folder(tmp_path, train=4) / "train"

    def load(batch_size=5, world=ALONE, seed=1, augment=True):
        source = data.open_image_folder(folder)
        return data.PhotoLoader(source, batch_size, augment=augment, size=24, seed=seed, workers=0, world=world)

    return load


def test_photographs_are_augmented_in_training_anew_in_each_epoch_and_run(photographs):
    def in_the_folders_order(loader, epoch):
        order = loader.order(epoch).argsort()
        return torch.cat([x for x, _ in loader.batches(epoch)])[order]

    drawn = [in_the_folders_order(photographs(seed=seed), epoch) for seed, epoch in ((1, 1), (1, 2), (2, 1))]
    drawn.append(in_the_folders_order(photographs(augment=False), 1))
    for k, one in enumerate(drawn):
        assert not any(torch.equal(one[i], other[i]) for other in drawn[:k] for i in range(8))
    assert torch.equal(drawn[3], in_the_folders_order(photographs(augment=False), 2))


def test_photographs_for_training_are_augmented_and_those_for_validation_are_not(image_folder, tmp_path):
    root = image_folder(tmp_path, train=2)
    shutil.copytree(root / "train", root / "val")
    loaders = data.open_loaders(Choice(data=str(root), image_size=24), Batching(4))
    assert not torch.equal(loaders.train.pixels(0), loaders.val.pixels(0))
    assert (loaders.train.training, loaders.val.training) == (True, False)


@pytest.mark.parametrize("augment", [True, False])
def test_the_processes_share_each_batch_of_photographs(photographs, augment):
    whole = list(photographs(6, augment=augment).batches(1))
    shares = [list(photographs(6, World(rank, 3), augment=augment).batches(1)) for rank in range(3)]
    assert [len(labels) for _, labels in shares[2]] == [2] if augment else [2, 0]
    for batch, *parts in zip(whole, *shares, strict=not augment):
        labels = [labels for _, labels in parts]
        assert torch.equal(torch.cat(labels), batch[1])
        assert torch.equal(torch.cat([images for images, _ in parts if len(images)]), batch[0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], "images must be uint8"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), [0, 1], "images must be uint8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0.0, 1.0], "labels must be int64"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [0], "labels must be int64"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [1, 2], "labels from 1 to 2 for 2 classes"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), [-1, 0], "labels from -1 to 0"),
    ],
)
def test_images_of_another_form_are_an_error(images, labels, message):
    with pytest.raises(ValueError, match=message):
        SmallImages(images, torch.tensor(labels), ["a", "b"])


def test_images_of_another_size_than_the_data_set_says_are_an_error(monkeypatch):
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], size=32))
    with pytest.raises(ValueError, match="digits has images of 8 x 8 pixels, but DATASETS says 32"):
        data.open_loaders(Choice(dataset="digits"), Batching(64))
