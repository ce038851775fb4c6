"""The trained networks in results/model load and decide as they did when released, and their cards tell the truth."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import aig
from aig import inference
from aig.analysis.__main__ import main
from aig.checkpoint import CONFIG, WEIGHTS, load_checkpoint
from aig.folders import CARD
from aig.images import read_image
from aig.runs import TEST

FOLDER = Path(__file__).parent.parent / "results" / "model" / "aig20-cifar10-jpeg-floor"
RUNS = {  # of each folder, the run that it is from
    "aig20-cifar10-jpeg": "full-aig-t0.7",
    "aig20-cifar10-jpeg-budget0.6": "pays-budget0.6-s1",
    "aig20-cifar10-jpeg-floor": "pays-floor-s1",
    "resnet20-cifar10-jpeg-s1": "pays-teacher-s1",
    "resnet20-cifar10-jpeg-s2": "pays-teacher-s2",
}
AIRPLANE, PROBABILITY, GRAPH = 0, 0.9491, "011110101"  # for `picture`, when it was released


def picture():
    """A picture that is the same everywhere: a dark disc before a sky that darkens upwards."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    sky = torch.stack([100 + 2 * y, 150 + 2 * y, 220 + y])  # (3, H, W)
    disc = (x - 16) ** 2 + (2 * (y - 16)) ** 2 < 100
    return torch.where(disc, 60, sky).to(torch.uint8)


@pytest.fixture
def released():
    model = aig.load(FOLDER)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    return model, lambda pixels: (pixels / 255 - mean) / std


def test_the_network_decides_as_it_did_when_it_was_released(released):
    model, normalise = released
    logits, gates = model(normalise(picture())[None])
    probabilities = logits.softmax(1)[0]
    assert int(probabilities.argmax()) == AIRPLANE
    assert probabilities.max().item() == pytest.approx(PROBABILITY, abs=1e-3)
    assert "".join(str(int(z.item())) for z in gates) == GRAPH


def test_it_skips_what_it_closes(released, monkeypatch):
    model, normalise = released
    convolved, call = [], inference.Convolution.__call__

    def counted(self, x, *rest, **options):
        convolved.append(len(x))
        return call(self, x, *rest, **options)

    monkeypatch.setattr(inference.Convolution, "__call__", counted)
    random = torch.Generator().manual_seed(0)
    noise = 40 * torch.randn(32, 3, 32, 32, generator=random)
    images = normalise((picture() + noise * torch.linspace(0, 1, 32).view(-1, 1, 1, 1)).clamp(0, 255))
    with torch.inference_mode():
        logits, gates = model(images)
        fast, skipped = aig.accelerate(model)(images)
    opened = torch.stack(gates)
    assert sum(convolved) == 32 * 3 + 2 * opened.sum()  # stem, two shortcuts, and two convolutions of open branches
    assert torch.equal(opened, torch.stack(skipped))
    torch.testing.assert_close(logits, fast, atol=1e-3, rtol=1e-3)
    assert 0.5 < opened.mean() < 1
    assert (opened.mean(1) % 1 > 0).any()  # there are gates that tell images apart


def test_a_newcomer_sees_a_graph_in_one_command(tmp_path, capsys):
    path = tmp_path / "sky.png"
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(path)
    main(["--resume", str(FOLDER), "--image", str(path), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"{path}: airplane {100 * PROBABILITY:.1f} %" in printed
    assert "stage 1 .##  stage 2 ##.  stage 3 #.#" in printed
    assert read_image(str(tmp_path / "out" / "graphs.png")).size[0] > 500


@pytest.mark.parametrize(("folder", "run"), RUNS.items())
def test_the_card_gives_the_numbers_of_the_run(folder, run):
    folder, run = FOLDER.parent / folder, FOLDER.parent.parent / "runs" / run
    card, tested = (folder / CARD).read_text(), json.loads((run / TEST).read_text())
    for mode, result in tested.items():
        assert f"| `{mode}` | {result['top1']:.2f}" in card
        assert f"| {result['execution_rate']:.3f} | {result['macs_fraction']:.3f} |" in card
    assert load_checkpoint(folder / WEIGHTS)["epoch"] - 1 == tested["argmax"]["epoch"]
    assert (folder / WEIGHTS).stat().st_size < 2e6
    assert f"{sum(value.numel() for value in aig.load(folder).parameters()):,} parameters" in card
    recorded = json.loads((run / "args.json").read_text())
    assert recorded["commands"][0] in card
    flags = json.loads((folder / CONFIG).read_text())["flags"]
    assert flags == {name: recorded[name] for name in flags}


def test_every_network_of_the_repository_is_tested_here():
    assert RUNS.keys() == {path.parent.name for path in FOLDER.parent.glob(f"*/{WEIGHTS}")}
