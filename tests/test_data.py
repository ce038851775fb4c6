"""The batched augmentation is torchvision's, and batches are a function of (seed, epoch, step)."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import data
import utils
from data import SmallImageLoader, SmallImages

UNIT = ([0.0, 0.0, 0.0], [1 / 255] * 3)  # a normalisation that gives back the pixels


def random_images(count, size=32, classes=10):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=random)
    return SmallImages(images, torch.arange(count) % classes, [f"class {k}" for k in range(classes)])


def test_crop_and_flip_are_torchvisions_on_the_same_offsets():
    source = random_images(100)
    loader = SmallImageLoader(source, 100, UNIT, augment="crop+flip")
    top, left = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    top, left = top.flatten(), left.flatten()  # every offset there is
    flip = torch.arange(81) % 2 == 0
    crops = loader.crop(torch.arange(81), top, left, flip)
    for i in range(81):
        image = TF.crop(TF.pad(Image.fromarray(source.images[i].numpy()), 4), int(top[i]), int(left[i]), 32, 32)
        expected = np.asarray(TF.hflip(image) if flip[i] else image)
        np.testing.assert_array_equal(crops[i].numpy(), expected)


def test_offsets_are_uniform_and_flips_even():
    loader = SmallImageLoader(random_images(2), 2, UNIT, augment="crop+flip")
    n = 90_000
    top, left, flip = loader.draw(n, torch.Generator().manual_seed(0))
    for offsets in (top, left):
        counts = offsets.bincount().double()
        assert len(counts) == 9
        assert ((counts / n - 1 / 9).abs() < 4 * (1 / 9 * 8 / 9 / n) ** 0.5).all()
    assert abs(flip.double().mean() - 0.5) < 4 * 0.5 / n**0.5
    assert abs(torch.corrcoef(torch.stack([top, left]).double())[0, 1]) < 4 / n**0.5


def test_padding_is_black_before_normalising():
    white = SmallImages(torch.full((200, 32, 32, 3), 255, dtype=torch.uint8), torch.zeros(200).long(), ["white"])
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    loader = SmallImageLoader(white, 200, (mean, std), augment="crop+flip", seed=1)
    images, _ = next(loader.batches(1))
    for channel in range(3):
        values = images[:, channel].unique()
        expected = torch.tensor([-mean[channel] / std[channel], (1 - mean[channel]) / std[channel]])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_evaluation_batches_are_the_images_in_order_normalised():
    source = random_images(10)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    images, labels = map(torch.cat, zip(*SmallImageLoader(source, 4, (mean, std)).batches(), strict=True))
    expected = torch.stack([TF.normalize(TF.to_tensor(image.numpy()), mean, std) for image in source.images])
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, source.labels)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    source = SmallImages(torch.zeros(200, 8, 8, 3, dtype=torch.uint8), torch.arange(200), [])
    loader = SmallImageLoader(source, 32, UNIT, augment="crop")
    first, second = ([y for _, labels in loader.batches(epoch) for y in labels.tolist()] for epoch in (1, 2))
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second


def test_batches_depend_on_seed_epoch_and_step_alone():
    source = random_images(100)

    def images(seed, epoch, start=0):
        return [x for x, _ in SmallImageLoader(source, 16, UNIT, augment="crop+flip", seed=seed).batches(epoch, start)]

    whole = images(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, images(1, 3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], images(1, 3, start=4), strict=True))
    assert not torch.equal(whole[0], images(2, 3)[0])
    assert not torch.equal(whole[0], images(1, 4)[0])


@pytest.mark.parametrize(("count", "dropped", "steps"), [(33, 1, 2), (34, 0, 3), (32, 0, 2)])
def test_a_last_training_batch_of_one_image_is_left_out(count, dropped, steps):
    loader = SmallImageLoader(random_images(count), 16, UNIT, augment="crop")
    sizes = [len(y) for _, y in loader.batches(1)]
    assert (loader.dropped, len(loader), len(sizes), sum(sizes)) == (dropped, steps, steps, count - dropped)
    assert min(sizes) > 1
    assert sum(len(y) for _, y in SmallImageLoader(random_images(count), 16, UNIT).batches()) == count


def test_digits_are_all_there_split_evenly_over_the_classes():
    train, test = (data.load_small_images("digits", "", train) for train in (True, False))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (8, 8, 3)
    assert train.images.max() == 255
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert ((share - 0.2).abs() < 0.01).all()


def test_held_out_images_are_disjoint_and_always_the_same():
    source = SmallImages(torch.zeros(50, 8, 8, 3, dtype=torch.uint8), torch.arange(50), [])
    train, held_out = data.hold_out(source, 10)
    assert sorted([*train.labels.tolist(), *held_out.labels.tolist()]) == list(range(50))
    assert torch.equal(held_out.labels, data.hold_out(source, 10)[1].labels)
    with pytest.raises(utils.InputError, match="only 50 training images"):
        data.hold_out(source, 49)


def test_mean_and_std_are_those_of_all_pixels():
    source = random_images(37, size=5)
    pixels = source.images.numpy().reshape(-1, 3) / 255
    mean, std = data.pixel_statistics("folder", source)
    np.testing.assert_allclose([mean, std], [pixels.mean(0), pixels.std(0)], rtol=1e-12)
    singles = [(image.permute(2, 0, 1) / 255.0, 0) for image in source.images]
    np.testing.assert_allclose(utils.get_mean_and_std(singles), [pixels.mean(0), pixels.std(0)], rtol=1e-6)


def test_cifar_keeps_the_originals_constants():
    mean, std = data.pixel_statistics("cifar10", random_images(4))
    assert (mean, std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


def test_a_class_folder_is_read_as_it_is(image_folder, tmp_path):
    image_folder(tmp_path, train=4, test=3)
    images = data.load_small_images("folder", tmp_path, train=True)
    assert images.classes == ["ant", "bee"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(images.images[5], np.asarray(Image.open(tmp_path / "train/bee/1.png")))


@pytest.mark.parametrize("size", [(64, 40), (20, 33), (100, 100), (3, 500)])
def test_images_of_any_size_become_32_by_32(image_folder, tmp_path, size):
    image_folder(tmp_path, size=size, val=4)
    assert data.load_small_images("folder", tmp_path, train=False).images.shape == (8, 32, 32, 3)


@pytest.mark.filterwarnings("error")
def test_every_mode_of_image_is_read_as_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    for mode, suffix in (("L", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("I;16", "png")):
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        rgb.convert("L").convert("I").convert("I;16").save(path) if mode == "I;16" else rgb.convert(mode).save(path)
        assert data.read_image(path).mode == "RGB"
    palette = rgb.convert("P")
    palette.save(tmp_path / "transparent.png", transparency=b"\x00\x80")
    assert data.read_image(tmp_path / "transparent.png").mode == "RGB"


def test_an_image_that_cannot_be_decoded_is_named(image_folder, tmp_path):
    image_folder(tmp_path, train=4)
    whole = (tmp_path / "train/ant/0.png").read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        (tmp_path / "train/ant/0.png").write_bytes(content)
        with pytest.raises(utils.InputError, match=r"train/ant/0\.png"):
            data.load_small_images("folder", tmp_path, train=True)
