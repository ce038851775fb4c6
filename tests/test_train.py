"""train.py as its users meet it: training, resuming, testing, and what it says to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from aig import checkpoint, console, runs
from convnet_aig import BasicBlock, ResNet_cifar

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 128, "--target", 0.7, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of six epochs."""
    save = tmp_path_factory.mktemp("runs")
    train.main([str(value) for value in [*TINY, "--epochs", 6, "--save", save, "--expname", "straight"]])
    return save / "straight"


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run to write into."""
    folder = tmp_path / "straight"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def without_time(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {"checkpoint.pth.tar", "model_best.pth.tar", "args.json", "metrics.jsonl", "log.txt"}
    args = json.loads((trained / "args.json").read_text())
    assert args["depth"] == 8
    assert args["classes"] == list("0123456789")
    assert len(args["block_rates"]) == 3
    assert args["versions"]["torch"] == torch.__version__
    assert "git_commit" in args


def test_metrics_hold_one_strict_record_per_epoch(trained):
    records = [strict_json(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["lr"] for record in records] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001, 0.001])
    for record in records:
        common = {"loss", "loss_classify", "loss_target", "top1", "execution_rate"}
        assert set(record["train"]) == common
        assert set(record["val"]) == common | {"gates", "classes", "executed_blocks", "gates_by_class"}
        val = record["val"]
        assert sum(val["executed_blocks"]) == 360
        assert len(val["gates_by_class"]) == 10
        assert sum(val["gates"]) / 3 == pytest.approx(val["execution_rate"])
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]
    assert records[-1]["val"]["top1"] > 50


def test_the_seed_decides_everything(run, trained, tmp_path):
    for seed, same in ((1, True), (2, False)):
        command = [*TINY, "--epochs", 6, "--stop-after", 1, "--seed", seed, "--save", tmp_path, "--expname", seed]
        assert run(train.main, *command)[0] == 0
        first = without_time(tmp_path / str(seed) / "metrics.jsonl")[0]
        assert (first == without_time(trained / "metrics.jsonl")[0]) == same


def test_the_best_model_is_kept(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    tops = [record["val"]["top1"] for record in records]
    best = checkpoint.load_checkpoint(trained / "model_best.pth.tar")
    assert best["best_prec1"] == max(tops)
    assert best["epoch"] == tops.index(max(tops)) + 2  # the next epoch to run
    assert not any(key.startswith("module.") for key in best["state_dict"])


def test_resuming_gives_the_weights_of_the_straight_run_bit_for_bit(run, trained, tmp_path):
    stopped = run(train.main, *TINY, "--epochs", 6, "--stop-after", 3, "--save", tmp_path, "--expname", "straight")
    assert stopped[0] == 0
    assert "stopped after epoch 3 of 6" in stopped[1]
    with (tmp_path / "straight/metrics.jsonl").open("a") as file:  # an epoch that the checkpoint does not know
        file.write('{"epoch": 4}\n{"epo')
    assert run(train.main, "--resume", tmp_path / "straight/checkpoint.pth.tar", "--device", "cpu")[0] == 0
    first, second = (torch.load(folder / "straight/checkpoint.pth.tar") for folder in (trained.parent, tmp_path))
    assert set(first) == set(second)
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    buffers = zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in buffers)
    assert without_time(trained / "metrics.jsonl") == without_time(tmp_path / "straight/metrics.jsonl")


def test_flags_not_given_come_from_the_checkpoint_and_given_ones_win(run, copied):
    checkpoint = copied / "checkpoint.pth.tar"
    flags = ["--epochs", 7, "--lr", 0.5, "--momentum", 0.5, "--device", "cpu"]
    assert run(train.main, "--resume", checkpoint, *flags)[0] == 0
    state = torch.load(checkpoint)
    assert state["epoch"] == 8
    assert state["args"]["target"] == 0.7
    assert state["args"]["batch_size"] == 128
    groups = state["optimizer"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.5, 0.5]
    assert groups[0]["lr"] == pytest.approx(0.5 * 0.01)  # milestones of 7 epochs are 3 and 5


def test_a_finished_run_says_so(run, copied, contents):
    before = contents(copied)
    status, out, _ = run(train.main, "--resume", copied / "checkpoint.pth.tar", "--device", "cpu")
    assert status == 0
    assert "epoch 6 is done already" in out
    assert {**contents(copied), "log.txt": before["log.txt"]} == before


@pytest.mark.parametrize("mode", ["argmax", "sample", "expected", "all"])
def test_test_prints_the_same_numbers_twice(run, copied, mode):
    command = ["--test", "--resume", copied / "model_best.pth.tar", "--gate-mode", mode, "--device", "cpu"]
    results = []
    for _ in range(2):
        status, out, err = run(train.main, *command)
        assert (status, err) == (0, "")
        results.append(strict_json((copied / "test.json").read_text())[mode])
        assert f"gate mode {mode}" in out
        assert f"{results[-1]['top1']:.2f} %" in out
    for result in results:
        assert result.pop("images_per_second") > 0
    assert results[0] == results[1]
    result = results[0]
    assert result["images"] == 360
    assert result["execution_rate"] == 1 or mode in ("argmax", "sample")
    assert ("top1_std" in result) == (mode == "sample")
    assert sum(result["executed_blocks"]) == pytest.approx(360)


def test_a_test_replaces_its_own_mode_only_and_equals_the_validation_of_that_epoch(run, copied):
    for mode in ("all", "argmax"):
        run(train.main, "--test", "--resume", copied / "checkpoint.pth.tar", "--gate-mode", mode, "--device", "cpu")
    results = json.loads((copied / "test.json").read_text())
    assert set(results) == {"all", "argmax"}
    validated = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])["val"]
    assert results["argmax"]["epoch"] == 6
    assert results["argmax"]["loss"] == pytest.approx(validated["loss"], rel=1e-5)  # folded BatchNorms round
    for name in ("top1", "gates", "classes", "executed_blocks"):
        assert results["argmax"][name] == validated[name]
    run(train.main, "--test", "--resume", copied / "checkpoint.pth.tar", "--dense", "--device", "cpu")
    dense = json.loads((copied / "test.json").read_text())["argmax"]
    assert dense["loss"] == validated["loss"]
    assert (dense["skipping"], results["argmax"]["skipping"], results["all"]["skipping"]) == (False, True, False)


def test_a_threshold_trades_computation_for_accuracy_at_test_time(run, copied):
    found = []
    for threshold in (0.2, 0.5, 0.9):
        command = ["--test", "--resume", copied / "checkpoint.pth.tar", "--device", "cpu", "--threshold", threshold]
        status, out, _ = run(train.main, *command)
        assert (status, f"at threshold {threshold}" in out, "closed branches skipped" in out) == (0, True, True)
        assert "in the paper's convention" in out
    tested = json.loads((copied / "test.json").read_text())
    assert tested.keys() == {"argmax", "argmax@0.2", "argmax@0.9"}  # each threshold has its own entry
    found = [tested[key] for key in ("argmax@0.2", "argmax", "argmax@0.9")]
    assert [each["threshold"] for each in found] == [0.2, 0.5, 0.9]
    assert found[0]["macs_mean"] > found[2]["macs_mean"]
    assert found[0]["execution_rate"] >= found[1]["execution_rate"] >= found[2]["execution_rate"]
    for threshold in (0, 1, "nan", "half"):
        status, _, err = run(train.main, *command[:-1], threshold)
        assert (status, err.count("\n")) == (2, 1)
    for wrong, message in (
        (["--dense"], "--dense is for --test"),
        (["--visdom-port", 8098], "add --visdom"),
        (["--test", "--resume", copied / "checkpoint.pth.tar", "--visdom"], "leave it out with --test"),
    ):
        status, _, err = run(train.main, *wrong, "--save", copied)
        assert (status, message in err) == (2, True)


def test_samples_differ_from_seed_to_seed(run, copied):
    rates = []
    for seed in (1, 2):
        command = ["--test", "--resume", copied / "checkpoint.pth.tar", "--gate-mode", "sample", "--gate-samples", 2]
        assert run(train.main, *command, "--seed", seed, "--device", "cpu")[0] == 0
        rates.append(json.loads((copied / "test.json").read_text())["sample"]["gates"])
    assert rates[0] != rates[1]


def test_an_existing_run_is_not_overwritten_unless_asked(run, copied, contents):
    before = contents(copied)
    again = [*TINY, "--epochs", 1, "--save", copied.parent, "--expname", "straight"]
    status, _, err = run(train.main, *again)
    assert status == 2
    assert "--overwrite" in err
    assert contents(copied) == before
    assert run(train.main, *again, "--overwrite")[0] == 0
    assert len((copied / "metrics.jsonl").read_text().splitlines()) == 1


def original_file(path, **extra):
    """A checkpoint as the original wrote it: `module.` keys, no counts of batches, the legacy format."""
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1))
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    content = {"epoch": 3, "state_dict": state, "best_prec1": 12.5, **extra}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return model


def test_files_of_the_original_load(run, tmp_path, contents):
    path = tmp_path / "original" / "model_best.pth.tar"
    path.parent.mkdir()
    original_file(path, best_prec1=99.9)
    command = ["--dataset", "digits", "--depth", 8, "--device", "cpu", "--resume", path]
    assert run(train.main, *command, "--test")[0] == 0
    before = contents(path.parent)
    command += ["--save", tmp_path, "--expname", "continued", "--epochs", 3, "--target", 1]
    status, out, _ = run(train.main, *command)  # at target 1 its gates are left out
    assert status == 0
    assert "no optimizer state" in out
    assert contents(path.parent) == before
    assert len(runs.read_records(tmp_path / "continued")) == 1
    assert (tmp_path / "continued" / runs.BEST).exists()  # the best of the original's folder does not count here


def test_prefixes_are_taken_off_and_weights_restored_exactly(tmp_path):
    model = original_file(tmp_path / "file")
    restored = ResNet_cifar(BasicBlock, (1, 1, 1))
    checkpoint.load_weights(restored, checkpoint.load_checkpoint(tmp_path / "file")["state_dict"], "file")
    for name, value in model.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])


def test_a_network_that_diverged_is_never_saved(run, tmp_path):
    command = ["--dataset", "digits", "--depth", 8, "--batch-size", 2000, "--lr", 1e30, "--device", "cpu"]
    status, _, err = run(train.main, *command, "--save", tmp_path / "runs")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "not finite" in err
    (log,) = (tmp_path / "runs" / "give_me_a_name_cifar").iterdir()
    assert "not finite" in log.read_text().splitlines()[-1]


def test_weight_decay_shrinks_and_start_epoch_skips(run, tmp_path):
    norms = []
    for decay in (0, 0.1):
        command = [*TINY, "--epochs", 2, "--start_epoch", 2, "--wd", decay, "--save", tmp_path, "--expname", decay]
        assert run(train.main, *command)[0] == 0
        assert [record["epoch"] for record in runs.read_records(tmp_path / str(decay))] == [2]
        norms.append(torch.load(tmp_path / str(decay) / "checkpoint.pth.tar")["state_dict"]["conv1.weight"].norm())
    assert norms[1] < 0.95 * norms[0]


def test_print_freq_is_the_number_of_steps_between_lines(run, tmp_path):
    for freq, lines in ((3, 4), (5, 2), (100, 0)):  # 12 steps
        command = [*TINY, "--epochs", 1, "--print-freq", freq, "--save", tmp_path, "--expname", freq]
        assert run(train.main, *command)[1].count("/12  loss") == lines


def test_log_interval_is_the_number_of_steps_between_refreshes_on_a_terminal(run, tmp_path, monkeypatch):
    shown = []

    class Terminal(console.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False})

        def set_postfix_str(self, text, refresh=True):
            shown.append((self.n, text))

    monkeypatch.setattr(console, "tqdm", Terminal)
    command = [*TINY, "--epochs", 1, "--log-interval", 5, "--save", tmp_path, "--expname", "bar"]
    status, out, _ = run(train.main, *command)
    assert status == 0
    assert "step 5" not in out
    assert [step for step, _ in shown] == [5, 10]
    assert all(word in shown[0][1] for word in ("loss", "top1", "execution rate"))


def test_warm_up_rises_to_the_learning_rate_and_is_recorded(run, tmp_path):
    command = [*TINY, "--epochs", 2, "--warmup", 4, "--lr", 0.2, "--train-size", 128, "--save", tmp_path]
    assert run(train.main, *command, "--expname", "warm")[0] == 0
    assert [record["lr"] for record in runs.read_records(tmp_path / "warm")] == pytest.approx([0.05, 0.01])
    assert json.loads((tmp_path / "warm/args.json").read_text())["warmup"] == 4


def test_val_size_holds_out_training_images(run, tmp_path):
    command = [*TINY, "--epochs", 1, "--val-size", 100, "--save", tmp_path, "--expname", "held-out"]
    status, out, _ = run(train.main, *command)
    assert status == 0
    assert "1,337 training and 100 validation images" in out
    assert "test set" not in out
    folder = tmp_path / "held-out"
    assert run(train.main, "--test", "--resume", folder / "model_best.pth.tar", "--device", "cpu")[0] == 0
    assert json.loads((folder / "test.json").read_text())["argmax"]["images"] == 360


def test_a_last_batch_of_one_image_is_announced_once(run, tmp_path):
    command = ["--dataset", "digits", "--depth", 8, "--batch-size", 359, "--epochs", 2]  # 1,437 = 4 x 359 + 1
    status, out, _ = run(train.main, *command, "--device", "cpu", "--save", tmp_path, "--expname", "odd")
    assert status == 0
    assert out.count("would have 1 image") == 1


def test_gate_learning_rate_factor_applies_to_fc2_alone(run, tmp_path):
    command = [*TINY, "--epochs", 1, "--lrfact", 0, "--weight-decay", 0, "--seed", 3]
    assert run(train.main, *command, "--save", tmp_path, "--expname", "frozen")[0] == 0
    state = torch.load(tmp_path / "frozen/checkpoint.pth.tar")["state_dict"]
    for block in ("layer1.0", "layer2.0", "layer3.0"):
        assert state[f"{block}.fc2.bias"].tolist() == pytest.approx([0.1, 2.0])
    assert state["layer1.0.fc1.bias"].abs().sum() > 0


def test_class_folders_train_and_keep_their_normalisation(run, image_folder, tmp_path):
    image_folder(tmp_path / "images", train=3, test=3)
    command = ["--dataset", "folder", "--data", tmp_path / "images", "--depth", 8, "--epochs", 1, "--batch-size", 4]
    assert run(train.main, *command, "--device", "cpu", "--save", tmp_path, "--expname", "folder")[0] == 0
    for path in (tmp_path / "images/train").rglob("*.png"):
        path.unlink()  # a test needs no training images
    status, _, err = run(train.main, "--test", "--resume", tmp_path / "folder/checkpoint.pth.tar", "--device", "cpu")
    assert (status, err) == (0, "")


# ---------------------------------------------------------------------------------------------- bad input

BAD_ARGUMENTS = {
    "unknown data set": ["--dataset", "mnist"],
    "unknown flag": ["--nonsense", "1"],
    "depth 21": ["--depth", "21"],
    "depth 2": ["--depth", "2"],
    "target 1.5": ["--target", "1.5"],
    "target nan": ["--target", "nan"],
    "negative lr": ["--lr", "-0.1"],
    "zero lr": ["--lr", "0"],
    "infinite lr": ["--lr", "inf"],
    "epochs 0": ["--epochs", "0"],
    "epochs 1.5": ["--epochs", "1.5"],
    "400 digits": ["--epochs", "9" * 400],
    "a newline": ["--expname", "a\nb/c"],
    "a name too long": ["--expname", "n" * 300],
    "start after the end": ["--start-epoch", "2"],
    "batch of one": ["--batch-size", "1"],
    "momentum 2": ["--momentum", "2"],
    "negative weight decay": ["--wd", "-1"],
    "negative lossfact": ["--lossfact", "-1"],
    "negative seed": ["--seed", "-1"],
    "milestone 0": ["--milestones", "0"],
    "too many held out": ["--val-size", "1436"],
    "no name": ["--expname", ""],
    "a path as name": ["--expname", "../up"],
    "unknown gate mode": ["--gate-mode", "hard"],
    "unknown device": ["--device", "tpu"],
    "print-freq 0": ["--print-freq", "0"],
    "test without resume": ["--test"],
    "two devices": ["--no-cuda", "--device", "cuda"],
    "missing checkpoint": ["--resume", "missing.pth.tar"],
    "missing folder": ["--dataset", "folder", "--data", "missing"],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_get_one_line_and_leave_no_trace(run, tmp_path, monkeypatch, contents, name):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(train.main, "--dataset", "digits", "--depth", 8, "--epochs", 1, *BAD_ARGUMENTS[name])
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("script: error: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_an_absent_gpu_is_an_error(run, tmp_path):
    status, _, err = run(train.main, *TINY, "--device", "cuda", "--save", tmp_path)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--device auto" in err


def test_the_shell_sees_one_line_and_status_2(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--depth", "21"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    message = "argument --depth: 21 must be 6 n + 2, such as 20, 32, 44, 56 or 110 (see --help)"
    assert done.stderr == f"train.py: error: {message}\n"


def test_help_lists_every_flag_of_the_original(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    flags = "expname lrfact lossfact target batch-size epochs start_epoch lr learning-rate momentum weight-decay wd"
    flags += " seed log-interval resume test visdom print-freq"
    assert {f"--{flag}" for flag in flags.split()} <= set(re.findall(r"--[\w-]+", out))


def test_defaults_are_the_originals():
    args = vars(train.make_parser().parse_args([]))
    expected = {"expname": "give_me_a_name_cifar", "epochs": 350, "batch_size": 256, "start_epoch": 1, "seed": 1}
    expected |= {"lr": 0.1, "lrfact": 1, "momentum": 0.9, "weight_decay": 5e-4, "target": 0.6, "lossfact": 2}
    expected |= {"resume": "", "test": False, "visdom": False, "log_interval": 20, "print_freq": 25}
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("damage", ["empty class", "no class", "unreadable image", "other classes", "no test split"])
def test_a_bad_image_folder_gets_one_line(run, image_folder, tmp_path, contents, damage):
    images = image_folder(tmp_path / "images", train=3, test=3)
    if damage == "empty class":
        (images / "train/cat").mkdir()
    elif damage == "no class":
        (images / "train").rename(tmp_path / "elsewhere")
        (images / "train").mkdir()
    elif damage == "unreadable image":
        (images / "train/bee/1.png").write_bytes(b"\x89PNG nothing more")
    elif damage == "other classes":
        (images / "test/bee").rename(images / "test/wasp")
    else:
        (images / "test").rename(images / "holdout")
    before = contents(tmp_path)
    command = ["--dataset", "folder", "--data", images, "--depth", 8, "--epochs", 1, "--save", tmp_path / "runs"]
    status, _, err = run(train.main, *command, "--device", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert {"unreadable image": "1.png", "empty class": "cat", "other classes": "wasp"}.get(damage, "images") in err
    assert contents(tmp_path) == before


def test_cifar_that_cannot_be_had_says_where_the_archive_goes(run, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    status, _, err = run(train.main, "--data", tmp_path / "data", "--save", tmp_path / "runs")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "cifar-10-python.tar.gz" in err
    assert str(tmp_path / "data") in err
    assert "--dataset digits" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "tensor", "list", "other network", "code", "shapes"])
def test_a_bad_checkpoint_gets_one_line_and_stays_as_it_is(run, copied, contents, damage, tmp_path):
    path = copied / "checkpoint.pth.tar"
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "list":
        torch.save({"state_dict": [1, 2]}, path)
    elif damage == "other network":
        torch.save({"state_dict": {"fc.weight": torch.zeros(3)}, "epoch": 1}, path)
    elif damage == "code":
        torch.save({"state_dict": {}, "code": Path(tmp_path)}, path)
    else:
        checkpoint = torch.load(path)
        checkpoint["state_dict"]["linear.weight"] = torch.zeros(10, 65)
        torch.save(checkpoint, path)
    before = contents(copied)
    for flags in (["--test"], ["--epochs", 9]):
        command = ["--dataset", "digits", "--depth", 8, "--device", "cpu", "--resume", path, "--save", tmp_path]
        status, _, err = run(train.main, *command, *flags)
        assert (status, len(err.splitlines())) == (2, 1)
        assert "checkpoint.pth.tar" in err
    assert contents(copied) == before


def test_a_checkpoint_of_another_depth_or_data_is_refused(run, copied, contents):
    before = contents(copied)
    for flags, message in (
        (["--depth", 14], "--depth 8"),
        (["--expname", "other"], "its own folder"),
        (["--save", "elsewhere"], "its own folder"),
        (["--target", 1], "put gates on other blocks"),
        (["--target", 1, "--test"], "put gates on other blocks"),
    ):
        status, _, err = run(train.main, "--resume", copied / "checkpoint.pth.tar", "--device", "cpu", *flags)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err
    assert contents(copied) == before


MALFORMED = {
    "best is a list": ("best_prec1", [1]),
    "best is nan": ("best_prec1", float("nan")),
    "epoch is text": ("epoch", "3"),
    "args are a list": ("args", [1]),
    "depth is text": ("args.depth", "eight"),
    "target out of range": ("args.target", 2.0),
    "batch of none": ("args.batch_size", 0),
    "classes are a number": ("args.classes", 5),
    "unknown data set": ("args.dataset", "mnist"),
    "mean is text": ("args.mean", "x"),
    "std is zero": ("args.std", [0, 0, 0]),
    "unknown gate mode": ("args.gate_mode", "foo"),
    "milestones are text": ("args.milestones", "abc"),
    "another script's": ("args", {"arch": "resnet50", "data": "photos"}),
    "numbers as keys": ("state_dict", {1: torch.zeros(2)}),
    "complex weights": ("state_dict", {"conv1.weight": torch.zeros(2, dtype=torch.complex64)}),
    "momentum of another shape": ("momentum", torch.zeros(3)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_values_in_a_checkpoint_get_one_line_and_leave_everything(run, copied, contents, name):
    path, (key, value) = copied / "checkpoint.pth.tar", MALFORMED[name]
    checkpoint = torch.load(path)
    if key == "momentum":
        checkpoint["optimizer"]["state"][0]["momentum_buffer"] = value
    elif key.startswith("args."):
        checkpoint["args"][key.removeprefix("args.")] = value
    else:
        checkpoint[key] = value
    torch.save(checkpoint, path)
    before = contents(copied)
    status, _, err = run(train.main, "--resume", path, "--epochs", 9, "--device", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert contents(copied) == before


@pytest.mark.parametrize("line", ["", "5", '{"a": 1}', '{"epoch": "1"}', "{torn"])
def test_a_damaged_line_inside_the_metrics_is_an_error_and_not_the_end_of_them(run, copied, contents, line):
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    before = contents(copied)
    status, _, err = run(train.main, "--resume", copied / "checkpoint.pth.tar", "--epochs", 7, "--device", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "line 2" in err
    assert contents(copied) == before


def test_a_damaged_test_json_is_found_before_the_evaluation(run, copied, contents):
    (copied / "test.json").write_text("{")
    before = contents(copied)
    status, out, err = run(train.main, "--test", "--resume", copied / "checkpoint.pth.tar", "--device", "cpu")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert contents(copied) == before


def test_resuming_keeps_what_the_run_recorded(run, copied):
    assert run(train.main, "--resume", copied / "checkpoint.pth.tar", "--epochs", 7, "--device", "cpu")[0] == 0
    args = json.loads((copied / "args.json").read_text())
    assert args["expname"] == "straight"
    assert len(args["commands"]) == 2
    assert torch.load(copied / "checkpoint.pth.tar")["args"]["expname"] == "straight"


def test_a_checkpoint_of_other_classes_is_refused(run, copied, image_folder, tmp_path):
    images = image_folder(tmp_path / "images", train=3, test=3)
    command = ["--test", "--resume", copied / "checkpoint.pth.tar", "--dataset", "folder", "--data", images]
    status, _, err = run(train.main, *command, "--device", "cpu")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "classes" in err
