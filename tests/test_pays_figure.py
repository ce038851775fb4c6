"""The figure of the long trainings: what is drawn of their results, and times of exported nets."""

import json

import numpy as np
import pytest
from PIL import Image

import aig
from aig.console import InputError
from benchmarks import pays_figure

DENSE = "argmax"


@pytest.fixture
def keep(tmp_path):
    """Writes what was tested of a run: `keep(arm, seed, mode=(MMACs, error))`."""

    def write(arm, seed, **tests):
        folder = tmp_path / "runs" / f"pays-{arm}-s{seed}"
        folder.mkdir(parents=True)
        gates = [0, 1, 1] if arm.startswith("majority") else [1, 1, 1]
        text = {
            mode: {"macs_mean": 1e6 * macs, "top1": 100 - error, "gates": gates}
            for mode, (macs, error) in tests.items()
        }
        (folder / "test.json").write_text(json.dumps(text))
        return folder

    return write


def test_a_point_is_the_mean_of_the_seeds_with_their_lowest_and_highest_error(tmp_path, keep):
    for seed, error in ((1, 15), (2, 16)):
        keep("budget0.6", seed, **{"argmax@budget=0.6": (24 + seed, error), "sample": (1, 1)})
        keep("budget0.75", seed, argmax=(30, 14))  # not yet tested at its budget
    curve = pays_figure.CURVES["gated, to a budget"]
    assert pays_figure.points(tmp_path / "runs", curve, None) == [(25.5, 15.5, 15, 16)]
    times = {"fast": {"budget0.6": {"argmax@budget=0.6": 2.5}}, "slow": {"budget0.6": {"argmax@budget=0.6": 3}}}
    assert pays_figure.points(tmp_path / "runs", curve, times) == [(2.5, 15.5, 15, 16)]
    assert pays_figure.points(tmp_path / "runs", curve, {}) == []


def test_seeds_that_run_different_blocks_are_a_point_each_and_have_no_time(tmp_path, keep):
    for seed, macs, error in ((1, 22, 13), (2, 17, 14)):
        keep("majority-floor", seed, argmax=(macs, error))
    curve = pays_figure.CURVES["always the same blocks (floor)"]
    assert pays_figure.points(tmp_path / "runs", curve, None) == [(17, 14, 14, 14), (22, 13, 13, 13)]
    assert pays_figure.points(tmp_path / "runs", curve, {"fast": {"majority-floor": {DENSE: 2.5}}}) == []


def test_the_figure_draws_what_there_is(tmp_path, keep, run):
    for arm, macs, error in (("control", 40, 14), ("resnet14", 30, 16), ("resnet14-taught", 30, 15)):
        keep(arm, 1, argmax=(macs, error))
    times = {"engine": {"control": {DENSE: 4.0}}}
    drawing = pays_figure.figure(tmp_path / "runs", times)
    left, right = drawing.axes
    drawn = [[tuple(xy) for xy in line.get_xydata()] for line in left.get_lines()]
    assert [(30, 15), (40, 14), (40, 14)] in drawn  # the better one of each size
    assert [(30, 16), (40, 14)] in drawn  # the static nets without a teacher
    assert [tuple(xy) for xy in right.get_lines()[0].get_xydata()] == [(4, 14)]
    status, out, _ = run(pays_figure.main, "--results", tmp_path, "--out", tmp_path / "figure.png")
    assert (status, out) == (0, f"written to {tmp_path / 'figure.png'}\n")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size[0] > 500


def test_an_error_far_above_the_others_is_named_and_does_not_flatten_them(tmp_path, keep):
    keep("control", 1, argmax=(40, 14))
    keep("rates", 1, **{"argmax@budget=0.75": (30, 15), "argmax@budget=0.6": (25, 19)})
    drawing = pays_figure.figure(tmp_path / "runs", {})
    assert drawing.axes[0].get_ylim()[1] < 20
    assert "Above the axis" not in drawing.get_suptitle()
    keep("rates", 2, **{"argmax@budget=0.45": (18, 54.2), "argmax@budget=0.5": (20, 27.4)})
    drawing = pays_figure.figure(tmp_path / "runs", {"engine": {"control": {DENSE: 4.0}}})
    assert [axes.get_ylim()[1] for axes in drawing.axes] == [20, 20]
    assert drawing.get_suptitle().endswith("\nAbove the axis: gated, to target rates, 54 % and 27 %.")


def test_bars_go_from_the_lowest_to_the_highest_seed(tmp_path, keep):
    for seed, error in ((1, 13), (2, 15)):
        keep("majority0.6", seed, argmax=(30, error))
    (axes,) = pays_figure.figure(tmp_path / "runs", {}).axes
    (bar,) = axes.collections[0].get_segments()
    assert bar.tolist() == [[30, 13], [30, 15]]


def test_it_does_not_do_nothing(run):
    status, _, err = run(pays_figure.main)
    assert (status, err) == (2, "script: error: nothing to do: add --measure or --out FILE\n")


def test_nothing_to_measure_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing to measure: 0 networks tested in"):
        pays_figure.measure(tmp_path, [], 1)


def test_seeds_that_run_different_blocks_are_not_measured_as_one(tmp_path, keep, capsys):
    for seed, gates in ((1, [1, 1, 1]), (2, [1, 1, 1, 0, 1, 1])):
        folder = keep("majority0.6", seed)
        (folder / "test.json").write_text(json.dumps({DENSE: {"gates": gates}}))
    assert list(pays_figure.networks(tmp_path / "runs")) == []
    assert capsys.readouterr().out == "majority0.6: not measured, as its seeds run different blocks\n"


@pytest.mark.engine
def test_what_was_tested_is_measured_in_each_engine(tmp_path, keep, monkeypatch, capsys):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    keep("resnet8", 2, argmax=(10, 20))  # a static net needs no weights
    keep("resnet14-taught", 1, argmax=(26, 13))  # and takes as long as without a teacher
    keep("budget0.6", 1, **{"argmax@budget=0.6": (25, 12)})  # released
    keep("scratch", 1, **{"argmax@budget=0.6": (25, 12)})  # its weights are lost
    keep("majority-floor", 1, argmax=(25, 12))  # closes all of a stage: it is no static net
    keep("random", 1, sample=(25, 12), argmax=(25, 12))  # an exported file does not sample
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "model").symlink_to(pays_figure.ROOT / "results" / "model")
    monkeypatch.setattr(pays_figure, "ROOT", tmp_path)
    images = [tmp_path / f"{index}.png" for index in range(2)]
    for path in images:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    taken = iter([0.4, 0.6, 0.1, 9, 9, 9, 0.5, 0.7, 0.2] * 2)  # seconds for both images
    monkeypatch.setattr(pays_figure, "seconds", lambda session, pixels: session(pixels[0]) and next(taken))
    times = pays_figure.measure(tmp_path / "runs", images, rounds=3)  # this folder has no weights, unlike a run's
    of_each = {"budget0.6": {"argmax@budget=0.6": 250}, "resnet8": {DENSE: 350}, "resnet14": {DENSE: 100}}
    assert times == dict.fromkeys(("onnxruntime", "openvino"), of_each)
    assert pays_figure.fastest(times, "resnet14-taught", DENSE) == 100
    assert capsys.readouterr().out == "majority-floor: not measured, as it is not a smaller ResNet\n"


def test_weights_of_a_run_are_found_where_it_was_tested_in_the_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(pays_figure, "ROOT", tmp_path)
    for seed, mode in ((1, "sample"), (2, "argmax@budget=0.6")):
        folder = tmp_path / "runs" / f"pays-floor-s{seed}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.pth.tar").touch()
        (folder / "test.json").write_text(json.dumps({mode: {}}))
    assert pays_figure.weights("floor", "argmax@budget=0.6") == folder / "checkpoint.pth.tar"
    assert pays_figure.weights("floor", "argmax@budget=0.45") is None


@pytest.mark.parametrize(("blocks", "mmacs"), [(3, 40.81), (2, 26.66), (1, 12.50)])
def test_static_nets_are_those_of_the_table(blocks, mmacs):
    assert aig.count_macs(pays_figure.static_net([blocks] * 3), 32).dense / 1e6 == pytest.approx(mmacs, abs=0.01)


@pytest.mark.parametrize(("rates", "stages"), [
    ([1, 0, 0, 1, 1, 0, 1, 1, 1], [1, 2, 3]),
    ([0, 0, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1]),
    ([1, 1, 1, 0, 1, 1, 1, 1, 1], [3, 0, 3]),  # the first block of a later stage makes the images smaller
    ([0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 3, 3]),
])
def test_what_always_runs_the_same_blocks_is_a_smaller_net(rates, stages):
    assert pays_figure.open_blocks(rates) == stages
