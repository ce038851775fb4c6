"""Entry points of torch.hub; `torch.hub.list(REPO)` names them.

    net = torch.hub.load(REPO, "aig_resnet20_cifar10_jpeg")             # trained
    net = torch.hub.load(REPO, "convnet_aig_50", target_rates=0.7)      # new weights
    logits, gates = net(images)                                         # (N, K), and per block z (N,)

REPO is OWNER/NAME on GitHub, or the folder of a checkout with source="local".
"""

from pathlib import Path as _Path

import aig as _aig
import convnet_aig as _models
from aig.networks import read_pretrained as _read_pretrained

dependencies = ["torch", "torchvision", "numpy", "PIL", "filelock", "safetensors", "tqdm"]
_FOLDER = _Path(__file__).parent / "results" / "model"


def aig_resnet20_cifar10_jpeg(pretrained: bool = True):
    """AIG ResNet-20, gated to a budget of 0.6, trained on CIFAR-10 as JPEG at quality 75. See results/model.

    Raises:
        ValueError: with pretrained=False.
    """
    return _released("aig20-cifar10-jpeg-floor", pretrained)


def resnet20_cifar10_jpeg(pretrained: bool = True):
    """The plain ResNet-20 that `aig_resnet20_cifar10_jpeg` was gated from.

    Raises:
        ValueError: with pretrained=False.
    """
    return _released("resnet20-cifar10-jpeg-s1", pretrained)


def convnet_aig_50(pretrained: bool = False, target_rates=0.7, num_classes: int = 1000):
    """ResNet-50 for ImageNet's images, with a gate at each block.

    Args:
        pretrained: must be False: there are no trained weights of it.
        target_rates: one for all blocks, or one per block. A block at rate 1 has no gate.

    Raises:
        ValueError: with pretrained=True.
    """
    return _gated(50, pretrained, target_rates, num_classes)


def convnet_aig_101(pretrained: bool = False, target_rates=0.7, num_classes: int = 1000):
    """ResNet-101; otherwise as convnet_aig_50."""
    return _gated(101, pretrained, target_rates, num_classes)


def convnet_aig_152(pretrained: bool = False, target_rates=0.7, num_classes: int = 1000):
    """ResNet-152; otherwise as convnet_aig_50."""
    return _gated(152, pretrained, target_rates, num_classes)


def resnet_50(pretrained: bool = False, num_classes: int = 1000):
    """The twin of convnet_aig_50 without gates.

    With pretrained=True it downloads torchvision's IMAGENET1K_V1; a head for another number of classes stays fresh.
    """
    return _plain(50, pretrained, num_classes)


def resnet_101(pretrained: bool = False, num_classes: int = 1000):
    """The twin of convnet_aig_101 without gates; otherwise as resnet_50."""
    return _plain(101, pretrained, num_classes)


def resnet_152(pretrained: bool = False, num_classes: int = 1000):
    """The twin of convnet_aig_152 without gates; otherwise as resnet_50."""
    return _plain(152, pretrained, num_classes)


def _released(name, pretrained):
    if not pretrained:
        raise ValueError("this is the trained network: for new weights take ResNet_cifar of convnet_aig.py")
    return _aig.load(_FOLDER / name)


def _gated(depth, pretrained, target_rates, num_classes):
    if pretrained:
        how = f"aig.gate(torch.hub.load(REPO, 'resnet_{depth}', pretrained=True)) gives torchvision's, with new gates"
        raise ValueError(f"there are no trained weights of convnet_aig_{depth}; {how}")
    if isinstance(target_rates, (int, float)):
        target_rates = [target_rates] * sum(_models.ARCHS[f"resnet{depth}"][1])
    return getattr(_models, f"ResNet{depth}_ImageNet")(num_classes, target_rates)


def _plain(depth, pretrained, num_classes):
    model = _gated(depth, False, 1, num_classes)
    if pretrained:
        _read_pretrained("torchvision", f"resnet{depth}").load_into(model)
    return model
