"""The error with other images' graphs: the same graphs as often, and worse where deciding by the image matters."""

import pytest
import torch
from PIL import Image
from steps import small_net, unsettle_norms

import aig
from aig.images import Preprocess
from benchmarks import shuffled


@pytest.fixture
def folder(tmp_path):
    """A model folder with three gates, and test images of its four classes."""
    model = small_net()
    unsettle_norms(model)
    model.classes, model.preprocess = list("abcd"), Preprocess(8, (0.5,) * 3, (0.3,) * 3, False)
    aig.save(model, tmp_path / "net")
    random = torch.Generator().manual_seed(0)
    for name in model.classes:
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(8):
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=random).numpy()
            Image.fromarray(pixels).save(tmp_path / "test" / name / f"{number}.png")
    return tmp_path


def test_own_graphs_give_the_networks_own_answers(folder, monkeypatch):
    monkeypatch.setattr(shuffled, "BATCH", 5)  # the last batch is not full
    model = aig.load(folder / "net")
    images, labels = shuffled.read_test_images(model, folder / "test")
    assert labels.tolist() == [label for label in range(4) for _ in range(8)]
    with torch.inference_mode():
        model.gate_mode = "expected"
        halves = [chances.sort().values[15:17] for chances in model(images)[1]]
        model.threshold = [half.mean().item() for half in halves]  # graphs differ, and no image is at a threshold
        model.gate_mode = "argmax"
        model.linear.bias -= model(images)[0].mean(0)  # and so do answers
        logits, gates = model(images)
        answers = logits.argmax(1)
        graphs, own, dealt = shuffled.errors(model, images, answers, draws=3)
    assert torch.equal(graphs, torch.stack(gates, 1) > 0)
    assert len(graphs.unique(dim=0)) > 1
    assert own == 0  # the labels are its answers
    assert min(dealt) > 0  # which the graphs of others change
    assert len(dealt) == 3


def test_what_does_not_depend_on_the_image_loses_nothing(folder):
    model = aig.load(folder / "net")
    model.threshold = [1e-6, 1 - 1e-6, 1e-6]  # the same graph for all
    images, labels = shuffled.read_test_images(model, folder / "test")
    with torch.inference_mode():
        graphs, own, dealt = shuffled.errors(model, images, labels, draws=2)
    assert graphs.unique(dim=0).tolist() == [[True, False, True]]
    assert dealt == [own, own]


def test_the_command_says_both_errors(folder, run):
    status, out, _ = run(shuffled.main, folder / "net", "--data", folder, "--draws", 2)
    assert status == 0
    assert "32 test images" in out
    assert "error with the graphs of other images" in out
    (folder / "test" / "a" / "0.png").write_text("no image")
    status, _, err = run(shuffled.main, folder / "net", "--data", folder)
    assert (status, len(err.splitlines())) == (2, 1)
    (folder / "test" / "d").rename(folder / "other")
    status, _, err = run(shuffled.main, folder / "net", "--data", folder)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "must have a folder with images for each of a, b, c, d" in err
