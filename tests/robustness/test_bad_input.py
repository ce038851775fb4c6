"""Bad input of every kind: one line on stderr, exit status 2, nothing changed on the disk, no foreign code run."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import train_img
from aig import runs
from aig.checkpoint import MSDOS_FOLDER

pytestmark = pytest.mark.slow

DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 256, "--epochs", 1, "--target", 0.7, "--device", "cpu"]


class Place:
    """A folder to put bad input into: `root`, with a finished `run` on digits and a folder of `photos`."""

    def __init__(self, root):
        self.root, self.run, self.photos = root, root / "run", root / "photos"
        self.checkpoint = (self.run / runs.CHECKPOINT).read_bytes()

    def file(self, content):
        """A file of these bytes, or of what torch.save makes of another value."""
        if not isinstance(content, bytes):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            content = buffer.getvalue()
        path = self.root / "bad.pth.tar"
        path.write_bytes(content)
        return path

    def changed(self, **changes):
        """The checkpoint with other values under some keys; None leaves a key out."""
        state = {**self.state(), **changes}
        return self.file({key: value for key, value in state.items() if value is not None})

    def state(self):
        return torch.load(io.BytesIO(self.checkpoint), weights_only=True)

    def args(self, **changes):
        return self.changed(args={**self.state()["args"], **changes})

    def weights(self, change):
        weights = self.state()["state_dict"]
        change(weights)
        return self.changed(state_dict=weights)

    def momentum(self, change):
        optimizer = self.state()["optimizer"]
        optimizer["state"][0]["momentum_buffer"] = change(optimizer["state"][0]["momentum_buffer"])
        return self.changed(optimizer=optimizer)

    def bomb(self):
        """An object whose unpickling would leave a file."""
        return Bomb(str(self.root / "executed"))

    def archive(self, compression=zipfile.ZIP_STORED, **records):
        """The checkpoint's archive with some of its records replaced."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.checkpoint)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
            for name in old.namelist():
                new.writestr(name, records.get(name.split("/")[-1].replace(".", "_"), old.read(name)))
        return self.file(buffer.getvalue())

    def flipped(self, record, bit=0):
        """The checkpoint with one bit of the middle of a record flipped."""
        with zipfile.ZipFile(io.BytesIO(self.checkpoint)) as archive:
            (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith(record)]
            content = archive.read(entry)
        damaged = bytearray(self.checkpoint)
        damaged[self.checkpoint.index(content, entry.header_offset) + len(content) // 2] ^= 1 << bit
        return self.file(bytes(damaged))


    def called_a_folder(self):
        """The checkpoint with its first record called a folder in the directory at the end."""
        content = bytearray(self.checkpoint)
        with zipfile.ZipFile(io.BytesIO(self.checkpoint)) as archive:
            content[archive.start_dir + 38] |= MSDOS_FOLDER
        return self.file(bytes(content))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    train.main([str(value) for value in [*DIGITS, "--save", root, "--expname", "run"]])
    return {path.name: path.read_bytes() for path in (root / "run").iterdir()}


@pytest.fixture
def place(finished, image_folder, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    for name, content in finished.items():
        (tmp_path / "run" / name).write_bytes(content)
    image_folder(tmp_path / "photos", size=(40, 40), train=3, val=3)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture
def refused(run, place, contents):
    """Checks that a script refuses its arguments as it should. Returns the line it says."""

    def call(main, *argv):
        before = contents(place.root)
        status, _, err = run(main, *argv)
        assert (status, err.count("\n")) == (2, 1), err
        assert "Traceback" not in err
        assert contents(place.root) == before  # so nothing was executed either
        return err

    return call


# ---------------------------------------------------------------------------------------------- arguments


def cases(table):
    return [case.strip() for line in table.strip().split("\n") for case in line.split("|")]


ARGUMENTS = """
    --lr 0 | --lr nan | --lr inf | --lr fast | --epochs 0 | --epochs -3 | --epochs 1.5 | --epochs 9999999
    --batch-size 1 | --depth 9 | --depth two | --depth 600000002 | --target 1.5 | --target -0.1 | --target nan
    --momentum 2 | --wd -1 | --lossfact -1 | --lrfact -1 | --seed -1 | --threshold 0 --test | --threshold 1
    --gate-mode maybe | --gate-samples 0 | --device tpu | --no-cuda --device mps | --expname a/b | --expname ..
    --expname= | --unknown 3 | stray | --test | --dense | --visdom-port 70000 --visdom | --visdom-server http://x
    --visdom-env x | --start-epoch 5 | --start-epoch 0 | --milestones -1 | --milestones x | --val-size -1
    --val-size 1500 | --val-size 1436 | --amp int8 | --amp | --checkpoint-minutes 0 | --checkpoint-minutes nan
    --dataset nix | --dataset folder --data missing | --stop-after 0 | --print-freq 0 | --log-interval 0
    --save run/metrics.jsonl | --resume missing | --resume photos | --expname run --save . | --test --resume missing
    --resume run/checkpoint.pth.tar --depth 14 | --test --resume run/args.json
    --test --visdom --resume run/model_best.pth.tar | --resume run/checkpoint.pth.tar --expname other
    --test --dataset folder --data photos --resume run/model_best.pth.tar
    --resume run/checkpoint.pth.tar --epochs 2 --target 1 | --epochs=-- | --expname=--
    --test --resume auto | --resume auto --save LONG
"""


@pytest.mark.parametrize("arguments", cases(ARGUMENTS))
def test_arguments_of_train(refused, arguments):
    base = [] if "--resume" in arguments else DIGITS
    refused(train.main, *base, *arguments.replace("LONG", "x" * 300).split())


PHOTO_ARGUMENTS = """
    --workers -1 | --workers 100000 | --image-size 8 | --image-size 100000 | --target-rates 1,2 | --target-rates a,b
    --target-rates 1.5,1 | --target-rates paper --arch resnet152 | --arch resnet19 | --pretrained missing
    --pretrained run/checkpoint.pth.tar | --pretrained run/args.json | --accumulate 0 | --warmup -1 | --lrdecay 0
    --resume run/checkpoint.pth.tar
"""


@pytest.mark.parametrize("arguments", cases(PHOTO_ARGUMENTS))
def test_arguments_of_train_img(refused, arguments):
    refused(train_img.main, "photos", "--image-size", 32, "--device", "cpu", *arguments.split())


# ---------------------------------------------------------------------------------------------- folders and images


def remove(path):
    for each in sorted(path.rglob("*"), reverse=True):
        each.unlink() if each.is_file() else each.rmdir()
    path.rmdir()


def huge_png():
    """The head of an image of 10^9 x 10^9 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    content[16:24] = (10**9).to_bytes(4, "big") * 2
    return bytes(content)


FOLDERS = {
    "no such folder": lambda photos: remove(photos),
    "no training images": lambda photos: remove(photos / "train"),
    "no validation images": lambda photos: remove(photos / "val"),
    "no classes": lambda photos: [remove(photos / "train" / name) for name in ("ant", "bee")],
    "a class without images": lambda photos: [path.unlink() for path in (photos / "train/ant").iterdir()],
    "a class missing in validation": lambda photos: remove(photos / "val/bee"),
    "a class of another name": lambda photos: (photos / "val/bee").rename(photos / "val/wasp"),
    "a file instead of a folder": lambda photos: [remove(photos), photos.write_text("")],
    "one training image in all": lambda photos: [
        path.unlink() for path in (photos / "train").rglob("*.png") if path.name != "0.png" or path.parent.name == "bee"
    ],
    "an empty image": lambda photos: (photos / "train/ant/0.png").write_bytes(b""),
    "a truncated image": lambda photos: (photos / "val/ant/0.png").write_bytes(
        (photos / "val/ant/0.png").read_bytes()[:200]
    ),
    "a text for an image": lambda photos: (photos / "train/bee/1.png").write_text("an image"),
    "an image of an immense size": lambda photos: (photos / "val/bee/2.png").write_bytes(huge_png()),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("script", ["train", "train_img"])
def test_folders_and_images(refused, place, kind, script):
    FOLDERS[kind](place.photos)
    common = ["--batch-size", 4, "--epochs", 1, "--device", "cpu", "--expname", "new", "--save", place.root]
    if script == "train":
        refused(train.main, "--dataset", "folder", "--data", place.photos, "--depth", 8, *common)
    else:
        refused(train_img.main, place.photos, "--image-size", 32, "--workers", 0, *common)


# ---------------------------------------------------------------------------------------------- checkpoints


def legacy(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "png")
    return buffer.getvalue()


def numpy_archive():
    buffer = io.BytesIO()
    np.savez(buffer, state_dict=np.zeros(3))
    return buffer.getvalue()




SUMS = {name: torch.zeros((), dtype=torch.double) for name in ("loss_classify", "loss_target", "top1")}
SUMS["gates"] = torch.zeros(3, dtype=torch.double)
IMMENSE = torch.zeros(1).expand(10**6, 10**6)  # declared; there is one number in the file
CHECKPOINTS = {
    **{
        f"cut after {tenth} tenths": lambda p, t=tenth: p.file(p.checkpoint[: len(p.checkpoint) * t // 10])
        for tenth in range(10)
    },
    "cut by a byte": lambda p: p.file(p.checkpoint[:-1]),
    **{
        f"bit {bit} of {record.strip(chr(47))} flipped": lambda p, r=record, b=bit: p.flipped(r, b)
        for record in ("data.pkl", "data/0", "data/7", "/version", "byteorder")
        for bit in (0, 6)
    },
    "a text": lambda p: p.file(b"weights"),
    "zeros": lambda p: p.file(bytes(100_000)),
    "an image": lambda p: p.file(png()),
    "json": lambda p: p.file(json.dumps({"state_dict": {}}).encode()),
    "a NumPy archive": lambda p: p.file(numpy_archive()),
    "a folder": lambda p: p.root / "photos",
    "a record called a folder": Place.called_a_folder,
    "compressed": lambda p: p.archive(zipfile.ZIP_DEFLATED),
    "a pickle that executes code": lambda p: p.file(pickle.dumps(p.bomb())),
    "a checkpoint with a pickle that executes code": lambda p: p.archive(data_pkl=pickle.dumps(p.bomb())),
    "code beside the weights": lambda p: p.changed(extra=p.bomb()),
    "code in the optimizer": lambda p: p.changed(optimizer=[p.bomb()]),
    "code in a file of the old format": lambda p: p.file(legacy({"state_dict": p.bomb()})),
    "a pickle without end": lambda p: p.archive(data_pkl=b"\x80\x02" + b"(" * 100_000),
    "a pickle of a declared length of 2^31": lambda p: p.archive(data_pkl=b"\x80\x02X\xff\xff\xff\x7fabc."),
    "a storage larger than its record": lambda p: p.archive(**{"7": bytes(8)}),
    "a storage smaller than its record": lambda p: p.archive(**{"7": bytes(10**6)}),
    "a deeply nested list": lambda p: p.archive(data_pkl=b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b"."),
    "a list": lambda p: p.file([1, 2]),
    "a number": lambda p: p.file(3),
    "an empty dict": lambda p: p.file({}),
    "a bare tensor": lambda p: p.file(torch.zeros(3)),
    "no weights": lambda p: p.changed(state_dict=None),
    "weights in a list": lambda p: p.changed(state_dict=[torch.zeros(1)]),
    "empty weights": lambda p: p.changed(state_dict={}),
    "a word for a weight": lambda p: p.weights(lambda w: w.update({"linear.bias": "zero"})),
    "a number for a name": lambda p: p.weights(lambda w: w.update({3: torch.zeros(1)})),
    "a weight missing": lambda p: p.weights(lambda w: w.pop("linear.bias")),
    "a weight too many": lambda p: p.weights(lambda w: w.update({"layer1.0.conv3.weight": torch.zeros(1)})),
    "a weight of another shape": lambda p: p.weights(lambda w: w.update({"linear.bias": torch.zeros(11)})),
    "a weight of an immense shape": lambda p: p.weights(lambda w: w.update({"linear.weight": IMMENSE})),
    "integer weights": lambda p: p.weights(lambda w: w.update({"linear.bias": torch.zeros(10, dtype=torch.long)})),
    "a fraction for a count": lambda p: p.weights(lambda w: w.update({"bn1.num_batches_tracked": torch.tensor(0.5)})),
    "complex weights": lambda p: p.weights(lambda w: w.update({"linear.bias": torch.zeros(10, dtype=torch.cfloat)})),
    "sparse weights": lambda p: p.weights(lambda w: w.update({"linear.bias": torch.zeros(10).to_sparse()})),
    "weights without values": lambda p: p.weights(lambda w: w.update({"linear.bias": torch.zeros(10, device="meta")})),
    "another number of classes": lambda p: p.weights(
        lambda w: w.update({"linear.weight": torch.zeros(5, 64), "linear.bias": torch.zeros(5)})
    ),
    "another network": lambda p: p.changed(state_dict={"fc.weight": torch.zeros(3)}),
    "args in a list": lambda p: p.changed(args=[1]),
    "an impossible depth": lambda p: p.args(depth=7),
    "an immense depth": lambda p: p.args(depth=6 * 10**9 + 2),
    "a depth that is a word": lambda p: p.args(depth="deep"),
    "no depth": lambda p: p.changed(args={"classes": list("0123456789")}),
    "an impossible target": lambda p: p.args(target=3.0),
    "a target that is a list": lambda p: p.args(target=[0.5]),
    "a rate beyond all floats": lambda p: p.args(block_rates=[10**400, 0.7, 0.7]),
    "a mean beyond all floats": lambda p: p.args(mean=[10**400, 0.5, 0.5]),
    "other gates": lambda p: p.args(block_rates=[1.0, 0.7, 0.7]),
    "rates that are words": lambda p: p.args(block_rates=["a"]),
    "classes that are numbers": lambda p: p.args(classes=[1, 2]),
    "other classes": lambda p: p.args(classes=list("abcdefghij")),
    "a mean of two channels": lambda p: p.args(mean=[0.5, 0.5]),
    "a standard deviation of zero": lambda p: p.args(std=[0.0, 1.0, 1.0]),
    "a data set that is none": lambda p: p.args(dataset="moons"),
}
RESUMING = {
    "no epoch": lambda p: p.changed(epoch=None),
    "an epoch that is a word": lambda p: p.changed(epoch="two"),
    "a negative epoch": lambda p: p.changed(epoch=-1),
    "a best accuracy that is not finite": lambda p: p.changed(best_prec1=float("nan")),
    "a best accuracy that is a list": lambda p: p.changed(best_prec1=[1]),
    "a best accuracy beyond all floats": lambda p: p.changed(best_prec1=10**400),
    "an optimizer that is a word": lambda p: p.changed(optimizer="sgd"),
    "an optimizer without groups": lambda p: p.changed(optimizer={"state": {}, "param_groups": []}),
    "immense momentum": lambda p: p.momentum(lambda buffer: IMMENSE),
    "momentum without values": lambda p: p.momentum(lambda buffer: buffer.to("meta")),
    "sparse momentum": lambda p: p.momentum(torch.Tensor.to_sparse),
    "integer momentum": lambda p: p.momentum(torch.Tensor.long),
    "momentum that is a word": lambda p: p.momentum(lambda buffer: "fast"),
    "a step in an epoch without sums": lambda p: p.changed(step=2, seen=512),
    "a step that is a word": lambda p: p.changed(step="two"),
    "a step that is a tensor": lambda p: p.changed(step=torch.ones(2, 2)),
    "a step that is a fraction": lambda p: p.changed(step=2.0, seen=512, sums=SUMS),
    "a step beyond the epoch": lambda p: p.changed(step=10**9, seen=1437, sums=SUMS),
    "images that are a tensor": lambda p: p.changed(seen=torch.ones(2, 2)),
    "an answer that is a tensor": lambda p: p.changed(is_best=torch.ones(2, 2)),
    "seconds that are a tensor": lambda p: p.changed(step=2, seen=512, sums=SUMS, seconds=torch.ones(())),
    "sums that are integers": lambda p: p.changed(step=2, seen=512, sums={k: v.long() for k, v in SUMS.items()}),
    "flags in a list": lambda p: p.args(milestones=["--visdom", "--visdom-server=http://localhost"]),
    "a flag in a list": lambda p: p.args(milestones=["-h"]),
    "a scale of zero": lambda p: p.changed(
        args={**p.state()["args"], "amp": "fp16"},
        scaler={"scale": 0.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 0},
    ),
}


def test_the_checkpoint_is_taken_as_it_is(run, place):
    """Or else all others might be refused for another reason than theirs."""
    assert run(train.main, "--test", "--device", "cpu", "--resume", place.changed())[0] == 0
    place.changed().rename(place.root / "run" / runs.CHECKPOINT)
    assert run(train.main, "--epochs", 2, "--device", "cpu", "--resume", place.root / "run")[0] == 0


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_to_test(refused, place, kind):
    refused(train.main, "--test", "--device", "cpu", "--resume", CHECKPOINTS[kind](place))


@pytest.mark.parametrize("kind", [*CHECKPOINTS, *RESUMING])
def test_checkpoints_to_go_on_from(refused, place, kind):
    refused(train.main, "--epochs", 3, "--device", "cpu", "--resume", {**CHECKPOINTS, **RESUMING}[kind](place))


@pytest.mark.parametrize("kind", ["a text", "code beside the weights", "a list", "another network", "compressed"])
def test_pretrained_weights(refused, place, kind):
    path = CHECKPOINTS[kind](place)
    refused(train_img.main, "photos", "--image-size", 32, "--device", "cpu", "--pretrained", path)


def test_the_bomb_would_go_off(place):
    pickle.loads(pickle.dumps(place.bomb()))
    assert (place.root / "executed").exists()


def test_there_are_enough_of_them():
    arguments = len(cases(ARGUMENTS)) + len(cases(PHOTO_ARGUMENTS))
    assert arguments + 2 * len(FOLDERS) + 2 * len(CHECKPOINTS) + len(RESUMING) > 200
