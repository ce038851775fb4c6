"""Trainings of a few steps, in memory: `engine.fit` without a run folder and without a dashboard."""

from dataclasses import replace

import torch

from aig import engine
from aig.data import Loader, SmallImageLoader, SmallImages
from aig.distributed import ALONE
from aig.engine import Recipe
from aig.state import State
from convnet_aig import BasicBlock, ResNet_cifar

RATES = [0.7, 0.5, 0.6]
RECIPE = Recipe(target_rates=RATES, lossfact=2, lr=0.1, milestones=(), epochs=6, last=6, seed=1, momentum=0)
PIXELS = ([0.5] * 3, [0.3] * 3)  # a mean and a std


def unsettle_norms(model):
    """Gives every BatchNorm statistics and weights as if after training."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, 0, 0.1)


def small_net(classes=4, rates=RATES):
    """A net of three blocks whose gates tell images apart."""
    torch.manual_seed(0)
    model = ResNet_cifar(BasicBlock, (1, 1, 1), classes, rates)
    for block in model.blocks():
        if block.gated:
            torch.nn.init.normal_(block.fc2.weight, 0, 2)
            torch.nn.init.zeros_(block.fc2.bias)
    return model


def small_loader(count=48, batch_size=16, classes=4, **settings):
    """Random images of 8 x 8 pixels; the last class has none."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 8, 8, 3), dtype=torch.uint8, generator=random)
    names = [*"abcdefghi"[: classes - 1], "empty"]
    source = SmallImages(images, torch.randint(classes - 1, (count,), generator=random), names)
    return SmallImageLoader(source, batch_size, PIXELS, **settings)


class Batches(Loader):
    """These images (N, 3, H, W) in batches, in order."""

    def __init__(self, images, labels, batch_size=None, classes=4):
        super().__init__(len(images), batch_size or len(images), 0, True, ALONE)
        self.images, self.labels, self.size = images, labels, tuple(images.shape[2:])
        self.classes = [str(index) for index in range(classes)]

    def batches(self, epoch=0, start=0):
        batches = list(zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True))
        yield from batches[start:]


class MemoryRun:
    """What `fit` needs of a run: records and saves are only noted.

    Args:
        after_step: called with the state after each step and before each batch of the validation.
    """

    def __init__(self, after_step=lambda state: None):
        self.records, self.saved, self.save_if_due = [], [], after_step

    def add_record(self, record):
        self.records.append(record)

    def save(self, state, is_best=False):
        self.saved.append((state.epoch, state.step, is_best))


def new_state(model, loader, recipe=RECIPE, epoch=1):
    """The state with which a training begins."""
    optimizer = engine.make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=recipe.amp == "fp16")
    return State(model, optimizer, scaler, len(loader), epoch=epoch)


def train(model, loader, epochs=1, state=None, after_step=lambda state: None, val=None, **changes):
    """Trains for some epochs with `RECIPE`, but for the changes. Returns the run: records, and `state` as it ended."""
    recipe = replace(RECIPE, **changes)
    state = state or new_state(model, loader, recipe)
    run = MemoryRun(after_step)
    run.state = state
    recipe = replace(recipe, last=state.epoch + epochs - 1)
    engine.fit(state, loader, val or loader, recipe, run, [])
    return run


def step(model, images, labels, **changes):
    """One step on these images. Returns its sums; the gradients are those of the parameters."""
    sums = {}

    def note(state):
        sums.update({name: value.clone() for name, value in state.sums.items()})

    train(model, Batches(images, labels, classes=model.linear.out_features), after_step=note, **changes)
    return sums
