"""Mixed precision, torch.compile and memory formats: what they may change, and what they must not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import engine
import processes
import train
import utils
from convnet_aig import BasicBlock, GatedBlock, ResNet_cifar, ScaledBranch
from data import SmallImageLoader, SmallImages
from engine import Recipe, Trainer
from utils import TrainingError

ROOT = Path(__file__).parent.parent
RATES = [0.7, 0.5, 0.6]
RECIPE = Recipe(target_rates=RATES, lossfact=2, lr=0.1, milestones=(), epochs=6, seed=1)
DIGITS = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--target", 0.7, "--device", "cpu"]


def network():
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), 10, RATES)
    for block in model.blocks():
        torch.nn.init.normal_(block.fc2.weight, 0, 2)
        torch.nn.init.zeros_(block.fc2.bias)
    return model.train()


def batch(count=16):
    torch.manual_seed(1)
    return torch.randn(count, 3, 8, 8), torch.randint(10, (count,))


def trainer_of(model, **how):
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_factor": 1.0}], 0.1, momentum=0.9)
    return Trainer(model, optimizer, RECIPE, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_convolutions_are_in_low_precision_and_gates_are_not(monkeypatch, dtype):
    scores, original = [], GatedBlock.gate_logits

    def recording(self, x):
        scores.append((x, original(self, x)))
        assert torch.equal(scores[-1][1], original(self, x.float()))  # also the pooling is in float32
        return scores[-1][1]

    model, (images, _) = network(), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # so that a gate computed twice is the same
    monkeypatch.setattr(GatedBlock, "gate_logits", recording)
    with torch.autocast("cpu", dtype):
        logits, gates = model(images)
    assert logits.dtype == dtype
    assert len(scores) == 3
    for (x, score), z in zip(scores, gates, strict=True):
        assert (x.dtype, score.dtype, z.dtype) == (dtype, torch.float32, torch.float32)
        assert set(z.tolist()) <= {0, 1}


def test_weights_and_gradients_stay_in_float32(monkeypatch):
    model = network()
    sums = trainer_of(model, amp=torch.bfloat16).step(*batch(), 16)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for value in sums.values()} == {torch.float64}


def test_bfloat16_learns_the_digits_like_float32(run, tmp_path):
    top1 = {}
    for amp in ("off", "bf16"):
        command = [*DIGITS, "--epochs", 12, "--amp", amp, "--save", tmp_path, "--expname", amp]
        assert run(train.main, *command)[0] == 0
        top1[amp] = json.loads((tmp_path / amp / utils.METRICS).read_text().splitlines()[-1])["val"]["top1"] / 100
    assert top1["off"] > 0.9
    p = sum(top1.values()) / 2
    assert abs(top1["off"] - top1["bf16"]) < 4 * (2 * p * (1 - p) / 360) ** 0.5
    assert utils.load_checkpoint(tmp_path / "bf16" / utils.CHECKPOINT)["args"]["amp"] == "bf16"


def test_a_float16_gradient_that_overflows_is_left_out_and_no_error():
    model = network()
    trainer = trainer_of(model, amp=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainer.step(*batch(), 16)["broken"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.scaler.get_scale() == 2.0**119
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert trainer.step(*batch(), 16)["broken"] == 0
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_fused_sgd_has_momentum_before_a_first_step_that_is_left_out():
    model = network()
    trainer = trainer_of(model, amp=torch.float16)
    optimizer = trainer.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    cli.fill_momentum(optimizer)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    trainer.step(*batch(), 16)
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in model.parameters())
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    cli.fill_momentum(plain)
    assert not plain.state


def small_loader(count=48):
    images = torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = SmallImages(images, torch.arange(count) % 10, list("0123456789"))
    return SmallImageLoader(source, 16, ([0.5] * 3, [0.5] * 3), augment="crop")


def test_a_gradient_that_is_not_finite_ends_training_though_the_loss_is():
    model, steps = network(), []
    model.conv1.weight.register_hook(lambda g: steps.append(1) or g * (float("inf") if len(steps) == 2 else 1))
    with pytest.raises(TrainingError, match="gradient not finite since epoch 4, step 2"):
        engine.train_epoch(trainer_of(model), small_loader(), 4, engine.Progress())


def test_the_training_loop_reads_nothing_from_the_device(monkeypatch):
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def reading(self, *args, name=name, original=original, **kwargs):
            reads.append((name, progress.step))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reading)
    for amp in (None, torch.bfloat16):
        trainer, progress = trainer_of(network(), amp=amp), engine.Progress()
        engine.train_epoch(trainer, small_loader(), 1, progress)
        assert {step for _, step in reads} == {3}  # when the epoch is through
        reads.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_gate_is_summed_up_in_float32(dtype):
    torch.manual_seed(0)
    residual, gradient = torch.randn(2, 3, 64, 64, 64).relu().to(dtype).unbind()
    z = torch.tensor([1.0, 0, 1], requires_grad=True)
    residual.requires_grad_()
    ScaledBranch.apply(residual, z).backward(gradient)
    expected = (residual.detach() * gradient).double().sum((1, 2, 3))
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=0)
    assert z.grad.min() > 65504 * (dtype == torch.float16) * 0.5  # about where float16 ends
    assert torch.equal(residual.grad, gradient * z.detach().to(dtype).view(-1, 1, 1, 1))
    double, ones = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True), torch.rand(2).double()
    assert torch.autograd.gradcheck(ScaledBranch.apply, (double, ones.requires_grad_()))


def test_float16_that_never_fits_is_an_error(monkeypatch):
    model = network()
    model.conv1.weight.register_hook(lambda g: g * torch.nan)
    trainer = trainer_of(model, amp=torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4 * engine.LEAST_SCALE)
    with pytest.raises(TrainingError, match="no float16 gradient of epoch 1 is finite"):
        engine.train_epoch(trainer, small_loader(), 1, engine.Progress())


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))), reason="there is no C++ compiler"
)


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_network_takes_the_same_steps():
    results = []
    for compile in (False, True):
        trainer = trainer_of(network().double(), compile=compile)
        images, labels = batch()
        torch.manual_seed(2)
        sums = [trainer.step(images.double(), labels, 16, full=True) for _ in range(3)]
        assert (trainer.compiled is trainer.network) != compile
        trainer.compiled = None  # what is not full runs without
        sums.append(trainer.step(images[:5].double(), labels[:5], 5))
        results.append((sums, trainer.model.state_dict()))
    (sums, state), (compiled_sums, compiled_state) = results
    for expected, found in zip(sums, compiled_sums, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(compiled_state, state, rtol=1e-8, atol=1e-8)


def test_a_training_says_how_long_compiling_took(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda *args, **more: network(*args, **more))
    trainer = trainer_of(network(), compile=True)
    for epoch in (1, 2):
        engine.train_epoch(trainer, small_loader(40), epoch, engine.Progress())
    assert capsys.readouterr().out.count("compiled: the first step took") == 1
    assert 0 < trainer.compile_seconds < 60


def test_compile_without_a_compiler_is_an_input_error(tmp_path):
    command = [sys.executable, ROOT / "train.py", *DIGITS, "--compile", "--save", tmp_path, "--expname", "no"]
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--compile does not work here" in result.stderr
    assert not (tmp_path / "no").exists()


def test_memory_formats_compute_the_same():
    sums = []
    for channels_last in (True, False):
        trainer = trainer_of(network().double(), channels_last=channels_last)
        images, labels = batch()
        torch.manual_seed(2)
        sums.append(trainer.step(images.double(), labels, 16))
    torch.testing.assert_close(*sums, rtol=1e-10, atol=1e-10)


def test_flags_of_speed_reach_the_trainer_and_are_taken_over(run, tmp_path, monkeypatch):
    made, original = [], cli.make_trainer
    monkeypatch.setattr(cli, "make_trainer", lambda *args: made.append(original(*args)) or made[-1])
    command = [*DIGITS, "--epochs", 2, "--batch-size", 512, "--stop-after", 1, "--save", tmp_path, "--expname", "run"]
    assert run(train.main, *command, "--no-channels-last", "--fused", "--amp", "fp16")[0] == 0
    assert run(train.main, "--resume", tmp_path / "run" / utils.CHECKPOINT, "--device", "cpu")[0] == 0
    for trainer in made:
        assert (trainer.memory_format, trainer.amp) == (torch.contiguous_format, torch.float16)
        assert trainer.optimizer.param_groups[0]["fused"] is True
        assert trainer.model.layer1[0].conv1.weight.is_contiguous()
        assert trainer.scaler.is_enabled()
    assert made[1].scaler.state_dict()["_growth_tracker"] == 2 * 3  # steps, none of them left out
    assert run(train.main, *command[:-1], "other")[0] == 0
    defaults = made[-1]
    assert (defaults.memory_format, defaults.amp, defaults.compiled) == (torch.channels_last, None, defaults.network)
    assert not defaults.optimizer.param_groups[0]["fused"]


@pytest.fixture
def tf32():
    """Reads TF32's switches, and puts them back at the end."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield lambda: [switch.allow_tf32 for switch in switches]
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def test_tf32_is_torchs_own_choice_unless_given(run, tmp_path, tf32):
    default = tf32()
    for number, (flags, expected) in enumerate([([], default), (["--tf32"], [True] * 2), (["--no-tf32"], [False] * 2)]):
        command = [*DIGITS, "--epochs", 1, "--save", tmp_path, "--expname", number, *flags]
        assert run(train.main, *command)[0] == 0
        assert tf32() == expected


def test_one_process_is_a_world_of_its_own():
    world = processes.world()
    assert (world.leads, world.size, world.share(7), world.agree(3, True)) == (True, 1, slice(0, 7), [3, True])
