"""aig.analysis: its numbers are those of --test, its tests can fail, its figures can be drawn of anything."""

import csv
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import aig
import convnet_aig
import train
import train_img
from aig import distributed
from aig.analysis import figures, measures, parts, subjects
from aig.analysis.__main__ import SUMMARY, main
from aig.checkpoint import BEST, CHECKPOINT, load_checkpoint
from aig.console import InputError
from aig.data import SmallImageLoader, SmallImages, load_digits
from aig.images import Normaliser
from aig.networks import digest
from aig.runs import TEST, save_checkpoint
from convnet_aig import BasicBlock, ResNet_cifar

FIGURES = ("rates", "usage", "extremes", "curve", "robustness", "similarity")


def read_csv(path):
    """The rows of a CSV file as dicts."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A net trained on digits, its plain twin, and what --test says of the first in every gate mode."""
    root = tmp_path_factory.mktemp("runs")
    common = ["--dataset", "digits", "--depth", "14", "--batch-size", "64", "--epochs", "12", "--save", str(root)]
    train.main([*common, "--target", "0.6", "--expname", "aig"])
    train.main([*common, "--target", "1", "--expname", "plain", "--stop-after", "1"])
    for mode in convnet_aig.GATE_MODES:
        train.main(["--test", "--resume", str(root / "aig" / CHECKPOINT), "--gate-mode", mode])
    return root


@pytest.fixture(scope="session")
def analyzed(runs, tmp_path_factory):
    """The folder of an analysis of all parts, the plain net beside it."""
    out = tmp_path_factory.mktemp("analysis")
    main(["--resume", str(runs / "aig" / CHECKPOINT), "--out", str(out), "--compare", str(runs / "plain"),
                  "--permutations", "199", "--epsilons", "0", "4/255", "0.05", "--thresholds", "0.3", "0.7"])
    return out


@pytest.fixture(scope="module")
def photographs(image_folder, tmp_path_factory):
    """An ImageNet-layout folder of three classes."""
    where = tmp_path_factory.mktemp("photographs")
    return image_folder(where, classes=("ant", "bee", "cow"), size=(50, 40), suffix="jpg", train=4, val=4)


@pytest.fixture
def small():
    """An untrained net whose gates decide differently for different images."""
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (2, 2, 2), 5).double().eval()
    for block in model.blocks():
        nn.init.normal_(block.fc2.weight, 0, 2)
        nn.init.zeros_(block.fc2.bias)
    return model


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("file", ["usage.csv", "images.csv", "extremes.png", "curve.pdf"])
def test_no_file_of_another_analysis_is_replaced_unless_asked(run, runs, tmp_path, file):
    (tmp_path / file).write_text("mine")
    status, _, err = run(main, "--resume", runs / "aig", "--out", tmp_path, "--only", "usage", "curve")
    assert (status, f"already holds {file}: choose another --out, or add --overwrite" in err) == (2, True)
    assert (tmp_path / file).read_text() == "mine"


def test_runs_on_other_images_are_not_compared(monkeypatch):
    subject, other = (SimpleNamespace(path=name, name=name, loader=SimpleNamespace(labels=torch.tensor(labels)))
                      for name, labels in (("a", [0, 1]), ("b", [1, 0])))
    monkeypatch.setattr(subjects, "open_subject", lambda flags: other)
    with pytest.raises(InputError, match="b is tested on other images than a: give the data of both"):
        list(subjects.with_others(subject, [None]))


def test_every_number_is_that_of_test(runs, analyzed):
    tested = json.loads((runs / "aig" / TEST).read_text())
    summary = json.loads((analyzed / SUMMARY).read_text())
    for part in ("rates", "usage"):
        for name in ("images", "top1", "execution_rate", "macs_mean", "macs_dense", "macs_fraction"):
            assert summary[part][name] == pytest.approx(tested["argmax"][name], rel=1e-12), name
    assert summary["rates"]["gates"] == pytest.approx(tested["argmax"]["gates"], rel=1e-12)
    assert summary["usage"]["executed_blocks"] == tested["argmax"]["executed_blocks"]
    by_class = {row["class"]: float(row["mean"]) for row in read_csv(analyzed / "rates.csv")}
    assert by_class == pytest.approx(tested["argmax"]["classes"], rel=1e-12)
    macs = {row["class"]: float(row["macs_mean"]) for row in read_csv(analyzed / "usage.csv")}
    assert macs.pop("all") == pytest.approx(tested["argmax"]["macs_mean"], rel=1e-12)
    assert macs == pytest.approx(tested["argmax"]["macs_classes"], rel=1e-12)
    points = {row["mode"]: row for row in read_csv(analyzed / "curve.csv")
              if row["run"] == "aig" and row["threshold"] in ("0.5", "nan")}
    assert points.keys() == tested.keys()
    for mode, row in points.items():
        assert 100 - float(row["error"]) == pytest.approx(tested[mode]["top1"], rel=1e-12)
        for name in ("execution_rate", "macs_mean", "macs_fraction", "macs_paper"):
            assert float(row[name]) == pytest.approx(tested[mode][name], rel=1e-12), (mode, name)


def test_tables_agree_with_each_other(analyzed):
    images, summary = read_csv(analyzed / "images.csv"), json.loads((analyzed / SUMMARY).read_text())
    assert len(images) == 360
    hits = [row["class"] == row["predicted"] for row in images]
    assert 100 * np.mean(hits) == pytest.approx(summary["usage"]["top1"])
    assert all(row["graph"].count("#") == int(row["blocks"]) for row in images)
    rates = np.mean([[mark == "#" for mark in row["graph"]] for row in images], axis=0)
    assert rates.tolist() == pytest.approx(summary["rates"]["gates"])
    rows = read_csv(analyzed / "robustness.csv")
    robust = {(row["run"], float(row["epsilon"]), row["jpeg_quality"]): row for row in rows}
    assert len(robust) == 2 * 3 * 2
    assert float(robust["aig", 0, ""]["error"]) == pytest.approx(100 - summary["usage"]["top1"])
    assert float(robust["aig", 0, ""]["macs_mean"]) == pytest.approx(summary["usage"]["macs_mean"])


def test_all_parts_leave_figure_table_and_arrays(analyzed):
    expected = {SUMMARY, "images.csv"} | {f"{name}.{kind}" for name in FIGURES for kind in ("png", "npz")}
    expected |= {f"{name}.csv" for name in FIGURES if name != "extremes"}
    assert {path.name for path in analyzed.iterdir()} == expected
    for part in json.loads((analyzed / SUMMARY).read_text()).values():
        assert part["gate_mode"] == "argmax"
        assert part["versions"]["torch"] == torch.__version__


def test_a_part_of_the_images_is_the_same_part_in_test(runs, tmp_path, capsys):
    best, part = str(runs / "aig" / CHECKPOINT), ["--test-size", "50"]
    before = (runs / "aig" / TEST).read_bytes()
    train.main(["--test", "--resume", best, *part])
    printed = capsys.readouterr().out
    main(["--resume", best, "--out", str(tmp_path), "--only", "rates", *part])
    found = json.loads((tmp_path / SUMMARY).read_text())["rates"]
    assert found["images"] == 50
    assert f"{found['top1']:.2f} %" in printed
    assert f"{found['macs_mean'] / 1e6:.2f}" in printed
    assert (runs / "aig" / TEST).read_bytes() == before  # which is about all images


def test_tables_and_sheet_follow_from_the_graphs(runs, analyzed):
    images = read_csv(analyzed / "images.csv")
    opened = np.array([[mark == "#" for mark in row["graph"]] for row in images])
    macs, labels = np.array([float(row["macs"]) for row in images]), np.array([int(row["class"]) for row in images])
    right = np.array([row["class"] == row["predicted"] for row in images])
    cost = aig.count_macs(aig.load(runs / "aig" / CHECKPOINT), 8)
    assert macs == pytest.approx(cost.executed(torch.tensor(opened)).numpy())
    summary = json.loads((analyzed / SUMMARY).read_text())["usage"]
    found = [summary["macs_mean_right"], summary["macs_mean_wrong"]]
    assert found == pytest.approx([macs[right].mean(), macs[~right].mean()])
    for row in read_csv(analyzed / "usage.csv")[1:]:
        chosen = labels == int(row["class"])
        assert float(row["macs_0.05"]) == pytest.approx(np.quantile(macs[chosen], 0.05))
        assert int(row["images_with_6_blocks"]) == (opened[chosen].sum(1) == 6).sum()
    agreement = measures.similarity(opened, labels, 10, permutations=1, seed=0)["agreement"]
    for row in read_csv(analyzed / "similarity.csv"):
        for name in map(str, range(10)):
            assert float(row[name]) == pytest.approx(agreement[int(row["class"]), int(name)])
    with np.load(analyzed / "extremes.npz") as sheet:
        for name, numbers, executed, wrong in zip(*(sheet[key] for key in ("names", "numbers", "executed", "wrong")),
                                                  strict=True):
            assert set(labels[numbers]) == {int(name)}
            assert executed.tolist() == opened[numbers].sum(1).tolist()
            assert wrong.tolist() == ["" if right[n] else images[n]["predicted"] for n in numbers]
            assert macs[numbers[:4]].max() <= macs[labels == int(name)].max()
            assert macs[numbers[0]] == macs[labels == int(name)].min()
            assert macs[numbers[-1]] == macs[labels == int(name)].max()


def test_the_origin_of_the_numbers_is_kept(analyzed):
    curve = json.loads((analyzed / SUMMARY).read_text())["curve"]
    assert (curve["epoch"], curve["threshold"], curve["seed"]) == (12, 0.5, 1)
    assert curve["compared"]["plain"]["epoch"] == 1
    assert curve["compared"]["plain"]["checkpoint"].endswith(BEST)
    plain = [row for row in read_csv(analyzed / "curve.csv") if row["run"] == "plain"]
    assert [(row["mode"], float(row["threshold"])) for row in plain] == [("argmax", 0.5)]


def test_thresholds_of_a_budget_are_a_mark_on_the_curve(run, runs, tmp_path):
    state = torch.load(runs / "aig" / BEST, weights_only=True)
    shutil.copytree(runs / "aig", tmp_path / "aig")
    torch.save({**state, "args": {**state["args"], "gate_mode": "sample"}}, tmp_path / "aig" / BEST)
    command = ["--resume", tmp_path / "aig", "--budget", 0.7, "--only", "curve", "--thresholds", 0.3]
    command += ["--compare", runs / "plain", "--out", tmp_path / "out"]
    status, _, err = run(main, *command)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "run --test --budget 0.7 first" in err
    path = tmp_path / "aig" / "test.json"
    tests, thresholds = json.loads(path.read_text()), [0.2, 0.4, 0.6, 0.8, 0.5, 0.3]
    best = load_checkpoint(tmp_path / "aig" / BEST)  # which epoch is the best differs between processors
    entry = {**tests["argmax"], "checkpoint": BEST, "threshold": thresholds}
    entry |= {"epoch": best["epoch"] - 1, "weights": digest(best["state_dict"])}
    path.write_text(json.dumps({**tests, "argmax@budget=0.7": entry}))
    assert run(main, *command)[0] == 0
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())["curve"]
    assert (summary["threshold"], summary["gate_mode"]) == (thresholds, "argmax")
    rows = [(row["run"], row["mode"], row["threshold"]) for row in read_csv(tmp_path / "out" / "curve.csv")]
    assert rows[:2] == [("aig", "argmax", "0.3"), ("aig", "argmax", "nan")]
    assert ("plain", "argmax", "0.5") in rows
    with np.load(tmp_path / "out" / "curve.npz") as arrays:
        assert arrays["usual"].tolist()[:2] == [False, True]


def test_thresholds_for_each_gate_are_not_asked_of_a_net_without_gates(runs, tmp_path):
    main(["--resume", str(runs / "aig"), "--compare", str(runs / "plain"), "--out", str(tmp_path / "out"),
          "--only", "curve", "--threshold", ",".join(["0.4"] * 6)])
    assert {row["run"] for row in read_csv(tmp_path / "out" / "curve.csv")} == {"aig", "plain"}


def test_a_run_validated_with_every_branch_is_analyzed_in_another_mode(run, runs, tmp_path):
    state = torch.load(runs / "aig" / CHECKPOINT, weights_only=True)
    save_checkpoint({**state, "args": {**state["args"], "gate_mode": "expected"}, "is_best": False}, tmp_path)
    call = ["--resume", tmp_path, "--out", tmp_path / "out", "--only", "rates"]
    status, _, err = run(main, *call)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "records gate mode expected, which runs every branch: add --gate-mode argmax" in err
    assert run(main, *call, "--gate-mode", "argmax")[0] == 0


def test_few_images_of_many_classes(run, image_folder, tmp_path):
    image_folder(tmp_path / "data", classes=[f"c{number}" for number in range(14)], train=2, test=2)
    train.main(["--dataset", "folder", "--data", str(tmp_path / "data"), "--depth", "8", "--epochs", "1",
                "--save", str(tmp_path), "--expname", "many"])
    call = ["--resume", str(tmp_path / "many" / CHECKPOINT), "--thresholds", "0.5", "--epsilons", "0"]
    status, out, err = run(main, *call, "--out", tmp_path / "one", "--test-size", "1")
    assert (status, err) == (0, "")
    assert "similarity is left out" in out
    assert read_csv(tmp_path / "one" / "usage.csv")[0]["images"] == "1"
    (image,) = read_csv(tmp_path / "one" / "images.csv")
    assert image["file"].startswith(str(tmp_path / "data" / "test" / image["class"]))
    status, _, err = run(main, *call, "--out", tmp_path / "all", "--permutations", "9")
    assert (status, err) == (0, "")


def test_a_checkpoint_of_the_original_is_analyzed_with_the_flags_it_does_not_record(runs, tmp_path, capsys):
    state = load_checkpoint(runs / "aig" / CHECKPOINT)["state_dict"]
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "old.pth.tar")
    call = ["--only", "rates", "--resume", str(tmp_path / "old.pth.tar"), "--out", str(tmp_path / "out")]
    main([*call, "--dataset", "digits"])
    found = json.loads((tmp_path / "out" / SUMMARY).read_text())["rates"]
    tested = json.loads((runs / "aig" / TEST).read_text())["argmax"]
    assert found["top1"] == pytest.approx(tested["top1"])
    assert found["epoch"] is None
    Image.new("L", (20, 30)).save(tmp_path / "black.png")
    main(["--resume", str(tmp_path / "old.pth.tar"), "--image", str(tmp_path / "black.png")])
    assert "black.png: " in capsys.readouterr().out


def test_figures_of_an_earlier_analysis_do_not_stay_beside_new_numbers(runs, tmp_path):
    call = ["--resume", str(runs / "aig"), "--out", str(tmp_path), "--only", "rates"]  # a run folder: its best model
    main(call)
    assert json.loads((tmp_path / SUMMARY).read_text())["rates"]["checkpoint"] == str(runs / "aig" / BEST)
    main([*call, "--overwrite", "--format", "svg"])
    assert {path.name for path in tmp_path.glob("rates.*")} == {"rates.csv", "rates.npz", "rates.svg"}


# ---------------------------------------------------------------------------------------------- similarity


def brute_force_agreement(opened, labels, num_classes):
    """(K, K) mean agreement over all ordered pairs of different images."""
    pairs = [[[] for _ in range(num_classes)] for _ in range(num_classes)]
    for i, j in itertools.permutations(range(len(labels)), 2):
        pairs[labels[i]][labels[j]].append(np.mean(opened[i] == opened[j]))
    return np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in pairs]), pairs


def test_agreement_is_that_of_all_pairs():
    random = np.random.default_rng(0)
    opened, labels = random.random((40, 5)) < 0.7, random.integers(0, 4, 40)
    labels[labels == 2] = 3
    labels[0] = 2  # a class with a single image has no pair
    expected, pairs = brute_force_agreement(opened, labels, 4)
    found = measures.similarity(opened, labels, 4, permutations=9, seed=0)
    np.testing.assert_allclose(found["agreement"], expected, rtol=1e-12)
    within = np.mean([each for k in range(4) for each in pairs[k][k]])
    between = np.mean([each for k, m in itertools.permutations(range(4), 2) for each in pairs[k][m]])
    assert [found["within"], found["between"]] == pytest.approx([within, between], rel=1e-12)


def test_graphs_that_follow_the_class_beat_the_baseline_and_others_do_not():
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(5), 40)
    chance = random.random((200, 8)) < 0.6
    found = measures.similarity(chance, labels, 5, permutations=199, seed=0)
    assert found["p"] > 0.01
    rates = random.random((5, 8))
    found = measures.similarity(random.random((200, 8)) < rates[labels], labels, 5, permutations=199, seed=0)
    assert found["p"] == 1 / 200


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_an_untrained_net_is_at_chance_and_a_trained_one_is_not(runs, analyzed, tmp_path, mode):
    state = torch.load(runs / "aig" / CHECKPOINT, weights_only=True)
    args = train.make_parser().parse_args(["--depth", "14"])
    fresh = train.make_model(args, 10).state_dict()
    state = {**state, "state_dict": fresh, "is_best": False}
    save_checkpoint(state, tmp_path)
    call = ["--only", "similarity", "--permutations", "199", "--gate-mode", mode]
    main(["--resume", str(tmp_path / CHECKPOINT), "--out", str(tmp_path / "out"), *call])
    found = json.loads((tmp_path / "out" / SUMMARY).read_text())["similarity"]
    assert found["p"] > 0.01
    assert abs(found["excess"]) <= 4 * found["shuffled_std"]
    main(["--resume", str(runs / "aig" / CHECKPOINT), "--out", str(tmp_path / "trained"), *call])
    found = json.loads((tmp_path / "trained" / SUMMARY).read_text())["similarity"]
    assert found["p"] == 1 / 200
    assert found["excess"] > found["shuffled_mean"] + 10 * found["shuffled_std"]


# ---------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("tau", [0.5, 1, 2])
def test_the_gradient_of_a_hard_gate_is_that_of_its_probability(small, tau):
    x = torch.randn(8, 16, 8, 8, dtype=torch.float64)
    block = next(small.blocks())
    logits = block.gate_logits(x).detach().requires_grad_()
    block.gate_logits = lambda x: logits
    z = block.decide(x, "argmax", 0.5, tau, None)
    assert torch.equal(z, (logits[:, 1] > logits[:, 0]).double())
    (gradient,) = torch.autograd.grad(z.sum(), logits)
    p = torch.softmax(logits.detach() / tau, 1)[:, 1]
    torch.testing.assert_close(gradient[:, 1], p * (1 - p) / tau)
    torch.testing.assert_close(gradient[:, 0], -p * (1 - p) / tau)


def test_asking_for_gradients_changes_no_output(small):
    x = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = small(x)
    with_gradient = small(x.requires_grad_())
    assert torch.equal(plain[0], with_gradient[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], with_gradient[1], strict=True))


@pytest.mark.parametrize("mode", ["argmax", "sample"])
@pytest.mark.parametrize("epsilon", [1 / 255, 8 / 255, 0.1])
def test_fgsm_is_the_librarys(small, mode, epsilon):
    torchattacks = pytest.importorskip("torchattacks", reason="pip install torchattacks")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    small.gate_mode = mode
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.float64)
    labels = torch.randint(0, 5, (12,))
    noise = convnet_aig.draw_noise(small.num_gates, 12, pixels)

    class Victim(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = small

        def forward(self, x):
            scale = torch.tensor(std, dtype=x.dtype).view(3, 1, 1)
            return small((x - torch.tensor(mean, dtype=x.dtype).view(3, 1, 1)) / scale, noise=noise)[0]

    theirs = torchattacks.FGSM(Victim().eval(), eps=epsilon)(pixels / 255, labels)
    normaliser = Normaliser(mean, std)
    sign = measures.gradient_sign(small, normaliser(pixels), labels, noise)
    ours = measures.fgsm(pixels, sign, epsilon) / 255
    assert (sign != 0).float().mean() > 0.9
    # where a gradient is zero but for rounding, its sign is chance
    assert ((theirs - ours).abs() > 1e-6).float().mean() < 1e-3


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_robustness_is_what_an_image_by_image_attack_finds(mode):
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 2, 1), 4, [0.5, 1, 0.5, 0.5]).eval()  # the second block has no gate
    for block in model.blocks():
        if block.gated:
            nn.init.normal_(block.fc2.weight, 0, 40)
            nn.init.zeros_(block.fc2.bias)
    model.gate_mode = mode
    noise_images = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8)
    source = SmallImages(noise_images, torch.arange(20) % 4, list("abcd"))
    loader = SmallImageLoader(source, 8, ([0.5] * 3, [0.3] * 3))
    normaliser = Normaliser([0.5] * 3, [0.3] * 3)
    cost, epsilons, quality = aig.count_macs(model, 8), [0, 0.3], 2
    found = measures.robustness(model, loader, epsilons, quality, seed=3)

    torch.manual_seed(3)
    expected = {name: np.zeros((2, 2)) for name in found}
    for images, labels in loader.batches():
        noise = convnet_aig.draw_noise(3, len(images), images)
        for n in range(len(images)):
            x = normaliser.pixels(images[n : n + 1])
            part = {"noise": noise[:, n : n + 1] if mode == "sample" else None}
            usual = torch.cat(model(normaliser(x), **part)[1]).detach()
            seen = normaliser(x).requires_grad_()
            torch.nn.functional.cross_entropy(model(seen, **part)[0], labels[n : n + 1]).backward()
            for column, epsilon in enumerate(epsilons):
                attacked = (x + 255 * epsilon * seen.grad.sign()).clamp(0, 255)
                for row, shown in enumerate((attacked, measures.jpeg(attacked, quality))):
                    logits, gates = model(normaliser(shown), **part)
                    z = torch.cat(gates).detach()
                    differing = (z != usual).sum().item()  # an ungated block never does
                    values = {"error": 100 * (logits.argmax() != labels[n]).item(), "execution_rate": z.mean().item(),
                              "macs_mean": cost.executed(z[None]).item(), "gates_changed": differing / 3,
                              "images_changed": float(differing > 0)}
                    for name, value in values.items():
                        expected[name][row, column] += value / 20
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
    assert found["gates_changed"][0, 1] > 0
    assert 0 < found["images_changed"][1, 1] < 1


def test_the_gradient_does_not_depend_on_how_images_are_grouped(small, monkeypatch):
    small.gate_mode = "sample"
    images, labels = torch.randn(7, 3, 16, 16, dtype=torch.float64), torch.arange(7) % 5
    noise = convnet_aig.draw_noise(small.num_gates, 7, images)
    whole = measures.gradient_sign(small, images, labels, noise)
    monkeypatch.setattr(measures, "GRADIENT_PIXELS", 2 * 16 * 16)
    assert torch.equal(measures.gradient_sign(small, images, labels, noise), whole)


def test_epsilon_0_changes_nothing(analyzed):
    table = read_csv(analyzed / "robustness.csv")
    rows = [row for row in table if row["run"] == "aig"]
    still = [row for row in rows if float(row["epsilon"]) == 0 and not row["jpeg_quality"]]
    assert [(float(row["gates_changed"]), float(row["images_changed"])) for row in still] == [(0, 0)]
    attacked = [float(row["error"]) for row in rows if not row["jpeg_quality"]]
    assert attacked[0] < attacked[1] < attacked[2]
    assert any(float(row["gates_changed"]) > 0 for row in rows)
    assert all(float(row["gates_changed"]) == 0 for row in table if row["run"] == "plain")


def test_pixels_are_recovered_exactly_and_stay_in_range():
    loader = SmallImageLoader(load_digits(None, train=False), 64, ([0.3] * 3, [0.35] * 3))
    normaliser = Normaliser([0.3] * 3, [0.35] * 3)
    images, _ = next(iter(loader.batches()))
    original = normaliser.pixels(images)
    assert torch.equal(original.to(torch.uint8).permute(0, 2, 3, 1), loader.images[:64])
    torch.testing.assert_close(normaliser(original), images)
    assert torch.equal(measures.fgsm(original, torch.ones_like(original), 0), original)
    attacked = measures.fgsm(original, torch.sign(torch.randn_like(original)), 0.3)
    assert attacked.min() >= 0
    assert attacked.max() <= 255
    assert (attacked - original).abs().max() == pytest.approx(0.3 * 255)
    worse, better = ((measures.jpeg(original, quality) - original).abs().mean() for quality in (10, 95))
    assert 0 < better < worse


# ---------------------------------------------------------------------------------------------- images, figures, files


def test_images_of_any_kind_are_shown_with_the_networks_own_graph(runs, tmp_path, capsys):
    random = np.random.default_rng(0)
    files = [tmp_path / "colour.png", tmp_path / "grey.png"]
    for file, shape in zip(files, [(30, 20, 3), (8, 8)], strict=True):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file)
    best = str(runs / "aig" / CHECKPOINT)
    main(["--resume", best, "--image", *map(str, files), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[::3][:2]] == [str(file) for file in files]
    model = aig.load(best)
    logits, gates = model(torch.stack([model.preprocess(Image.open(file)) for file in files]))
    with np.load(tmp_path / "out" / "graphs.npz") as arrays:
        assert np.array_equal(arrays["opened"], torch.stack(gates, 1).detach().numpy() > 0.5)
        assert arrays["pixels"].shape == (2, 8, 8, 3)
    marks = ["".join("#" if z > 0.5 else "." for z in graph) for graph in torch.stack(gates, 1).tolist()]
    assert ["".join(line.split("(")[0].split()).translate(str.maketrans("", "", "stage0123456789"))
            for line in printed[1::3][:2]] == marks
    best_class = logits.softmax(1)[0].max(0)
    assert f"{model.classes[best_class.indices]} {100 * best_class.values:.1f} %" in printed[0]
    assert (tmp_path / "out" / "graphs.png").stat().st_size > 1000


def test_an_imagenet_layout_folder_with_blocks_that_always_run(photographs, tmp_path, capsys):
    common = ["--image-size", "32", "--workers", "0", "--batch-size", "6", "--target-rates", "paper", "--target", "0.4"]
    common += ["--epochs", "1", "--lr", "1e-3", "--save", str(tmp_path), "--expname", "run"]
    train_img.main([str(photographs), *common])
    checkpoint = str(tmp_path / "run" / CHECKPOINT)
    out, image = tmp_path / "out", str(photographs / "val" / "bee" / "1.jpg")
    main(["--resume", checkpoint, "--out", str(out), "--gate-mode", "sample",
                  "--permutations", "19", "--epsilons", "0", "0.01", "--thresholds", "0.5", "--workers", "0"])
    capsys.readouterr()
    train_img.main(["--test", "--resume", checkpoint, "--gate-mode", "sample", "--gate-samples", "1"])
    tested = json.loads((tmp_path / "run" / TEST).read_text())["sample"]
    summary = json.loads((out / SUMMARY).read_text())
    for name in ("images", "top1", "execution_rate", "macs_mean"):
        assert summary["usage"][name] == pytest.approx(tested[name], rel=1e-12)
    files = [row["file"] for row in read_csv(out / "images.csv")]
    assert files == [str(photographs / "val" / name / f"{k}.jpg") for name in ("ant", "bee", "cow") for k in range(4)]
    with np.load(out / "extremes.npz") as sheet:
        seen = aig.load(checkpoint).preprocess.pixels(Image.open(files[sheet["numbers"][1, 0]]))
        assert np.array_equal(sheet["pixels"][1, 0], seen.permute(1, 2, 0).numpy())
    assert len(list(out.glob("*.png"))) == len(FIGURES)
    capsys.readouterr()
    main(["--resume", checkpoint, "--image", image])
    printed = capsys.readouterr().out
    assert "= always runs" in printed
    assert printed.splitlines()[1].count("=") == 1 + 6  # of the legend, and the blocks at rate 1


@pytest.mark.parametrize(("classes", "blocks", "gates"), [(1000, 50, True), (2, 3, False), (1, 16, True)])
def test_figures_of_any_number_of_classes_and_blocks(classes, blocks, gates):
    random = np.random.default_rng(0)
    names = np.array([f"class $ {index}_^" for index in range(classes)])
    rates, gated = random.random((classes, blocks)), np.array([gates, *[True] * (blocks - 1)])
    order, tree = measures.cluster(rates)
    assert sorted(order) == list(range(classes))
    executed, labels = random.integers(0, blocks + 1, 3000), np.arange(3000) % classes
    drawn = [
        figures.rates(rates, order, tree, names, np.array([1, blocks - 1]), gated),
        figures.usage(executed, 1e7 * (1.0 + executed), labels, names, np.array(blocks), np.array(1e7 * (blocks + 1))),
        figures.similarity(random.random((classes, classes)), order, names, np.array(0.1), np.zeros(9), np.array(0.1)),
    ]
    for figure in drawn:
        figure.savefig("/dev/null", format="png")


@pytest.mark.parametrize("classes", [10, 1000])
def test_classes_whose_gates_all_do_the_same(classes):
    rates = np.ones((classes, 16))
    order, tree = measures.cluster(rates)
    names = np.array([f"c{index}" for index in range(classes)])
    figures.rates(rates, order, tree, names, np.array([4, 12]), np.ones(16, bool)).savefig("/dev/null", format="png")


@pytest.mark.parametrize("classes", [10, 30, 100])
def test_labels_of_an_axis_never_overlap(classes):
    names, order = np.array([f"Quagga_{index:04}" for index in range(classes)]), np.arange(classes)
    rates, labels = np.random.default_rng(0).random((classes, 9)), np.arange(3 * classes) % classes
    drawn = [
        figures.similarity(np.eye(classes), order, names, np.array(0.027), np.array([-0.004, 0.004]), np.array(0.1)),
        figures.rates(rates, order, np.zeros((0, 4)), names, np.array([3, 3, 3]), np.ones(9, bool)),
        figures.usage(labels % 9, 1e7 * (labels % 9), labels, names, np.array(9), np.array(1e8)),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            boxes = [text.get_window_extent() for text in axis.get_ticklabels() if text.get_text()]
            places = sorted(getattr(box, f"interval{axis.axis_name}").tolist() for box in boxes)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


def test_runs_on_the_curve_are_told_apart_without_colours():
    runs, modes = np.array(["a", "a", "a", "b", "c"]), np.array(["argmax", "argmax", "all", "argmax", "argmax"])
    thresholds, usual = np.array([0.3, 0.5, np.nan, 0.5, 0.5]), np.array([False, True, True, True, True])
    figure = figures.curve(runs, modes, thresholds, usual, np.arange(5.0), 1e6 * np.arange(1.0, 6))
    assert {"b", "c"} <= {text.get_text() for text in figure.axes[0].texts}


def test_runs_are_told_apart_without_colours():
    error = np.arange(12.0).reshape(3, 2, 2)
    names, epsilons = np.array(["a", "b", "c"]), np.array([0, 0.1])
    figure = figures.robustness(names, epsilons, error, error / 12, error / 12, np.array(75))
    lines = figure.axes[0].get_lines()
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines) == 6


def test_the_contact_sheet_shows_the_cheapest_and_the_most_expensive():
    costs, labels = np.array([5, 1, 4, 2, 3, 9, 0, 7] * 3), np.repeat([0, 1], [20, 4])
    found = {"macs": costs, "executed": costs, "labels": labels, "classes": np.array(["a", "b"]), "right": costs > 0}
    pixels = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1).expand(24, 8, 8, 3)
    loader = SmallImageLoader(SmallImages(pixels, torch.tensor(labels), ["a", "b"]), 24, ([0.5] * 3, [0.5] * 3))
    sheet = parts.extremes({**found, "guesses": np.array(["c"] * 24)}, loader)
    assert sheet["numbers"].tolist() == sheet["pixels"][..., 0, 0, 0].tolist() == [[6, 14, 5, 13], [22, 20, 23, 21]]
    assert sheet["wrong"].tolist() == [["c", "c", "", ""], ["c", "", "", ""]]  # an image of no cost is wrong here


# ---------------------------------------------------------------------------------------------- bad input


def test_results_are_never_silently_replaced(run, runs, analyzed, contents):
    before, call = contents(analyzed), ["--resume", runs / "aig" / CHECKPOINT, "--out", analyzed]
    status, _, err = run(main, *call, "--only", "usage")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--overwrite" in err
    assert contents(analyzed) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "AIG"], "--out"),
        (["--out", "OUT"], "--resume"),
        (["--out", "OUT", "--resume", "missing.pth.tar"], "no checkpoint at"),
        (["--out", "OUT", "--resume", "AIG", "--gate-mode", "all"], "invalid choice"),
        (["--out", "OUT", "--resume", "AIG", "--epsilons", "4/0"], "is not a Fraction"),
        (["--out", "OUT", "--resume", "AIG", "--epsilons", "2"], "at most 1"),
        (["--out", "OUT", "--resume", "AIG", "--thresholds", "1"], "below 1"),
        (["--out", "OUT", "--resume", "AIG", "--only", "poetry"], "invalid choice"),
        (["--out", "OUT", "--resume", "AIG", "--permutations", "0"], "at least 1"),
        (["--out", "OUT", "--resume", "AIG", "--no-such-flag"], "unrecognized"),
        (["--out", "OUT", "--resume", "AIG", "--thresh", "0.9"], "unrecognized"),
        (["--out", "OUT", "--resume", "AIG", "--epsilons", "1e400"], "at most 1"),
        (["--out", "OUT", "--resume", "AIG", "--test-size", "5000"], "only 360"),
        (["--out", "OUT", "--resume", "AIG", "--compare", "nowhere"], "nowhere"),
        (["--out", "OUT", "--resume", "PLAIN"], "without gates"),
        (["--out", "OUT", "--resume", "AIG", "--budget", "0.7", "--threshold", "0.3"], "thresholds of its own"),
        (["--out", "OUT", "--resume", "AIG", "--budget", "0.7", "--gate-mode", "sample"], "for gate mode argmax"),
        (["--out", "FILE", "--resume", "AIG"], "File exists"),
        (["--resume", "AIG", "--image", "FILE"], "cannot read the image"),
        (["--resume", "AIG", "--image", "nowhere.png"], "no such file"),
    ],
)
def test_bad_input_gets_one_line(run, runs, tmp_path, flags, message):
    (tmp_path / "file").write_text("text")
    places = {"OUT": tmp_path / "out", "AIG": runs / "aig" / CHECKPOINT, "FILE": tmp_path / "file",
              "PLAIN": runs / "plain" / CHECKPOINT}
    status, _, err = run(main, *(places.get(flag, flag) for flag in flags))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("batch_size", -1, []),
        ("seed", "x", []),
        ("data", ["a"], []),
        ("threshold", float("nan"), ["--threshold", "0.5"]),
        ("dataset", "mnist", ["--dataset", "digits"]),
    ],
)
def test_what_a_checkpoint_records_is_checked_as_if_typed(run, runs, tmp_path, name, value, flag):
    state = torch.load(runs / "aig" / CHECKPOINT, weights_only=True)
    save_checkpoint({**state, "args": {**state["args"], name: value}, "is_best": False}, tmp_path)
    call = ["--resume", tmp_path, "--out", tmp_path / "out", "--only", "rates"]
    status, _, err = run(main, *call)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert f"the {name.replace('_', '-')} it records is invalid" in err
    if flag:
        assert run(main, *call, *flag)[0] == 0


def test_images_of_another_number_of_classes_are_refused(run, runs, image_folder, tmp_path):
    state = load_checkpoint(runs / "aig" / CHECKPOINT)["state_dict"]
    torch.save({"state_dict": state}, tmp_path / "old.pth.tar")
    image_folder(tmp_path / "data", train=1, test=1)
    call = ["--resume", tmp_path / "old.pth.tar", "--out", tmp_path / "out", "--data", tmp_path / "data"]
    status, _, err = run(main, *call, "--dataset", "folder")
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "10 classes" in err


def test_several_processes_are_refused(run, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2))
    with pytest.raises(InputError, match="one process"):
        main(["--resume", str(runs / "aig"), "--out", str(tmp_path)])


def test_runs_on_other_classes_cannot_be_compared(run, runs, tmp_path):
    state = torch.load(runs / "plain" / CHECKPOINT, weights_only=True)
    state["args"] = {**state["args"], "classes": [f"x{k}" for k in range(10)]}
    save_checkpoint({**state, "is_best": False}, tmp_path)
    call = ["--resume", runs / "aig" / CHECKPOINT, "--out", tmp_path / "out", "--compare", tmp_path]
    status, _, err = run(main, *call, "--only", "curve")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "classes" in err
