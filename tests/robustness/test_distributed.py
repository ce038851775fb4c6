"""Several processes do what one does: steps, evaluation, training, resuming and failing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from steps import new_state
from steps import train as train_epochs
from torch import nn

import train
from aig import distributed, inference, runs
from aig.checkpoint import load_checkpoint
from aig.data import SmallImageLoader, SmallImages
from aig.evaluation import evaluate
from aig.losses import Objective, target_rate_loss
from aig.state import State
from aig.terms import Budget, Distillation
from convnet_aig import BasicBlock, ResNet_cifar, draw_noise

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
RATES = [0.7, 0.5, 0.6]
DIGITS = ["--dataset", "digits", "--depth", "8", "--batch-size", "256", "--target", "0.7", "--device", "cpu"]


BUDGET = Budget(0.3, weight=7, fixed=0.1, branches=torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64), floor=0.9)
BEYOND = {"budget": BUDGET, "distillation": Distillation(lambda images: images.flatten(1)[:, :10])}


# ---------------------------------------------------------------------------------------------- in the processes


def network():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 10, RATES).double()
    for block in model.blocks():
        nn.init.normal_(block.fc2.weight, 0, 2)
        nn.init.zeros_(block.fc2.bias)
    return model


def digits():
    """All 1,797."""
    found = load_digits()
    grey = torch.from_numpy((found.images * 15).astype(np.uint8))
    return SmallImages(grey[..., None].repeat(1, 1, 1, 3), torch.from_numpy(found.target), list("0123456789"))


class Doubles(SmallImageLoader):
    """Images in float64."""

    def batches(self, epoch=0, start=0):
        return ((images.double(), labels) for images, labels in super().batches(epoch, start))


def take_step(model, images, labels, count, *, parts=1, lossfact=2, lr=0.0, scaler=None, dtype=None):
    """One step as `fit` takes it; returns its sums. `parts`: of the batch of `count` images in all processes."""
    world = distributed.world()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    network, _ = distributed.wrap(model, world, sync_bn=False, mode=None)
    objective = Objective(RATES, lossfact, (1,), world=world, **(BEYOND if lossfact is None else {}))
    state = State(model, torch.optim.SGD(model.parameters(), lr), scaler, 1, world)
    noise = draw_noise(model.num_gates, count, images)[:, world.shard(count)]
    for x, y, g in distributed.batch_parts(network, images, labels, noise, parts):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits, gates = network(x, noise=g)
        loss, sums = objective(logits, y, gates, count, images=x)
        scaler.scale(loss).backward()
        state.add(sums)
    scaler.step(state.optimizer)
    return state.sums


def step(count, parts, lossfact):
    """Sums and gradients of one step on the first `count` digits, with BatchNorm at its running statistics."""
    model, world = network().train(), distributed.world()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    images, labels = next(Doubles(digits(), count, ([0.5] * 3, [0.5] * 3), world=world).batches())
    torch.manual_seed(5)
    sums = take_step(model, images, labels, count, parts=parts, lossfact=lossfact)
    return sums, {name: p.grad.clone() for name, p in model.named_parameters()}


def evaluation(mode):
    """The record of all digits, in batches of 100."""
    model = network()
    model.gate_mode = mode
    loader = Doubles(digits(), 100, ([0.5] * 3, [0.5] * 3), world=distributed.world())
    objective = Objective(RATES, 2, (1, 5), world=distributed.world())
    return evaluate(model, loader, objective, 3, cost=inference.count_macs(model, 8))


def settled():
    """BatchNorm statistics after each process has put its rank into them."""
    model = network()
    world = distributed.world()
    with torch.no_grad():
        model.bn1.running_mean.fill_(world.rank)
    distributed.average_batchnorm(model, world)
    return model.bn1.running_mean.tolist()


def trained():
    """The record of a validation after an epoch, and the network, without a checkpoint, which would average anew."""
    model, world, normalisation = network().float(), distributed.world(), ([0.5] * 3, [0.5] * 3)
    loader = SmallImageLoader(digits(), 256, normalisation, augment="crop", world=world)
    val = SmallImageLoader(digits(), 256, normalisation, world=world)
    state = new_state(model, loader)
    state.world = world
    run = train_epochs(model, loader, state=state, val=val)
    return run.records[0]["val"], model.state_dict()


def half_precision():
    """Gradients of a step in float16, which all processes must share."""
    model, world = network().float().train(), distributed.world()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # at the usual one the first steps are left out
    loader = SmallImageLoader(digits(), 16, ([0.5] * 3, [0.5] * 3), world=world)
    torch.manual_seed(5)
    take_step(model, *next(loader.batches()), 16, lr=0.1, scaler=scaler, dtype=torch.float16)
    return {name: p.detach() for name, p in model.named_parameters()}


def order():
    """Whether this is the main process, and how long after the end of its turn this one entered the block, in ms."""
    world, left = distributed.world(), 0
    with world.main_first():
        entered = 1000 * time.time()
        if world.is_main:
            time.sleep(0.2)
            left = int(1000 * time.time())
    (left,) = world.all_max(left)
    return world.is_main, entered - left


# images, parts, weight of the target-rate loss (None: a budget and a teacher instead)
STEPS = [(16, 1, 2), (13, 1, 2), (13, 2, 0), (13, 1, None)]
TASKS = {
    **{("step", *arguments): (step, *arguments) for arguments in STEPS},
    **{("evaluation", mode): (evaluation, mode) for mode in ("argmax", "sample")},
    "parts": (step, 13, 2, 2),
    "settled": (settled,),
    "trained": (trained,),
    "half precision": (half_precision,),
    "order": (order,),
}


def work(rank, size, folder):
    """Does all the tasks as one of several distributed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save({name: function(*arguments) for name, (function, *arguments) in TASKS.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module", params=[2, 3])
def done(request, tmp_path_factory):
    """What each process got for each of the tasks: a dict for each process."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (request.param, folder), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def torchrun(count, script, *arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(ROOT / script), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, **options
    )


def finish(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@pytest.mark.parametrize(("count", "accumulate", "lossfact"), STEPS)
def test_processes_take_the_step_of_one(done, count, accumulate, lossfact):
    sums, gradients = step(count, accumulate, lossfact)
    terms = ["loss_budget", "loss_floor", "loss_distill"] if lossfact is None else ["loss_target"] * bool(lossfact)
    assert all(sums[name] > 0 for name in terms)
    assert 0 < sums["gates"].sum() < 3 * count
    assert any(gradient.abs().max() > 1e-3 for name, gradient in gradients.items() if "fc2" in name or not lossfact)
    for other_sums, other_gradients in (results["step", count, accumulate, lossfact] for results in done):
        assert set(other_sums) == set(sums)
        for name, value in sums.items():
            torch.testing.assert_close(other_sums[name], value, rtol=1e-9, atol=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-9, atol=1e-9)


def test_parts_in_processes_hold_the_rates_of_all_their_images(done):
    """13 images in two parts: a part consists of a part of every process's shard."""
    model = network().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    images, labels = next(Doubles(digits(), 13, ([0.5] * 3, [0.5] * 3)).batches())
    torch.manual_seed(5)
    noise = draw_noise(3, 13, images)
    shards = [torch.arange(13)[distributed.World(rank, len(done)).shard(13)] for rank in range(len(done))]
    for chosen in (torch.cat(part) for part in zip(*(shard.tensor_split(2) for shard in shards), strict=True)):
        logits, gates = model(images[chosen], noise=noise[:, chosen])
        rates = torch.stack(gates, 1).mean(0)
        loss_target = 2 * target_rate_loss(rates, torch.tensor(RATES, dtype=torch.float64))
        ((nn.functional.cross_entropy(logits, labels[chosen]) + loss_target) * len(chosen) / 13).backward()
    for _, gradients in (results["parts"] for results in done):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_half_precision_leaves_all_processes_with_the_same_weights(done):
    before = dict(network().float().named_parameters())
    first = done[0]["half precision"]
    assert any(not torch.equal(value, before[name]) for name, value in first.items())
    for results in done[1:]:
        assert all(torch.equal(value, first[name]) for name, value in results["half precision"].items())


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_processes_evaluate_every_image_once(done, mode):
    alone = evaluation(mode)
    assert 0.05 < alone["execution_rate"] < 0.95
    assert sum(alone["executed_blocks"]) == 1797
    for record in (results["evaluation", mode] for results in done):
        assert set(record) == set(alone)
        for name, value in alone.items():
            if name.startswith("loss"):
                assert record[name] == pytest.approx(value, rel=0, abs=1e-9)
            else:
                assert record[name] == value, name


def test_batch_norm_statistics_become_those_of_all_processes(done):
    assert [results["settled"] for results in done] == [[(len(done) - 1) / 2] * 16] * len(done)


def test_a_validation_is_of_the_network_that_all_processes_have(done):
    record, weights = done[0]["trained"]
    for results in done[1:]:
        torch.testing.assert_close(results["trained"], (record, weights), rtol=0, atol=0, equal_nan=True)
    model = network().float()
    model.load_state_dict(weights)
    alone = evaluate(model, SmallImageLoader(digits(), 256, ([0.5] * 3, [0.5] * 3)), Objective(RATES, 2), 1)
    assert record["executed_blocks"] == alone["executed_blocks"]
    assert record["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_the_main_process_goes_first_and_the_others_wait(done):
    for is_main, after in (results["order"] for results in done):
        assert after < 0 if is_main else after >= 0


@pytest.mark.parametrize("count", [0, 1, 2, 7, 256])
def test_shards_are_those_of_tensor_split(count):
    items = torch.arange(count)
    shards = [items[distributed.World(rank, 3).shard(count)] for rank in range(3)]
    for shard, expected in zip(shards, items.tensor_split(3), strict=True):
        assert torch.equal(shard, expected)


@pytest.mark.parametrize(("count", "kept"), [(32, 32), (33, 32), (35, 32), (36, 36)])
def test_a_last_batch_that_gives_a_process_less_than_two_images_is_left_out(count, kept):
    images = SmallImages(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), torch.zeros(count).long(), ["a"])
    world = distributed.World(1, 2)
    loader = SmallImageLoader(images, 16, ([0.5] * 3, [0.5] * 3), augment="crop", world=world)
    assert loader.num_images == kept
    assert min(len(labels) for _, labels in loader.batches(1)) >= 2


def test_augmentation_does_not_depend_on_the_number_of_processes():
    shapes = ([0.5] * 3, [0.5] * 3)
    whole = next(SmallImageLoader(digits(), 64, shapes, augment="crop+flip", seed=1).batches(2))
    worlds = [distributed.World(rank, 3) for rank in range(3)]
    parts = [
        next(SmallImageLoader(digits(), 64, shapes, augment="crop+flip", seed=1, world=world).batches(2))
        for world in worlds
    ]
    for single, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(single, torch.cat(shares))


def test_a_run_goes_on_with_another_number_of_processes(run, tmp_path):
    first = ["--epochs", 3, "--stop-after", 1, "--save", tmp_path, "--expname", "run"]
    status, out, err = finish(torchrun(2, "train.py", *DIGITS, *first))
    assert (status, err) == (0, "")
    folder = tmp_path / "run"
    assert out.count("epoch 1/3") == 1  # one process prints
    assert json.loads((folder / runs.ARGS).read_text())["processes"] == 2
    resume = ["--resume", folder / runs.CHECKPOINT, "--device", "cpu", "--stop-after", 1]
    status, out, err = run(train.main, *resume)
    assert (status, err) == (0, "")
    status, out, err = finish(torchrun(3, "train.py", *resume))
    assert (status, err) == (0, "")
    assert [record["epoch"] for record in runs.read_records(folder)] == [1, 2, 3]
    assert runs.read_records(folder)[2]["train"]["loss"] < runs.read_records(folder)[0]["train"]["loss"]
    test = ["--test", "--resume", folder / runs.BEST, "--device", "cpu"]
    results = []
    for start in (lambda: run(train.main, *test), lambda: finish(torchrun(2, "train.py", *test))):
        status, out, err = start()
        assert (status, err) == (0, "")
        results.append(json.loads((folder / runs.TEST).read_text())["argmax"])
    for name in ("top1", "gates", "classes", "executed_blocks", "macs_mean", "macs_quantiles", "macs_classes"):
        assert results[0][name] == results[1][name]


def test_a_signal_stops_all_processes_at_one_step_and_the_run_goes_on_from_there(tmp_path):
    run = [*DIGITS, "--epochs", 500, "--print-freq", 1, "--save", tmp_path, "--expname"]
    process = torchrun(2, "train.py", *run, "stopped")
    while "step 3/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status != 0
    assert len(re.findall("^train.py: SIGTERM: stopped in epoch", err, re.M)) == 1
    checkpoint = tmp_path / "stopped" / runs.CHECKPOINT
    stopped = load_checkpoint(checkpoint)
    assert stopped["step"] > 0
    resume = ["--resume", checkpoint, "--device", "cpu", "--stop-after", 1]
    assert finish(torchrun(2, "train.py", *resume))[0] == 0
    assert finish(torchrun(2, "train.py", *run, "straight", "--stop-after", stopped["epoch"]))[0] == 0
    first, second = (load_checkpoint(tmp_path / name / runs.CHECKPOINT) for name in ("straight", "stopped"))
    for name, value in first["state_dict"].items():  # averaging once more rounds the running statistics
        torch.testing.assert_close(second["state_dict"][name], value, rtol=0, atol=1e-6 if "running" in name else 0)


@pytest.fixture
def photos(image_folder, tmp_path):
    return image_folder(tmp_path / "photos", size=(40, 40), train=8, val=3)


def test_a_signal_to_processes_with_workers_saves_too(photos, tmp_path):
    command = [photos, "--image-size", 32, "--batch-size", 8, "--workers", 1, "--device", "cpu", "--epochs", 500]
    command += ["--lr", 1e-3, "--print-freq", 1, "--save", tmp_path, "--expname", "run"]
    process = torchrun(2, "train_img.py", *command)
    while "step 1/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # which torchrun passes on to whole process groups
    _, _, err = finish(process)
    assert len(re.findall("^train_img.py: SIGTERM: stopped in epoch", err, re.M)) == 1
    assert "DataLoader worker" not in err
    assert load_checkpoint(tmp_path / "run" / runs.CHECKPOINT)["seen"] >= 0


def test_an_error_in_one_process_ends_the_job_with_its_one_line(photos, tmp_path):
    (photos / "val/bee/2.png").write_bytes(b"broken")  # the last image to validate on: the second process has it
    command = [photos, "--image-size", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--epochs", 1]
    start = time.monotonic()
    status, _, err = finish(torchrun(2, "train_img.py", *command, "--save", tmp_path, "--expname", "run", "--lr", 1e-3))
    assert status == 1  # torchrun's own
    assert time.monotonic() - start < 60
    ours = err.split("Traceback")[0]  # the rest is torchrun's report
    assert len(re.findall("^train_img.py: error: cannot read the image .*2.png", ours, re.M)) == 1
    assert "exitcode  : 2" in err
    assert "engine.py" not in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [runs.LOG]  # why it ended, and no run


def test_a_loss_that_is_not_finite_is_reported_once_with_the_last_checkpoint(run, tmp_path):
    first = [*DIGITS, "--epochs", 2, "--stop-after", 1, "--save", tmp_path, "--expname", "run"]
    assert run(train.main, *first)[0] == 0
    checkpoint = tmp_path / "run" / runs.CHECKPOINT
    status, _, err = finish(torchrun(2, "train.py", "--resume", checkpoint, "--device", "cpu", "--lr", 1e30))
    assert status == 1
    (line,) = re.findall("^train.py: .*not finite.*$", err, re.M)
    assert line.endswith(f"the last good checkpoint, after epoch 1, is {checkpoint}")


def test_bad_arguments_are_reported_once():
    status, out, err = finish(torchrun(2, "train.py", *DIGITS, "--batch-size", 3))
    assert (status, out.count("validation set"), err.count("train.py: error:")) == (1, 1, 1)
    status, _, err = finish(torchrun(2, "train.py", *DIGITS, "--sync-bn"))
    assert err.count("train.py: error: --sync-bn: torch has it for GPUs only") == 1
