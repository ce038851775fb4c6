"""Model folders: written from a run, loaded bit for bit, taken wherever a checkpoint is; hostile and damaged ones."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from steps import small_net, unsettle_norms

import aig
import train
from aig import export, folders, networks
from aig.analysis.__main__ import main as analyse
from aig.checkpoint import BEST, CONFIG, TEST, WEIGHTS
from aig.console import InputError
from aig.images import Preprocess
from aig.networks import digest

ROOT = Path(__file__).parent.parent
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--epochs", 1, "--device", "cpu"]


def network(classes=4, size=8):
    model = small_net(classes)
    unsettle_norms(model)
    model.classes, model.preprocess = [*"abcdefgh"[:classes]], Preprocess(size, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], False)
    return model.eval()


def same_outputs(first, second, size=8):
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (logits, gates), (others, opened) = first(images), second(images)
    return torch.equal(logits, others) and all(map(torch.equal, gates, opened))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run that was tested in two modes and for a budget."""
    save = tmp_path_factory.mktemp("runs")
    for flags in ([*DIGITS, "--expname", "run", "--save", save], *(
        ["--test", "--resume", save / "run", *mode] for mode in ([], ["--gate-mode", "sample"], ["--budget", "0.8"])
    )):
        train.main([str(flag) for flag in flags])
    return save / "run"


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "digits"
    export.main(["--resume", str(digits), "--folder", str(target), "--licence", "mit"])
    return target


def spoil(folder, tmp_path, **changes):
    """A copy of a model folder with these values in its config; None takes one out."""
    target = shutil.copytree(folder, tmp_path / "spoilt")
    config = {**json.loads((target / CONFIG).read_text()), **changes}
    (target / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return target


# ---------------------------------------------------------------------------------------------- writing and loading


@pytest.mark.parametrize("threshold", [0.3, [0.2, 0.5, 0.9]])
def test_a_network_comes_back_bit_for_bit(threshold, tmp_path):
    model = network()
    model.threshold = threshold
    aig.save(model, tmp_path / "model")
    loaded = aig.load(tmp_path / "model")
    assert same_outputs(model, loaded)
    assert (loaded.classes, loaded.preprocess, loaded.threshold) == (model.classes, model.preprocess, threshold)
    image = Image.new("RGB", (20, 10), (200, 100, 50))
    assert torch.equal(loaded.preprocess(image), model.preprocess(image))
    assert {file.name for file in (tmp_path / "model").iterdir()} == {CONFIG, WEIGHTS, folders.CARD}


def test_thresholds_of_any_kind_are_kept_as_numbers(tmp_path):
    model, target = network(), tmp_path / "model"
    for threshold in (torch.full((3,), 0.25), np.full(3, 0.25, np.float32), list(torch.full((3,), 0.25))):
        model.threshold = threshold
        aig.save(model, target, overwrite=True)
        assert aig.load(target).threshold == [0.25] * 3


def test_what_cannot_be_written_leaves_the_folder_as_it_was(folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    model = network()
    model.classes = [object() for _ in model.classes]
    with pytest.raises(TypeError):
        aig.save(model, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_a_run_becomes_a_folder_of_its_best_model(digits, folder):
    best, loaded = aig.load(digits), aig.load(folder)
    assert same_outputs(best, loaded)
    assert (loaded.classes, loaded.preprocess) == (best.classes, best.preprocess)
    assert aig.load(folder, budget=0.8).threshold == aig.load(digits, budget=0.8).threshold != 0.5
    with pytest.raises(InputError, match=r"no thresholds .* run --test --budget 0\.6 first"):
        aig.load(folder, budget=0.6)
    config = json.loads((folder / CONFIG).read_text())
    assert config["architecture"]["stages"] == [1, 1, 1]
    assert config["flags"]["batch_size"] == 64
    assert str(digits.parent) not in (folder / CONFIG).read_text()  # what --save named


def test_the_thresholds_of_a_budget_can_be_those_of_the_folder(digits, tmp_path):
    export.main(["--resume", str(digits), "--budget", "0.8", "--folder", str(tmp_path / "model")])
    assert aig.load(tmp_path / "model").threshold == aig.load(digits, budget=0.8).threshold
    export.main(["--resume", str(tmp_path / "model"), "--folder", str(tmp_path / "again")])
    again = aig.load(tmp_path / "again")
    assert "| `argmax` |" in (tmp_path / "again" / folders.CARD).read_text()  # the results go along
    assert again.threshold == aig.load(digits, budget=0.8).threshold
    assert aig.load(tmp_path / "again", budget=0.8).threshold == again.threshold


def test_the_card_says_what_was_measured(digits, folder):
    card, results = (folder / folders.CARD).read_text(), json.loads((digits / TEST).read_text())
    for mode in ("argmax", "sample", "argmax@budget=0.8"):
        result = results[mode]
        assert f"| `{mode}` | {result['top1']:.2f}" in card
        assert f"| {result['execution_rate']:.3f} | {result['macs_fraction']:.3f} | {result['images']:,} |" in card
    assert 'license: "mit"\n' in card
    rows = dict(re.findall(r"^\| `(\S+)` \|.* \| (.*) \|$", card, re.MULTILINE))
    assert rows["argmax"] == "0.5"
    assert rows["sample"] == "–"
    assert rows["argmax@budget=0.8"] in ("one per gate", str(results["argmax@budget=0.8"]["threshold"])[:6])
    assert f"{sum(value.numel() for value in aig.load(folder).parameters()):,} parameters" in card
    (command,) = json.loads((digits / "args.json").read_text())["commands"]
    assert command in card
    assert "no training images were held out" in card.lower()


def test_the_card_quotes_no_result_of_another_epoch(digits, tmp_path):
    run = shutil.copytree(digits, tmp_path / "run")
    results = json.loads((run / TEST).read_text())
    results["sample"]["epoch"] = 7
    (run / TEST).write_text(json.dumps(results))
    aig.save(aig.load(run), tmp_path / "model", run)
    card = (tmp_path / "model" / folders.CARD).read_text()
    assert "| `argmax` |" in card
    assert "| `sample` |" not in card


def test_the_card_quotes_no_result_of_an_epoch_that_was_trained_again(digits, tmp_path):
    run = shutil.copytree(digits, tmp_path / "run")
    train.main(["--resume", str(run), "--start-epoch", "1", "--seed", "2", "--val-size", "50"])
    aig.save(aig.load(run), tmp_path / "model", run)
    assert "Not measured" in (tmp_path / "model" / folders.CARD).read_text()


def test_results_stay_with_weights_that_were_completed(digits, tmp_path):
    run = shutil.copytree(digits, tmp_path / "run")
    checkpoint = torch.load(run / BEST, weights_only=True)
    checkpoint["state_dict"] = {
        key: value for key, value in checkpoint["state_dict"].items() if not key.endswith("num_batches_tracked")
    }
    torch.save(checkpoint, run / BEST)  # as the original's PyTorch 0.3 would
    results = json.loads((run / TEST).read_text())
    weights = digest(checkpoint["state_dict"])
    (run / TEST).write_text(json.dumps({key: {**result, "weights": weights} for key, result in results.items()}))
    aig.save(aig.load(run), tmp_path / "model", run)
    aig.save(aig.load(tmp_path / "model"), tmp_path / "again", tmp_path / "model")
    for place in ("model", "again"):
        assert "Not measured" not in (tmp_path / place / folders.CARD).read_text()


def test_results_of_a_run_are_not_given_to_another_network(digits, tmp_path):
    model = aig.load(digits)
    model.linear.weight.data /= 2
    with pytest.raises(ValueError, match=r"not that of .*, whose results would be quoted"):
        aig.save(model, tmp_path / "model", digits)


def test_what_a_folder_says_of_its_training_goes_along(digits, folder, tmp_path):
    export.main(["--resume", str(folder), "--folder", str(tmp_path / "again")])
    cards = [(place / folders.CARD).read_text().split("## Training")[1] for place in (folder, tmp_path / "again")]
    assert cards[0] == cards[1]
    flags = [json.loads((place / CONFIG).read_text())["flags"] for place in (folder, tmp_path / "again")]
    assert flags[0] == flags[1]
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["licence"] == "mit"


def test_names_and_licences_are_no_markup(tmp_path):
    model = network()
    model.classes = ["<b>x</b>", "b", "c", "d"]
    aig.save(model, tmp_path, licence="a: b\nc")
    card = (tmp_path / folders.CARD).read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in card
    assert 'license: "a: b\\nc"' in card
    assert aig.load(tmp_path).classes == model.classes


def test_a_plain_network_has_a_card_without_gates(tmp_path):
    plain = small_net(rates=[1, 1, 1]).eval()
    plain.classes, plain.preprocess = [*"abcd"], Preprocess(8, [0.1] * 3, [0.4] * 3, True)
    aig.save(plain, tmp_path)
    card = (tmp_path / folders.CARD).read_text()
    assert "none of them with a gate" in card
    assert "threshold" not in card
    assert aig.load(tmp_path).preprocess == plain.preprocess


def test_a_card_without_a_run_claims_nothing(tmp_path):
    aig.save(network(), tmp_path)
    card = (tmp_path / folders.CARD).read_text()
    assert "Not measured" in card
    assert "## Training" not in card
    assert "Licence**: not stated" in card


def test_absolute_paths_stay_at_home():
    assert folders.unplaced("/home/somebody/data") == "data"
    assert folders.unplaced("data/cifar") == "data/cifar"
    assert folders.unplaced(None) is None


# ---------------------------------------------------------------------------------------------- taken as a checkpoint


def test_it_is_tested_as_the_run_is(digits, folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "model")
    train.main(["--test", "--resume", str(target)])
    found, wanted = (json.loads((each / TEST).read_text())["argmax"] for each in (target, digits))
    differ = {"images_per_second", "checkpoint"}
    assert {**found, **dict.fromkeys(differ)} == {**wanted, **dict.fromkeys(differ)}


def test_thresholds_of_its_own_are_tested_and_kept_apart(folder, tmp_path):
    thresholds = [0.3, 0.5, 0.7]
    target = spoil(folder, tmp_path, threshold=thresholds)
    train.main(["--test", "--resume", str(target)])
    result = json.loads((target / TEST).read_text())["argmax@0.3,0.5,0.7"]
    assert result["threshold"] == thresholds
    with pytest.raises(InputError, match="--threshold"):
        train.main(["--test", "--resume", str(target), "--threshold", "0.3,0.5"])


def test_a_training_starts_from_it_and_learns_from_it(folder, tmp_path):
    common = [*map(str, DIGITS), "--save", str(tmp_path), "--train-size", "128"]
    train.main([*common, "--expname", "tuned", "--pretrained", str(folder), "--distill", str(folder)])
    assert (tmp_path / "tuned" / BEST).exists()


def test_analysis_takes_it(folder, tmp_path, capsys):
    Image.new("RGB", (8, 8), (200, 200, 200)).save(tmp_path / "grey.png")
    analyse(["--resume", str(folder), "--image", str(tmp_path / "grey.png"), "--out", str(tmp_path / "out")])
    assert "stage 1" in capsys.readouterr().out


def test_a_training_does_not_go_on_from_it(run, folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    status, _, err = run(train.main, "--resume", folder)
    assert (status, err.count("\n")) == (2, 1)
    status, _, err = run(train.main, "--resume", folder / WEIGHTS)
    assert (status, err.count("\n")) == (2, 1)
    assert "--pretrained" in err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_file_of_timm_beside_a_config_of_its_own_is_weights(tmp_path):
    weights = {name: value for name, value in small_net().state_dict().items() if not networks.is_gate(name)}
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text('{"architecture": "resnet50", "num_classes": 1000}')
    for source in (tmp_path, tmp_path / WEIGHTS):
        assert networks.read_pretrained(str(source)).state.keys() == weights.keys()
    with pytest.raises(InputError, match="no config"):
        aig.load(tmp_path)


# ---------------------------------------------------------------------------------------------- what does not fit


def test_nothing_is_replaced_unasked(run, digits, folder):
    before = (folder / WEIGHTS).read_bytes()
    status, _, err = run(export.main, "--resume", digits, "--folder", folder)
    assert (status, err.count("\n")) == (2, 1)
    assert "add --overwrite" in err
    assert (folder / WEIGHTS).read_bytes() == before


def test_the_folder_of_a_run_stays_one(run, digits):
    before = {file.name: file.read_bytes() for file in digits.iterdir() if file.is_file()}
    for flags in ([], ["--overwrite"]):
        status, _, err = run(export.main, "--resume", digits, "--folder", digits, *flags)
        assert (status, err.count("\n")) == (2, 1)
        assert "is the folder of a run" in err
    assert {file.name: file.read_bytes() for file in digits.iterdir() if file.is_file()} == before


def test_a_write_that_was_cut_off_leaves_no_folder_that_loads(folder, tmp_path, monkeypatch):
    target = shutil.copytree(folder, tmp_path / "model")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        aig.save(network(), target, overwrite=True)
    with pytest.raises(InputError, match="no config"):
        aig.load(target)


@pytest.mark.parametrize(("flags", "message"), [
    (["--batch", "any"], "--batch is about an ONNX file"),
    (["--uint8"], "--uint8 is about an ONNX file"),
    (["--dense"], "--dense is about an ONNX file"),
    (["--out", "m.onnx"], "not allowed with"),
    (["--threshold", "0.5,0.5"], "one for each of 3 gates"),
    (["--budget", "0.3"], "run --test --budget 0.3 first"),
])
def test_flags_that_do_not_go_with_a_folder(flags, message, run, digits, tmp_path):
    status, _, err = run(export.main, "--resume", digits, "--folder", tmp_path / "new", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "new").exists()


def test_a_network_that_nobody_could_use_is_not_saved(tmp_path):
    model = network()
    del model.preprocess
    with pytest.raises(ValueError, match="without `preprocess`"):
        aig.save(model, tmp_path / "new")
    model = network()
    model.classes = ["a"]
    with pytest.raises(ValueError, match="1 classes are named"):
        aig.save(model, tmp_path / "new")
    model = network()
    model.threshold = [0.5]
    with pytest.raises(ValueError, match="threshold"):
        aig.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"library_name": "timm"}, "no config.json of convnet-aig"),
    ({"classes": ["a", "b"]}, "names 2 classes"),
    ({"classes": [1, 2]}, "malformed"),
    ({"classes": "abcdefghij"}, "malformed"),
    ({"threshold": "0.9"}, "the threshold in the config.json beside it is invalid"),
    ({"threshold": [0.1, 0.2]}, "the threshold in the config.json beside it is invalid"),
    ({"threshold": 5}, "the threshold in the config.json beside it is invalid"),
    ({"mean": [0, 0]}, "malformed"),
    ({"std": [0, 1, 1]}, "malformed"),
    ({"image_size": "large"}, "image_size"),
    ({"image_size": 0}, "image_size"),
    ({"flags": 3}, "malformed"),
    ({"architecture": {"network": "ResNet_cifar"}}, "another network than the config.json"),
])
def test_a_config_that_does_not_fit_is_one_line(changes, message, folder, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        aig.load(spoil(folder, tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("budgets", [[0.5], {"0.8": [0.1]}, {"0.8": "high"}, {"0.8": None}])
def test_invalid_thresholds_of_a_budget_are_one_line(budgets, folder, tmp_path):
    target = spoil(folder, tmp_path, budgets=budgets)
    (target / TEST).unlink()
    with pytest.raises(InputError, match=r"budget"):
        aig.load(target, budget=0.8)


def test_damaged_missing_and_foreign_files_are_one_line(folder, tmp_path):
    def changed(change):
        target = shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        change(target)
        with pytest.raises(InputError) as error:
            aig.load(target)
        assert "\n" not in str(error.value)
        shutil.rmtree(target)
        return str(error.value)

    def rename(target, old, new):
        weights = load_file(target / WEIGHTS)
        weights[new] = weights.pop(old)
        save_file(weights, target / WEIGHTS)

    def reshape(target, name):
        weights = load_file(target / WEIGHTS)
        weights[name] = weights[name][:-1].clone()
        save_file(weights, target / WEIGHTS)

    assert "no config.json" in changed(lambda target: (target / CONFIG).unlink())
    assert "is damaged" in changed(lambda target: (target / CONFIG).write_text("{"))
    assert "is damaged" in changed(lambda target: (target / CONFIG).write_bytes(b"\xff"))
    assert "no model_best" in changed(lambda target: (target / WEIGHTS).unlink())
    assert "safetensors" in changed(lambda target: (target / WEIGHTS).write_bytes(b"nothing"))
    assert "safetensors" in changed(lambda target: (target / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]))
    assert "keys 1 missing (bn1.weight); 1 left over (bn1.w)" in changed(partial(rename, old="bn1.weight", new="bn1.w"))
    assert "of another shape or type (bn1.weight" in changed(partial(reshape, name="bn1.weight"))
    assert "ConvNet-AIG" in changed(partial(rename, old="linear.weight", new="fc.weight"))


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_nothing_in_a_folder_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Hostile()), b""):
        target = shutil.copytree(folder, tmp_path / "hostile", dirs_exist_ok=True)
        (target / WEIGHTS).write_bytes(content)
        if not content:
            torch.save(Hostile(), target / WEIGHTS)
        for use in (aig.load, lambda path: networks.read_pretrained(str(path))):
            with pytest.raises(InputError, match="cannot be read as safetensors"):
                use(target)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download needs: OWNER/NAME is the folder `models / NAME`."""

    models = Path()

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body=False):
        owner, name, *_, file = self.path.strip("/").split("/")
        path = self.models / name / file
        content = path.read_bytes() if owner == "owner" and path.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if not content:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folder, tmp_path):
    """Runs a statement in a Python whose Hugging Face Hub is a server on this machine."""
    pytest.importorskip("huggingface_hub")
    Hub.models = folder.parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def call(statement):
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
                 "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                 "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **place}
        words = [sys.executable, "-c", statement]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)

    yield call
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_is_downloaded(hub, folder, tmp_path):
    done = hub("import aig; aig.save(aig.load('owner/digits'), 'copy')")
    assert done.returncode == 0, done.stderr
    assert same_outputs(aig.load(tmp_path / "copy"), aig.load(folder))


def test_a_name_that_nobody_has_is_one_line(hub):
    done = hub("import aig; aig.load('nobody/nothing')")
    assert "InputError: nothing is at nobody/nothing, nor can it be had" in done.stderr.splitlines()[-1]


def test_a_wrong_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="no checkpoint at runs/missing"):
        aig.load("runs/missing")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        aig.load("owner/name")
