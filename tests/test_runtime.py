"""A session runs an exported file without torch, any number of images in their order, and says what does not fit."""

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import aig  # noqa: E402
from aig import runtime  # noqa: E402
from aig.images import Preprocess  # noqa: E402
from convnet_aig import BasicBlock, ResNet_cifar  # noqa: E402

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parent.parent
SIZE = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (2, 1, 1), 3)
    for block in model.blocks():
        torch.nn.init.normal_(block.fc1.weight)
        torch.nn.init.normal_(block.fc2.weight, 0, 2)
        block.fc2.bias.data.zero_()
    model.classes, model.preprocess = ["ant", "bee", "cat"], Preprocess(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), False)
    return model.eval()


@pytest.fixture(scope="module")
def file_of(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")

    def get(batch=1, uint8=False):
        path = folder / f"{batch}{uint8}.onnx"
        if not path.exists():
            aig.export_onnx(model, path, batch, uint8=uint8)
        return path

    return get


@pytest.fixture(params=runtime.ENGINES)
def engine(request):
    pytest.importorskip(request.param)
    return request.param


def wanted(model, x):
    with torch.no_grad():
        logits, gates = model(torch.from_numpy(x))
    return logits.numpy(), torch.stack(gates, 1).numpy()


def draw(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)


def assert_outputs(found, expected):
    (logits, gates), (expected_logits, expected_gates) = found, expected
    assert np.array_equal(gates, expected_gates)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, "any"])
@pytest.mark.parametrize("streams", [None, 1, 2, 3])
def test_images_come_back_in_their_order(streams, batch, engine, model, file_of):
    session, x = aig.Session(file_of(batch), engine, streams), draw(11)
    assert_outputs(session(x), wanted(model, x))
    for index in range(3):
        assert_outputs(session(x[index : index + 1]), wanted(model, x[index : index + 1]))
    logits, gates = session(x)
    assert (logits.shape, gates.shape, logits.dtype, gates.dtype) == ((11, 3), (11, 4), np.float32, np.float32)


def test_several_threads_may_use_a_session(engine, model, file_of):
    session = aig.Session(file_of(), engine, 2)
    batches = [draw(n, seed=n) for n in (1, 2, 3, 1, 5, 1)]
    with ThreadPoolExecutor(4) as pool:
        for found, x in zip(pool.map(session, batches), batches, strict=True):
            assert_outputs(found, wanted(model, x))


def test_what_a_session_returns_stays(engine, file_of):
    session = aig.Session(file_of(), engine)
    logits, gates = session(draw(1))
    before = logits.copy(), gates.copy()
    session(draw(1, seed=5))
    assert np.array_equal(logits, before[0])
    assert np.array_equal(gates, before[1])


def test_images_in_any_layout(engine, model, file_of):
    x = draw(2)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # the same, as channels-last
    assert_outputs(aig.Session(file_of(), engine)(last), wanted(model, x))
    assert_outputs(aig.Session(file_of(), engine)(torch.from_numpy(x)), wanted(model, x))


@pytest.mark.parametrize("batch", [1, "any"])
def test_pixels_of_any_size(batch, engine, model, file_of):
    session = aig.Session(file_of(batch, uint8=True), engine)
    random = np.random.default_rng(0)
    for shape in ((SIZE, SIZE), (SIZE, 13), (20, SIZE)):  # no resizing, which may leave a pixel one level off
        pixels = random.integers(0, 256, (3, *shape, 3), dtype=np.uint8)
        x = torch.stack([model.preprocess(Image.fromarray(picture)) for picture in pixels]).numpy()
        assert_outputs(session(pixels), wanted(model, x))
    assert session(random.integers(0, 256, (2, 31, 17, 3), dtype=np.uint8))[0].shape == (2, 3)


@pytest.mark.parametrize("photographs", [False, True])
def test_it_makes_the_networks_input_of_an_image(photographs, model, file_of, tmp_path, monkeypatch):
    preprocess = Preprocess(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), photographs)
    monkeypatch.setattr(model, "preprocess", preprocess)
    aig.export_onnx(model, tmp_path / "model.onnx")
    session = aig.Session(tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    for size in ((SIZE, SIZE), (31, 20), (20, 31), (7, 5), (60, 9)):
        image = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))
        for picture in (image, image.convert("L"), image.convert("RGBA")):
            found = session.preprocess(picture)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, preprocess(picture).numpy(), rtol=0, atol=1e-5)
    pixels = aig.Session(file_of(uint8=True)).preprocess(image.convert("L"))
    assert np.array_equal(pixels, np.asarray(image.convert("L").convert("RGB")))


def test_both_engines_read_what_the_file_says(file_of):
    pytest.importorskip("openvino")
    first, second = (aig.Session(file_of(), engine) for engine in runtime.ENGINES)
    assert first.metadata == second.metadata
    assert set(first.metadata) == set(runtime.METADATA)
    assert first.classes == ["ant", "bee", "cat"]
    assert first.macs["dense"] == sum((first.macs["stem"], *first.macs["branches"], *first.macs["shortcuts"],
                                       first.macs["head"]))


def test_it_needs_no_torch(file_of):
    pytest.importorskip("openvino")
    program = f"""
import sys
import numpy as np
from PIL import Image
import aig
for engine in ("onnxruntime", "openvino"):
    session = aig.Session({str(file_of())!r}, engine)
    x = session.preprocess(Image.new("RGB", (20, 30)))
    assert session(np.stack([x, x]))[0].shape == (2, 3)
assert not {{"torch", "torchvision", "convnet_aig", "onnx", "aig.console"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 9, 8), np.float32), r"images \(2, 3, 9, 8\) float32: this file takes \(N, 3, 8, 8\) float32"),
        (np.zeros((3, 8, 8), np.float32), r"images \(3, 8, 8\) float32: this file takes"),
        (np.zeros((1, 1, 8, 8), np.float32), r"images \(1, 1, 8, 8\) float32"),
        (np.zeros((1, 3, 8, 8)), "float64: this file takes .* float32"),
        (np.zeros((1, 8, 8, 3), np.uint8), "uint8: this file takes .* float32"),
        (np.zeros((0, 3, 8, 8), np.float32), "an empty batch: give at least one image"),
        ([], "an empty batch"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), "images hold numbers that are not finite"),
    ],
)
@pytest.mark.parametrize("batch", [1, "any"])
def test_images_that_do_not_fit(batch, images, message, engine, file_of):
    with pytest.raises(ValueError, match=message) as error:
        aig.Session(file_of(batch), engine)(images)
    assert "\n" not in str(error.value)


def test_pixels_that_do_not_fit(engine, file_of):
    session = aig.Session(file_of(uint8=True), engine)
    with pytest.raises(ValueError, match=r"this file takes \(N, H, W, 3\) uint8"):
        session(draw(1))
    for shape in ((0, 8, 8, 3), (1, 0, 8, 3)):
        with pytest.raises(ValueError, match="an empty batch"):
            session(np.zeros(shape, np.uint8))


def test_a_file_that_is_none(engine, file_of, tmp_path):
    path = tmp_path / "model.onnx"
    for options in ({}, {"streams": 2}):
        with pytest.raises(ValueError, match=r"no file at .*model\.onnx"):
            aig.Session(path, engine, **options)
    whole = file_of().read_bytes()
    for content in (b"", b"no ONNX at all", whole[: len(whole) // 2], bytes(reversed(whole))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.onnx (cannot be read by|was not written by)") as error:
            aig.Session(path, engine)
        assert "\n" not in str(error.value)


def test_a_foreign_onnx_file(engine, file_of, tmp_path):
    for said in ({}, {"classes": "[]"}, dict.fromkeys(runtime.METADATA, "no JSON")):
        foreign = onnx.load(file_of())
        del foreign.metadata_props[:]
        onnx.helper.set_model_props(foreign, said)
        onnx.save(foreign, tmp_path / "model.onnx")
        with pytest.raises(ValueError, match=r"model\.onnx was not written by this version of aig\.export_onnx"):
            aig.Session(tmp_path / "model.onnx", engine)


def test_a_missing_engine_is_named(engine, file_of, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(ImportError, match=rf"{engine} is not installed.*pip install {engine}") as error:
        aig.Session(file_of(), engine)
    assert "\n" not in str(error.value)


def test_an_engine_that_is_none_and_streams_that_are_none(file_of):
    with pytest.raises(ValueError, match="engine 'tensorrt': choose from onnxruntime, openvino"):
        aig.Session(file_of(), "tensorrt")
    for streams in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"streams {streams}: must be a whole number, at least 1"):
            aig.Session(file_of(), streams=streams)


def test_a_file_that_does_not_say_how_images_are_made(model, tmp_path, monkeypatch):
    monkeypatch.delattr(model, "preprocess")
    aig.export_onnx(model, tmp_path / "model.onnx", size=SIZE)
    with pytest.raises(ValueError, match="records no preprocessing"):
        aig.Session(tmp_path / "model.onnx").preprocess(Image.new("RGB", (9, 9)))


def test_the_core_of_openvino_is_one_and_stays_when_sessions_go(file_of):
    """Unloaded, it leaves the stack for signal handlers in freed memory: a later signal ends the process."""
    pytest.importorskip("openvino")
    aig.Session(file_of(), "openvino")
    core = runtime.openvino_core()
    gc.collect()
    aig.Session(file_of(), "openvino")
    assert runtime.openvino_core() is core
    assert runtime.openvino_core.cache_info().misses == 1
