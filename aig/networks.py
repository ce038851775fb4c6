"""Networks that exist already: rebuilt from a file, given gates, as the start of a training, as its teacher.

    net = aig.load("runs/NAME")             # a run folder, a checkpoint, a model folder, a name on the Hugging Face Hub
    net = aig.gate(torchvision.models.resnet50(weights="DEFAULT"))

Weights of torchvision and timm come under their names and leave under ours: `downsample` is `shortcut`, `fc` is
`linear`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aig import distributed
from aig.checkpoint import (
    CONFIG,
    TEST,
    TRAINED,
    WEIGHTS,
    checkpoint_in,
    load_checkpoint,
    load_weights,
    read_json,
    recorded,
)
from aig.console import InputError
from aig.data import DATASETS, IMAGENET_STATISTICS, Loader
from aig.images import Normaliser, Preprocess
from aig.inference import accelerate, evaluating
from convnet_aig import (
    GATE_LAYERS,
    AdaptiveResNet,
    BasicBlock,
    Bottleneck,
    ResNet_cifar,
    ResNet_ImageNet,
    check_thresholds,
    log_odds,
)

OPEN = 0.95  # of new gates of a trained network; at the paper's 0.87 a sample of 16 blocks would lose two of them
TORCHVISION = "torchvision"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner and name
PLAIN = re.compile(r"(conv1|bn1|fc|linear|layer[1-4]\.\d+\.(conv[123]|bn[123]|(downsample|shortcut)\.[01]))")
WITHOUT_WEIGHTS = (nn.ReLU, nn.Identity, nn.AdaptiveAvgPool2d, nn.Flatten, nn.MaxPool2d)  # of a plain ResNet


# ---------------------------------------------------------------------------------------------- from a file


def load(path: str | Path, budget: float | None = None) -> AdaptiveResNet:
    """The trained network of a checkpoint, a run folder (its best model) or a model folder, on the CPU, in eval mode.

    It is rebuilt from the keys and shapes in the file, so the original's files load, too. Beside the network's own
    attributes it has `classes`, the names of its K classes (numbers if the file records none), and `preprocess`, which
    makes its input (3, H, W) of a PIL image of any size.

    Args:
        path: where it is, or OWNER/NAME on the Hugging Face Hub.
        budget: take the thresholds that `--test --budget` found for this fraction of the dense net's MACs.

    Raises:
        InputError: if there is no such file, it holds no ConvNet-AIG, or no thresholds were found for the budget.
    """
    file = checkpoint_in(fetched(path), *TRAINED)
    checkpoint = load_checkpoint(file)
    own = recorded(checkpoint)
    model = rebuild(checkpoint["state_dict"], own.get("block_rates"), file)
    if "architecture" in own and own["architecture"] != architecture(model):
        raise InputError(f"{file} holds another network than the {CONFIG} beside it describes")
    num_classes = model.linear.out_features
    model.classes = own.get("classes") or [str(index) for index in range(num_classes)]
    if len(model.classes) != num_classes:
        raise InputError(f"{file} names {len(model.classes)} classes, but its network has {num_classes}")
    photographs = own.get("photographs", isinstance(model, ResNet_ImageNet))
    source = DATASETS.get(str(own.get("dataset", "cifar10")), DATASETS["cifar10"])
    size = own.get("image_size", 224 if photographs else source.size)
    usual = IMAGENET_STATISTICS if photographs else source.statistics or IMAGENET_STATISTICS
    mean, std = (own["mean"], own["std"]) if "mean" in own else usual
    if type(size) is not int or not 8 <= size <= 4096:
        raise InputError(f"{file}: its image_size is malformed; not a checkpoint of this program")
    model.preprocess = Preprocess(size, mean, std, bool(photographs))
    model.threshold = recorded_threshold(own, model.num_gates)
    if file.name == WEIGHTS and model.threshold != own.get("threshold", 0.5):
        raise InputError(f"{file}: the threshold in the {CONFIG} beside it is invalid for {model.num_gates} gates")
    if budget is not None:
        known = budgets_of(file, checkpoint)
        if f"{budget:g}" not in known:
            how = f"run --test --budget {budget:g} first"
            raise InputError(f"{file} as it is now has no thresholds for this budget: {how}")
        model.threshold = known[f"{budget:g}"]
        try:
            check_thresholds(model.threshold, model.num_gates)
        except (TypeError, ValueError) as error:
            raise InputError(f"the thresholds kept for the budget {budget:g} of {file} are invalid: {error}") from error
    return model.eval()


def fetched(path: str | Path) -> Path:
    """The path; or where the model was downloaded to, if nothing is there and it may be a name on the Hugging Face Hub.

    Raises InputError if it cannot be downloaded.
    """
    path = Path(path)
    if not HUB_NAME.fullmatch(str(path)) or path.parent.exists() or path.parts[0] == "runs":
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        how = "if that is a name on the Hugging Face Hub, pip install huggingface_hub"
        raise InputError(f"nothing is at {path}; {how}") from None
    try:
        hf_hub_download(str(path), CONFIG)
        with suppress(OSError):  # a model without test results
            hf_hub_download(str(path), TEST)
        return Path(hf_hub_download(str(path), WEIGHTS))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"nothing is at {path}, nor can it be had from the Hugging Face Hub ({reason})") from error


def architecture(model: AdaptiveResNet) -> dict[str, Any]:
    """What a config.json says of the structure of a network."""
    blocks = list(model.blocks())
    return {
        "network": type(model).__name__,
        "block": type(blocks[0]).__name__,
        "stages": list(model.stages),
        "gated": [block.gated for block in blocks],
        "parameters": sum(value.numel() for value in model.parameters()),
    }


def recorded_threshold(own: dict[str, Any], num_gates: int) -> float | list[float]:
    """The threshold of mode argmax that a checkpoint records, 0.5 if it is malformed."""
    threshold = own.get("threshold", 0.5)
    try:
        check_thresholds(threshold, num_gates)
    except (TypeError, ValueError):
        return 0.5
    return threshold if isinstance(threshold, (float, list)) else 0.5


def results_of(file: Path, checkpoint: dict) -> dict[str, dict[str, Any]]:
    """What test.json beside a checkpoint says of it as it is now, by gate mode. Raises InputError if it is damaged."""
    path, epoch = file.with_name(TEST), checkpoint.get("epoch")
    results, now = read_json(path), {"checkpoint": file.name, "epoch": epoch - 1 if isinstance(epoch, int) else None}
    if not all(isinstance(result, dict) for result in results.values()):
        raise InputError(f"{path} is damaged: move it away")
    now |= {"weights": digest(checkpoint["state_dict"])} if results else {}  # older results lack it
    return {
        key: result for key, result in results.items()
        if all(result.get(name, value) == value for name, value in now.items())
    }


def digest(state: dict[str, Tensor]) -> str:
    """A SHA-256 of weights, by which results know the network that they are of."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def budgets_of(file: Path, checkpoint: dict) -> dict[str, float | list[float]]:
    """The thresholds known for budgets, as text: of a model folder's config, and of `results_of`."""
    known, start = recorded(checkpoint).get("budgets", {}), "argmax@budget="
    tested = {
        key: result for key, result in results_of(file, checkpoint).items()
        if key.startswith(start) and "+" not in key  # at the network's own image size
    }
    try:
        return {**known, **{key.removeprefix(start): result["threshold"] for key, result in tested.items()}}
    except (TypeError, KeyError) as error:
        raise InputError(f"the budgets known of {file} are damaged: test it anew, with --test --budget") from error


def rebuild(state: dict[str, Tensor], rates: Sequence[float] | None, source: str | Path) -> AdaptiveResNet:
    """The network with these weights: block type, widths, stages, gates and classes follow from keys and shapes.

    Args:
        rates: the target rates recorded of it, if any.

    Raises:
        InputError: naming the source, if they are not those of a ConvNet-AIG.
    """
    try:
        gated = [f"{place}.{GATE_LAYERS[0]}.weight" in state for place in block_places(state)]
        with torch.device("meta"):
            # all that matters here is whether there is a gate
            model = build_like(state, [0.0 if gate else 1.0 for gate in gated])
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"{source} holds no ConvNet-AIG ({error})") from error
    model.to_empty(device="cpu")
    for statistics in model.buffers():  # PyTorch 0.3 saved no counts of batches
        statistics.zero_()
    load_weights(model, state, source)
    known = rates is not None and [rate < 1 for rate in rates] == gated
    model.target_rates = list(rates) if known else None
    return model


def build_like(state: dict[str, Tensor], rates: Sequence[float] | None) -> AdaptiveResNet:
    """A new network of the structure of these weights, with these target rates.

    Raises KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, RuntimeError if they are not a ResNet's.
    """
    num_classes, photographs = len(state["linear.weight"]), state["conv1.weight"].shape[-1] == 7
    places = block_places(state)
    stages = [sum(place.startswith(f"layer{stage}.") for place in places) for stage in range(1, 4 + photographs)]
    if 0 in stages or sum(stages) < len(places):
        raise ValueError(f"{len(places)} blocks, {stages} of them in the stages that it should have")
    if not any(".conv3." in key for key in state):
        return (ResNet_ImageNet if photographs else ResNet_cifar)(BasicBlock, stages, num_classes, rates)
    if not photographs:
        return ResNet_cifar(Bottleneck, stages, num_classes, rates)
    width, in_group = state["layer1.0.conv2.weight"].shape[:2]
    groups = width // in_group
    return ResNet_ImageNet(Bottleneck, stages, num_classes, rates, groups, width // groups)


def block_places(state: dict[str, Tensor]) -> list[str]:
    """Where the residual blocks of a state_dict are: layer1.0, layer1.1, ..."""
    found = {match.group(0) for key in state if (match := re.match(r"layer[0-9]+\.[0-9]+(?=\.)", key))}
    return sorted(found, key=lambda place: [int(number) for number in place[5:].split(".")])


# ---------------------------------------------------------------------------------------------- gates for a network


def gate(model: nn.Module, target_rates: Sequence[float] | None = None, probability: float = OPEN) -> AdaptiveResNet:
    """A trained plain ResNet with a gate at every block: torchvision's, timm's of the same structure, or ours.

    In gate mode "all" the outputs are those of `model`. The weights are copied.

    Args:
        model: (N, 3, H, W) -> logits (N, K).
        target_rates: one per block; blocks at 1 get no gate. None gates every block.
        probability: P(open) of the new gates, strictly between 0 and 1. They start nearly open, because the trained
            network was never used without one of its blocks.

    Raises:
        ValueError: naming the module that a plain ResNet does not have, or if target_rates do not fit.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability {probability}: must lie strictly between 0 and 1")
    check_plain(model)
    example = next(model.parameters())
    state = our_names(model.state_dict())
    try:
        gated = build_like(state, target_rates)
    except KeyError as error:
        raise ValueError(f"not a plain ResNet: it has no {error.args[0]}") from error
    except (IndexError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"not a plain ResNet: {error}") from error
    check_twin(model, gated)
    fresh = {key: value for key, value in gated.state_dict().items() if is_gate(key)}
    try:
        load_weights(gated, {**state, **fresh}, type(model).__name__)
    except InputError as error:
        raise ValueError(str(error)) from error
    open_gates(gated, fresh, probability)
    gated.to(example.device, example.dtype)
    check_outputs(model, gated)
    for name in ("classes", "preprocess"):  # as `load` sets them
        if hasattr(model, name):
            setattr(gated, name, getattr(model, name))
    return gated.eval()


def check_plain(model: nn.Module) -> None:
    """Raises ValueError naming the first module that is in no plain ResNet."""
    for name, module in model.named_modules():
        if any(True for _ in module.children()) or (isinstance(module, nn.Sequential) and not len(module)):
            continue
        if PLAIN.fullmatch(name) and isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            continue
        if not isinstance(module, WITHOUT_WEIGHTS):
            raise ValueError(f"{name} ({type(module).__name__}) does not fit: a plain ResNet has no such module")


def check_twin(model: nn.Module, twin: AdaptiveResNet) -> None:
    """Raises ValueError naming the first layer that computes something else than its counterpart."""
    theirs = {our_name(name): (name, module) for name, module in model.named_modules()}
    for ours, module in twin.named_modules():
        if ours not in theirs or not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)):
            continue
        name, other = theirs[ours]
        for setting in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps"):
            wanted, found = (pair(getattr(each, setting, None)) for each in (module, other))
            if wanted != found:
                raise ValueError(f"{name} does not fit: its {setting} is {found} instead of {wanted}")


def pair(value: Any) -> Any:
    """A setting of a layer, a number for both sides as the two of them."""
    return (value, value) if isinstance(value, int) else value


@torch.no_grad()
def check_outputs(model: nn.Module, gated: AdaptiveResNet) -> None:
    """Raises ValueError unless both classify noise alike. They differ if `model` overrides `forward`."""
    example, mode = next(model.parameters()), gated.gate_mode
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(example)
    gated.gate_mode = "all"
    with evaluating(model):
        wanted, found = model(noise), gated.eval()(noise)[0]
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted  # of our own networks
    gated.gate_mode = mode
    if not (found - wanted).abs().max() <= 1e-3 * wanted.abs().max():
        raise ValueError(f"{type(model).__name__} does not fit: it computes something else than its layers in turn")


def our_name(name: str) -> str:
    """A module or key of torchvision and timm under our name."""
    name = name.replace(".downsample", ".shortcut")
    return f"linear{name[2:]}" if name == "fc" or name.startswith("fc.") else name


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_name(key): value for key, value in state.items()}


def is_gate(key: str) -> bool:
    """Whether a key of a state_dict is of a gate."""
    return key.split(".")[-2] in GATE_LAYERS


def open_gates(model: AdaptiveResNet, fresh: dict[str, Tensor], probability: float = OPEN) -> None:
    """Has the gates whose keys are in `fresh` start open with this probability."""
    for name, block in model.named_modules():
        if f"{name}.{GATE_LAYERS[-1]}.bias" in fresh:
            last = getattr(block, GATE_LAYERS[-1])  # gives the two logits
            last.bias.data.copy_(torch.tensor([0, log_odds(probability)]))


# ---------------------------------------------------------------------------------------------- for a training


@dataclass(frozen=True)
class Pretrained:
    """The weights of a trained network."""

    source: str  # the file or name given by the user
    state: dict[str, Tensor]  # a state_dict under our names
    args: dict[str, Any] = field(default_factory=dict)  # what a checkpoint of ours records with them

    def load_into(self, model: AdaptiveResNet, classes: Sequence[str] = ()) -> str:
        """Starts a network for these classes from them. Gates that they lack, and a head for other classes, stay fresh.

        Returns:
            A line that says what was loaded.

        Raises:
            InputError: if keys are missing, left over or of another shape.
        """
        own = model.state_dict()
        fresh = {key: value for key, value in own.items() if is_gate(key) and key not in self.state}
        head, heads = "", ("linear.weight", "linear.bias")
        known, weight = self.args.get("classes"), self.state.get("linear.weight")
        other = classes and known and list(classes) != known
        if weight is not None and (weight.shape != own["linear.weight"].shape or other):
            fresh |= {key: own[key] for key in heads}
            head = f"; the head starts fresh, as the file has {len(weight)} {'other ' * bool(other)}classes"
        load_weights(model, {**self.state, **fresh}, self.source)
        open_gates(model, fresh)
        gates, loaded = sum(map(is_gate, fresh)), len((self.state.keys() & own.keys()) - fresh.keys())
        opened = f"; {gates} gate tensors start fresh, open with probability {OPEN:g}" if gates else ""
        return f"{self.source}: {loaded} tensors loaded{opened}{head}"


def read_pretrained(source: str, arch: str | None = None) -> Pretrained:
    """Weights to start from, or of a teacher.

    Args:
        source: a checkpoint of ours, a run folder (its best model), a model folder, a file of torchvision or timm
            (.pth or .safetensors), or "torchvision[:NAME]" for torchvision's weights NAME, IMAGENET1K_V1 by default.
        arch: torchvision's name of the net, such as "resnet50".

    Raises:
        InputError: if they cannot be had.
    """
    if source.partition(":")[0] == TORCHVISION:
        return Pretrained(source, our_names(download(source, arch)))
    checkpoint = load_checkpoint(checkpoint_in(source, *TRAINED), bare=True)
    return Pretrained(source, our_names(checkpoint["state_dict"]), recorded(checkpoint))


def download(source: str, arch: str | None) -> dict[str, Tensor]:
    """torchvision's own weights of a net; of several processes the first one fetches them. Raises InputError."""
    import torchvision  # here, because importing it takes seconds

    name = source.partition(":")[2] or "IMAGENET1K_V1"
    if arch is None:
        raise InputError(f"{source}: torchvision has no weights of networks for small images; give a file")
    if arch not in torchvision.models.list_models():
        raise InputError(f"{source}: torchvision has no network called {arch}; give a file")
    weights = torchvision.models.get_model_weights(arch)
    if name not in weights.__members__:
        raise InputError(f"{source}: torchvision has {', '.join(weights.__members__)} of {arch}")
    try:
        with distributed.world().main_first():
            return weights[name].get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{source}: cannot download the weights ({error})") from error


def load_teacher(
    pretrained: Pretrained, loader: Loader, device: torch.device | str, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """A trained network as a function from a loader's images (n, 3, H, W) to logits (n, K).

    It decides as `load` leaves it, reads nothing from the device, and gets the images normalised as its own were.
    With a dtype its convolutions are computed in that one, by autocast. Raises InputError if it is no ResNet, or knows
    other classes.
    """
    source, own = pretrained.source, pretrained.args
    model = rebuild(pretrained.state, own.get("block_rates"), source)
    model.threshold = recorded_threshold(own, model.num_gates)
    if len(loader.classes) != model.linear.out_features:
        known = model.linear.out_features
        raise InputError(f"the teacher {source} knows {known} classes, but the images have {len(loader.classes)}")
    if own.get("classes", loader.classes) != loader.classes:
        raise InputError(f"the classes of the teacher {source} are not those of the images")
    network = model.to(device, memory_format=torch.channels_last).eval()
    if dtype is None:
        network = accelerate(network)
        network.conditional = False  # to skip it would wait for the device
    theirs = Normaliser(own["mean"], own["std"], device) if "mean" in own else loader.normaliser
    same = torch.equal(theirs.mean, loader.normaliser.mean) and torch.equal(theirs.std, loader.normaliser.std)

    @torch.no_grad()
    def teacher(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return network(images if same else theirs(loader.normaliser.pixels(images)))[0].float()

    return teacher
