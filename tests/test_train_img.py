"""train_img.py: the paper's schedules, pretrained weights, and 1,000 classes of images of every kind."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import train
import train_img
import utils
from aig import budget, console, data, environment, runs
from aig.networks import read_pretrained
from convnet_aig import ARCHS, Bottleneck, ResNet_ImageNet, make_resnet
from train_img import PAPER_RATES, target_rates_of

DEEP = ["resnet101", "resnet152"]


# ---------------------------------------------------------------------------------------------- target rates


def test_the_schedules_are_the_papers():
    t = 0.4
    assert target_rates_of("paper", "resnet50", t) == [1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1]
    assert target_rates_of("paper", "resnet101", t) == [1] * 8 + [t] * 25
    assert target_rates_of("uniform", "resnet152", t) == [t] * 50
    assert target_rates_of("1, t,0.5" + ",1" * 13, "resnet50", t) == [1, t, 0.5] + [1] * 13


@pytest.mark.parametrize(
    ("schedule", "arch", "expected"),
    [
        ("uniform", "resnet50", [0.4] * 16),
        ("paper", "resnet50", [1, 1, 0.8, 1, 0.4, 0.4, 0.4, 1, 0.4, 0.4, 0.4, 0.4, 0.4, 1, 0.7, 1]),
        ("paper", "resnet101", [1] * 8 + [0.4] * 25),
        ("t, 1," * 7 + "0.5,t", "resnet50", [0.4, 1] * 7 + [0.5, 0.4]),
    ],
)
def test_a_schedule_gives_the_target_rate_of_each_block(schedule, arch, expected):
    assert target_rates_of(schedule, arch, 0.4) == expected


@pytest.mark.parametrize(
    ("schedule", "arch", "message"),
    [
        ("paper", "resnet152", "the paper gives none for resnet152: use uniform, or a list of 50"),
        ("t,t", "resnet50", "2 target rates for 16 blocks"),
        ("often", "resnet50", "use uniform, paper, or numbers and t"),
        ("2," * 15 + "t", "resnet50", r"2\.0 of block 1"),
    ],
)
def test_a_schedule_that_does_not_fit_is_an_error(schedule, arch, message):
    with pytest.raises(console.InputError, match=message):
        target_rates_of(schedule, arch, 0.4)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if hasattr(torchvision.models, arch)])
@pytest.mark.parametrize("schedule", ["uniform", "paper"])
def test_parameters_are_the_plain_resnet_and_the_gates_of_gated_blocks(arch, schedule):
    if schedule == "paper" and arch not in PAPER_RATES:
        with pytest.raises(console.InputError, match=f"gives none for {arch}"):
            target_rates_of(schedule, arch, 0.5)
        return
    rates = target_rates_of(schedule, arch, 0.5)
    with torch.device("meta"):
        model = make_resnet(arch, target_rates=rates)
        plain = getattr(torchvision.models, arch)()
    gated = [block for block, rate in zip(model.blocks(), rates, strict=True) if rate < 1]
    gates = sum(16 * block.conv1.in_channels + 16 + 2 * 16 + 2 * 16 + 2 for block in gated)
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in plain.parameters()) + gates


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("0.5,0.5", "2 target rates for 16 blocks"),
        (",".join(["1.5"] * 16), "must lie in [0, 1]"),
        ("steep", "uniform, paper, or numbers"),
        ("paper", "the paper gives none for resnet152"),
    ],
)
def test_bad_target_rates_get_one_line(run, tmp_path, rates, message):
    arch = "resnet152" if rates == "paper" else "resnet50"
    status, _, err = run(train_img.main, tmp_path, "--target-rates", rates, "--arch", arch, "--save", tmp_path / "runs")
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err


def test_defaults_are_the_originals():
    args = vars(train_img.make_parser().parse_args(["folder"]))
    expected = {"expname": "give_me_a_name", "epochs": 100, "batch_size": 256, "start_epoch": 1, "seed": 1}
    expected |= {"lr": 0.1, "lrfact": 1, "lrdecay": 30, "momentum": 0.9, "weight_decay": 1e-4, "target": 0.7}
    expected |= {"lossfact": 1, "device": "auto", "resume": "", "pretrained": "", "save": "", "test": False}
    expected |= {"visdom": False, "log_interval": 20, "print_freq": 50}
    assert {name: args[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------------- pretrained weights


@pytest.mark.parametrize("arch", ["resnet50", *(pytest.param(a, marks=pytest.mark.slow) for a in DEEP)])
def test_pretrained_weights_give_torchvisions_logits(tmp_path, arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=20).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # running statistics that are not 0 and 1
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    torch.save({"state_dict": theirs.state_dict()} if arch == "resnet101" else theirs.state_dict(), tmp_path / "file")
    ours = make_resnet(arch, num_classes=20).eval()
    report = read_pretrained(str(tmp_path / "file"), arch).load_into(ours)
    assert f"{len(theirs.state_dict())} tensors loaded" in report
    ours.gate_mode = "all"
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(x)[0], theirs.double()(x), rtol=1e-9, atol=0)


def test_the_flag_starts_a_run_from_a_plain_resnet(run, photos, tmp_path):
    theirs = torchvision.models.resnet50(num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "plain.pth")
    command = [photos, *TINY, "--epochs", 1, "--lr", 1e-30, "--wd", 0, "--workers", 0, "--save", tmp_path]
    status, out, _ = run(train_img.main, *command, "--pretrained", tmp_path / "plain.pth", "--expname", "tuned")
    assert status == 0
    assert "plain.pth: 320 tensors loaded" in out
    trained = torch.load(tmp_path / "tuned/checkpoint.pth.tar")["state_dict"]
    assert torch.equal(trained["layer3.5.conv2.weight"], theirs.state_dict()["layer3.5.conv2.weight"])
    assert torch.equal(trained["linear.weight"], theirs.state_dict()["fc.weight"])
    before = (tmp_path / "tuned/checkpoint.pth.tar").read_bytes()
    status, _, err = run(
        train_img.main, "--resume", tmp_path / "tuned/checkpoint.pth.tar", "--pretrained", tmp_path / "plain.pth"
    )
    assert (status, len(err.splitlines())) == (2, 1)
    assert (tmp_path / "tuned/checkpoint.pth.tar").read_bytes() == before


def test_gates_and_a_head_of_other_classes_stay_fresh(tmp_path):
    theirs = torchvision.models.resnet50(num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "file")
    model = ResNet_ImageNet(Bottleneck, ARCHS["resnet50"][1], 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = read_pretrained(str(tmp_path / "file")).load_into(model)
    assert "the head starts fresh, as the file has 3 classes" in report
    after = model.state_dict()
    assert torch.equal(after["layer1.0.fc1.weight"], before["layer1.0.fc1.weight"])
    assert torch.equal(after["linear.weight"], before["linear.weight"])
    assert torch.equal(after["layer4.0.shortcut.0.weight"], theirs.state_dict()["layer4.0.downsample.0.weight"])


@pytest.mark.parametrize("damage", ["left over", "missing", "not a dict", "no file"])
def test_pretrained_files_that_do_not_fit_are_an_error(tmp_path, damage):
    model = ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 2)
    plain = ResNet_ImageNet(Bottleneck, (1, 1, 1, 1), 2, target_rates=[1] * 4).state_dict()
    if damage == "left over":
        plain["layer9.weight"] = torch.zeros(1)
    elif damage == "missing":
        del plain["conv1.weight"]
    if damage != "no file":
        torch.save([1] if damage == "not a dict" else plain, tmp_path / "file")
    with pytest.raises(console.InputError, match="file"):
        read_pretrained(str(tmp_path / "file")).load_into(model)


def test_official_weights_that_cannot_be_downloaded_are_an_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.__class__, "get_state_dict", offline)
    with pytest.raises(console.InputError, match="cannot download"):
        read_pretrained("torchvision", "resnet50")


# ---------------------------------------------------------------------------------------------- photographs

MODES = (("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"))


def photo(path, size=(48, 40), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    """Three classes of four images, in every mode that occurs in ImageNet."""
    for split in ("train", "val"):
        for k in range(3):
            for i, (mode, suffix) in enumerate(MODES):
                photo(tmp_path / f"photos/{split}/class{k}/{i}.{suffix}", mode=mode, seed=4 * k + i)
    return tmp_path / "photos"


TINY = ["--image-size", 32, "--epochs", 2, "--batch-size", 6, "--target-rates", "paper", "--lr", 0.01]
TINY += ["--device", "cpu"]


def test_photographs_are_trained_and_tested_to_a_budget_with_a_teacher(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "TOLERATED", 0.3)  # of twelve images
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "plain.pth")
    start = ["--pretrained", tmp_path / "plain.pth", "--distill", tmp_path / "plain.pth", "--budget", 0.8]
    command = [photos, "--arch", "resnet18", "--image-size", 32, "--batch-size", 6, "--workers", 0, "--device", "cpu"]
    assert run(train_img.main, *command, *start, "--epochs", 2, "--save", tmp_path, "--expname", "run")[0] == 0
    args = runs.read_json(tmp_path / "run" / runs.ARGS)
    assert (args["lr"], args["lossfact"]) == (utils.FINE_TUNING_LR, 0)
    (tmp_path / "plain.pth").unlink()
    best = tmp_path / "run" / runs.BEST
    checkpoint = torch.load(best)
    torch.manual_seed(0)
    for name, value in checkpoint["state_dict"].items():  # gates that tell images apart
        if ".fc2." in name:
            torch.nn.init.normal_(value, 0, 20) if name.endswith("weight") else value.zero_()
    torch.save(checkpoint, best)
    status, out, err = run(train_img.main, "--test", "--resume", tmp_path / "run", "--budget", 0.7)
    assert (status, err) == (0, "")
    assert "chosen for the budget 0.7 on 12 training images, which execute 0." in out
    assert "argmax@budget=0.7" in runs.read_json(tmp_path / "run" / runs.TEST)


def test_a_run_on_photographs_of_every_mode_resumes_and_tests(run, photos, tmp_path):
    command = [photos, *TINY, "--workers", 0, "--save", tmp_path, "--warmup", 1, "--accumulate", 2]
    for name in ("straight", "resumed"):
        stop = ["--stop-after", 1] if name == "resumed" else []
        assert run(train_img.main, *command, "--expname", name, *stop)[0] == 0
    checkpoint = tmp_path / "resumed/checkpoint.pth.tar"
    assert run(train_img.main, "--resume", checkpoint, "--device", "cpu")[0] == 0
    states = [torch.load(tmp_path / name / "checkpoint.pth.tar")["state_dict"] for name in ("straight", "resumed")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    status, _, err = run(train_img.main, "--test", "--resume", tmp_path / "straight/model_best.pth.tar")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "straight/test.json").read_text())["argmax"]
    assert "top5" not in result  # of three classes it would say nothing
    assert list(result["classes"]) == ["class0", "class1", "class2"]
    fixed = [b for b, rate in enumerate(target_rates_of("paper", "resnet50", 0.7)) if rate == 1]
    assert [result["gates"][b] for b in fixed] == [1.0] * len(fixed)


def test_every_gate_parameter_gets_the_gate_learning_rate(run, photos, tmp_path):
    command = [photos, *TINY, "--epochs", 1, "--workers", 0, "--wd", 0, "--seed", 5, "--save", tmp_path]
    states = []
    for factor in (0, 1):
        assert run(train_img.main, *command, "--lrfact", factor, "--expname", factor)[0] == 0
        states.append(torch.load(tmp_path / str(factor) / "checkpoint.pth.tar")["state_dict"])
    torch.manual_seed(environment.derive_seed(5, "weights"))
    rates = target_rates_of("paper", "resnet50", 0.7)
    fresh = dict(ResNet_ImageNet(Bottleneck, ARCHS["resnet50"][1], 3, rates).named_parameters())
    for name, value in fresh.items():
        gate = name.split(".")[-2] in ("fc1", "fc1bn", "fc2")
        assert torch.equal(states[0][name], value) == gate, name
    assert not torch.equal(states[1]["layer1.2.fc1.weight"], fresh["layer1.2.fc1.weight"])


def test_the_best_model_of_another_image_size_is_chosen_anew(run, photos, tmp_path):
    command = [photos, *TINY, "--workers", 0, "--save", tmp_path, "--expname", "run", "--arch", "resnet18"]
    command[command.index("--target-rates") + 1] = "uniform"
    assert run(train_img.main, *command, "--stop-after", 1)[0] == 0
    status, out, _ = run(train_img.main, "--resume", tmp_path / "run", "--device", "cpu", "--image-size", 40)
    assert (status, "the validation images have changed: the best model is chosen anew" in out) == (0, True)


def test_the_learning_rate_falls_every_lrdecay_epochs(run, photos, tmp_path):
    command = [photos, *TINY, "--epochs", 3, "--lrdecay", 2, "--lr", 0.01, "--workers", 0, "--save", tmp_path]
    assert run(train_img.main, *command, "--expname", "decay")[0] == 0
    lrs = [record["lr"] for record in runs.read_records(tmp_path / "decay")]
    assert lrs == pytest.approx([0.01, 0.001, 0.001])


def test_photographs_are_normalised_with_imagenets_statistics(tmp_path):
    for value in (0, 255):
        path = tmp_path / f"train/class/{value}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), (value,) * 3).save(path)
    source = data.open_image_folder(tmp_path / "train")
    images, _ = next(data.PhotoLoader(source, 2, augment=False, size=32, workers=0).batches())
    mean, std = map(torch.tensor, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(images[:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]), rtol=1e-5, atol=1e-6)
    assert images.shape == (2, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_checkpoint_of_the_other_script_is_refused(run, photos, tmp_path):
    assert run(train_img.main, photos, *TINY, "--epochs", 1, "--workers", 0, "--save", tmp_path)[0] == 0
    checkpoint = tmp_path / "give_me_a_name/checkpoint.pth.tar"
    status, _, err = run(train.main, "--test", "--resume", checkpoint, "--device", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "not a checkpoint of this script" in err
    assert "use train_img.py" in err


def test_bad_input_found_while_training_leaves_an_earlier_run_as_it_was(run, photos, tmp_path, contents):
    command = [photos, *TINY, "--epochs", 1, "--workers", 0, "--save", tmp_path / "runs"]
    assert run(train_img.main, *command)[0] == 0
    before = contents(tmp_path / "runs")
    (photos / "val/class1/0.jpg").write_bytes(b"no image")
    assert run(train_img.main, *command, "--overwrite")[0] == 2
    assert run(train_img.main, *command, "--expname", "another")[0] == 2
    assert contents(tmp_path / "runs") == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["give_me_a_name"]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_a_function_of_seed_epoch_and_index(photos, workers):
    def images(epoch, start=0, workers=workers):
        source = data.open_image_folder(photos / "train")
        loader = data.PhotoLoader(source, 5, augment=True, size=32, seed=1, workers=workers)
        return [x for x, _ in loader.batches(epoch, start)]

    first = images(1)
    assert [len(x) for x in first] == [5, 5, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, images(1, workers=0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], images(1, start=1), strict=True))
    assert not torch.equal(first[0], images(2)[0])


def test_loading_leaves_the_noise_of_the_gates_alone(photos):
    loader = data.PhotoLoader(data.open_image_folder(photos / "train"), 4, augment=True, size=32, workers=0)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(loader.batches(1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["corrupt", "truncated"])
def test_a_file_that_cannot_be_decoded_ends_the_run_with_its_path(run, photos, tmp_path, workers, damage):
    path = photos / "val/class1/0.jpg"
    whole = path.read_bytes()
    path.write_bytes(b"no image" if damage == "corrupt" else whole[: len(whole) // 2])
    command = [photos, *TINY, "--workers", workers, "--save", tmp_path, "--expname", "broken"]
    status, _, err = run(train_img.main, *command)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "val/class1/0.jpg" in err


@pytest.mark.parametrize("damage", ["classes differ", "class without images", "no val", "no folder", "no argument"])
def test_a_folder_that_does_not_fit_is_an_error_before_the_first_step(run, photos, tmp_path, damage):
    if damage == "classes differ":
        (photos / "val/class2").rename(photos / "val/class9")
    elif damage == "class without images":
        (photos / "train/class9").mkdir()
        photo(photos / "val/class9/0.jpg")
    elif damage == "no val":
        (photos / "val").rename(photos / "validation")
    where = {"no folder": [tmp_path / "missing"], "no argument": []}.get(damage, [photos])
    status, _, err = run(train_img.main, *where, *TINY, "--workers", 0, "--save", tmp_path / "runs")
    assert (status, len(err.splitlines())) == (2, 1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_thousand_classes_from_training_to_test(run, tmp_path):
    for k in range(1000):
        mode, suffix = MODES[k % len(MODES)]
        path = tmp_path / f"photos/val/n{k:04}/0.{suffix}"
        photo(path, size=(32, 32), mode=mode, seed=k)
        (tmp_path / f"photos/train/n{k:04}").mkdir(parents=True)
        (tmp_path / f"photos/train/n{k:04}/0.{suffix}").hardlink_to(path)
    command = [tmp_path / "photos", *TINY, "--epochs", 1, "--batch-size", 100, "--workers", 0]
    assert run(train_img.main, *command, "--save", tmp_path, "--expname", "wide")[0] == 0
    folder = tmp_path / "wide"
    record = json.loads((folder / "metrics.jsonl").read_text())
    assert "gates_by_class" not in record["val"]
    assert len(record["val"]["classes"]) == 1000
    matrix = np.load(folder / "gates_by_class.npy")
    assert matrix.shape == (1000, 16)
    np.testing.assert_allclose(matrix.mean(0), record["val"]["gates"], atol=1e-4)
    status, out, _ = run(train_img.main, "--test", "--resume", folder / "checkpoint.pth.tar", "--gate-mode", "all")
    assert status == 0
    assert "(20 of 1000)" in out
    assert json.loads((folder / "test.json").read_text())["all"]["images"] == 1000

    path = tmp_path / "photos/val/n0100/0.jpg"
    whole = path.read_bytes()
    path.unlink()  # not the file that is linked into train/
    for content in (b"no image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        status, _, err = run(train_img.main, "--test", "--resume", folder / "checkpoint.pth.tar")
        assert (status, len(err.splitlines())) == (2, 1)
        assert "val/n0100/0.jpg" in err
