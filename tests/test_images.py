"""From an image file to the tensor that a network takes, beside torchvision's own functions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from aig import images, runtime
from aig.console import InputError
from aig.data import IMAGENET_STATISTICS
from aig.images import Normaliser, Preprocess, photo_transform

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def picture(width=50, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.filterwarnings("error")
def test_every_mode_of_image_is_read_as_rgb(tmp_path):
    rgb = picture(9, 9)
    for mode, suffix in (("L", "png"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("I;16", "png")):
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        rgb.convert("L").convert("I").convert("I;16").save(path) if mode == "I;16" else rgb.convert(mode).save(path)
        assert images.read_image(path).mode == "RGB"
    palette = rgb.convert("P")
    palette.save(tmp_path / "transparent.png", transparency=b"\x00\x80")
    assert images.read_image(tmp_path / "transparent.png").mode == "RGB"


def test_16_bits_are_scaled_to_8_and_a_range_that_nobody_knows_is_refused(tmp_path):
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    wanted = Image.fromarray((deep // 256).astype(np.uint8)).convert("RGB")
    how = Preprocess(16, MEAN, STD, False)
    for image in (images.read_image(tmp_path / "deep.png"), runtime.rgb(Image.fromarray(deep.astype(">u2")))):
        assert np.array_equal(image, wanted)
    assert torch.equal(how(Image.fromarray(deep)), how(wanted))
    for dtype in (np.float32, np.int32):
        Image.fromarray(deep.astype(dtype)).save(tmp_path / "unknown.tiff")
        with pytest.raises(InputError, match=r"unknown\.tiff \(pixels of mode [FI] have no known range"):
            images.read_image(tmp_path / "unknown.tiff")


def test_an_error_of_a_decoder_names_the_image(monkeypatch):
    def broken(path):
        raise RuntimeError("Failed to decode image")  # as Pillow says of some AVIF files

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(InputError, match=r"the image a\.jpg \(Failed to decode image\): repair"):
        images.read_image("a.jpg")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match=r"a\.png: no such file"):
        images.read_image(path)
    picture().save(path)
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.png .*repair or remove it"):
            images.read_image(path)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (50, 40), (20, 33), (3, 500)])
def test_small_images_keep_their_whole_short_side(width, height):
    image = picture(width, height)
    expected = TF.center_crop(TF.resize(image, 32), 32) if (width, height) != (32, 32) else image
    pixels = images.centred(32, 32)(image)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(expected))


def test_photographs_are_augmented_by_torchvisions_transforms_for_imagenet():
    image, mine = picture(), photo_transform(24, train=True)
    usual = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(8):
        torch.manual_seed(seed)
        wanted = usual(image)
        torch.manual_seed(seed)
        assert torch.equal(mine(image), wanted)


def test_photographs_are_cropped_as_for_imagenet_and_in_proportion():
    image = picture(300, 260)
    usual = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(images.photo_transform(224, train=False)(image), usual(image))
    half = transforms.Compose([transforms.Resize(128), transforms.CenterCrop(112), transforms.PILToTensor()])
    assert torch.equal(images.photo_transform(112, train=False)(image), half(image))
    torch.manual_seed(0)
    first, second = (images.photo_transform(64, train=True)(image) for _ in range(2))
    assert first.shape == (3, 64, 64)
    assert not torch.equal(first, second)


def test_normalising_is_torchvisions_and_can_be_undone():
    pixels = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    normalise = Normaliser(MEAN, STD)
    found = normalise(pixels.float())
    torch.testing.assert_close(found, TF.normalize(pixels / 255, MEAN, STD), rtol=1e-5, atol=1e-5)
    rows = normalise.rows(pixels.permute(0, 2, 3, 1).contiguous())
    torch.testing.assert_close(rows, found, rtol=1e-5, atol=1e-5)
    assert rows.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalise.pixels(found), pixels.float())


@pytest.mark.parametrize("photographs", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (200, 90), (13, 40)])
def test_preprocessing_takes_an_image_of_any_size_and_mode(photographs, size):
    preprocess = Preprocess(48, *IMAGENET_STATISTICS, photographs)
    image = picture(*size)
    transform = images.photo_transform(48, train=False) if photographs else images.centred(48, 48)
    assert torch.equal(preprocess.pixels(image), transform(image))
    x = preprocess(image.convert("RGBA"))
    assert (x.shape, x.dtype) == ((3, 48, 48), torch.float32)
    torch.testing.assert_close(x, TF.normalize(transform(image) / 255, *IMAGENET_STATISTICS), rtol=1e-5, atol=1e-5)
    assert preprocess(image.convert("L")).shape == (3, 48, 48)
