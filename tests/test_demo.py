"""What the demo page shows of an image, without the page; tests/robustness/test_demo_page.py has that."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import aig
from aig import demo
from aig.analysis.__main__ import main as analyse
from aig.console import InputError
from aig.inference import count_macs

DOG = demo.EXAMPLES / "dog.jpg"


@pytest.fixture(scope="module")
def released():
    model = aig.load(demo.RELEASED)
    return model, count_macs(model, 32)


def text(markup):
    return re.sub("<[^>]*>", " ", markup)


def test_the_numbers_are_those_of_the_analysis(released, capsys):
    model, cost = released
    analyse(["--resume", str(demo.RELEASED), "--image", *map(str, sorted(demo.EXAMPLES.glob("*.jpg")))])
    lines = iter(capsys.readouterr().out.splitlines())
    for path in sorted(demo.EXAMPLES.glob("*.jpg")):
        guesses, graph, use = (next(lines).strip() for _ in range(3))
        found = demo.draw(demo.look(model, cost, path, 0.5), cost, model.stages, {})
        assert use in text(found)
        for guess in guesses.split(": ")[1].split(", "):
            name, percent = guess.split(" ", 1)
            assert re.search(rf"{name} +{percent}", text(found))
        kinds = re.findall(r'class="block (\w+)"', found)
        marks = re.sub(r"stage \d| |\(.*", "", graph)
        assert "".join({"ran": "#", "skipped": "."}[kind] for kind in kinds) == marks


def test_each_block_is_drawn_in_its_stage_with_what_its_gate_said(released):
    model, cost = released
    seen = demo.look(model, cost, DOG, 0.5)
    stages = re.findall(r"<div>stage (\d)<div class=\"blocks\">(.*?)</div></div>", demo.draw_graph(seen, model.stages))
    assert [(stage, blocks.count("title=")) for stage, blocks in stages] == [("1", 3), ("2", 3), ("3", 3)]
    with torch.no_grad():
        image = model.preprocess(Image.open(DOG))[None]
        model.gate_mode = "expected"
        expected = [z.item() for z in model(image)[1]]
        model.gate_mode = "argmax"
    assert seen.p_open[0] == pytest.approx(expected[0])  # of later gates only if nothing before was skipped
    assert seen.opened == [p > 0.5 for p in seen.p_open]


def test_the_threshold_decides(released):
    model, cost = released
    many, few = (demo.look(model, cost, DOG, threshold) for threshold in (0.001, 0.999))
    assert sum(many.opened) > sum(few.opened)
    assert many.macs > few.macs
    for seen, threshold in ((many, 0.001), (few, 0.999)):
        assert seen.opened == [chance > threshold for chance in seen.p_open]


def test_a_block_without_a_gate_is_drawn_as_such():
    graph = demo.Graph({"a": 1.0}, [True, False, True], [np.nan, 0.2, 0.8], 100.0)
    markup = demo.draw_graph(graph, [1, 2])
    assert re.findall(r'class="block (\w+)"', markup) == ["always", "skipped", "ran"]
    assert "block 1: has no gate, always runs" in markup
    assert ">.20<" in markup


def test_costs_are_beside_those_of_the_class(released):
    model, cost = released
    seen = demo.look(model, cost, DOG, 0.5)
    with_class = demo.draw(seen, cost, model.stages, {"macs_classes": {"dog": 0.5 * cost.dense}, "threshold": 0.7})
    assert re.search(r"mean of test images of class dog at 0\.7 +50\.0 %", text(with_class))
    assert "mean" not in text(demo.draw(seen, cost, model.stages, {"macs_classes": {"cat": 1.0}}))


def test_names_of_classes_are_no_markup():
    graph = demo.Graph({"<b>x</b>": 1.0}, [True], [0.5], 1.0)
    assert "&lt;b&gt;x" in demo.bars([(*each, "own") for each in graph.probabilities.items()])


def test_what_is_no_image_is_one_line(released, tmp_path):
    model, cost = released
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"nothing")
    Image.new("L", (1, 10_000)).save(tmp_path / "narrow.png")
    for given, said in (
        (None, "Choose an image"),
        (str(path), "cannot read the image broken.jpg"),
        (str(tmp_path / "missing.jpg"), "missing.jpg: no such file"),
        (str(tmp_path / "narrow.png"), "narrow.png is 1 x 10000 pixels: too narrow"),
        (str(DOG), "Choose an image"),  # of no folder that the page may read
        (str(tmp_path / ".." / DOG.name), "Choose an image"),
    ):
        markup = demo.shown(model, cost, {}, [tmp_path.resolve()], given, 0.5)
        assert markup.startswith('<p class="note">')
        assert said in markup
        assert str(tmp_path) not in markup


def test_without_gradio_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = run(demo.main)
    assert (status, err.count("\n"), 'pip install gradio' in err) == (2, 1, True)
    with pytest.raises(InputError):
        demo.require_gradio()
