"""What inference graphs look like from outside: opening rates, computation, similarity, robustness; arrays, no figures.

Sources: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 4 (figures 3 to 7);
Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015 (the attack).

Shapes: N images, L blocks, K classes, R runs, E epsilons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from aig.console import progress_bar
from aig.data import Loader
from aig.environment import derive_seed
from aig.evaluation import accelerated_for, measure, predictions
from aig.inference import count_macs
from aig.losses import Objective
from convnet_aig import AdaptiveResNet, draw_noise

Arrays = dict[str, np.ndarray]
GRADIENT_PIXELS = 1 << 19  # pixels in a batch for gradients: 10 photographs, about 1 GiB for ResNet-50


# ---------------------------------------------------------------------------------------------- graphs of all images


def inference_graphs(model: AdaptiveResNet, loader: Loader, seed: int) -> Arrays:
    """The graph of every image in the network's gate mode, "argmax" or "sample", in the order of the loader.

    Args:
        seed: see `evaluation.predictions`.

    Returns:
        classes (K,), the names of those that have images; labels (N,), indices into them; guesses (N,), names of the
        predicted classes; right (N,), whether they are the labels'; opened (N, L), whether the branch ran;
        executed (N,), the number of these; macs (N,), multiply-accumulates.
    """
    cost = count_macs(model, loader.size)
    batches = [
        (labels, logits.argmax(1), z > 0.5, cost.executed(z))
        for _, labels, logits, z in predictions(accelerated_for(model, loader), loader, seed)
    ]
    labels, predicted, opened, macs = (torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True))
    names = np.array(loader.classes)
    present, indices = np.unique(labels, return_inverse=True)
    return {
        "classes": names[present],
        "labels": indices,
        "guesses": names[predicted],
        "right": predicted == labels,
        "opened": opened,
        "executed": opened.sum(1),
        "macs": macs,
    }


def cluster(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average-linkage clustering of classes by their opening rates (K, L), leaves ordered so that neighbours are alike.

    Returns the order of the classes (K,) and scipy's linkage matrix (K - 1, 4).
    """
    if len(rates) < 2:
        return np.arange(len(rates)), np.zeros((0, 4))
    # the time of optimal ordering grows with the square of the classes or faster
    tree = linkage(rates, "average", optimal_ordering=len(rates) <= 200)
    return leaves_list(tree), tree


# ---------------------------------------------------------------------------------------------- similarity


def compare(opened: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Compares the graphs, opened (N, L), of all ordered pairs of different images.

    Returns by classes, (K, K), how many gates decide alike and how many were compared: exact sums in float64.
    """
    gates, counts = opened.shape[1], np.bincount(labels, minlength=num_classes).astype(float)
    ones = np.stack([np.bincount(labels, gate, num_classes) for gate in opened.T], axis=1)  # (K, L) images that open it
    zeros = counts[:, None] - ones
    alike = ones @ ones.T + zeros @ zeros.T - np.diag(gates * counts)  # no image is paired with itself
    return alike, gates * (np.outer(counts, counts) - np.diag(counts))


def within_and_between(alike: np.ndarray, compared: np.ndarray) -> tuple[float, float]:
    """The agreement within classes and between them, as fractions, from what `compare` returns."""
    inside, pairs = np.trace(alike), np.trace(compared)
    return inside / pairs, (alike.sum() - inside) / (compared.sum() - pairs)


def similarity(opened: np.ndarray, labels: np.ndarray, num_classes: int, permutations: int, seed: int) -> Arrays:
    """Are graphs of one class more alike than those of different classes, beyond chance?

    The measure is the mean agreement within classes minus that between them; chance is what it is when the labels are
    shuffled among the images. There must be two classes, and two images of one of them.

    Args:
        opened: (N, L), the decisions of the L gates.
        permutations: number of shuffles.

    Returns:
        agreement (K, K), the fraction of gates that decide alike in two images of these classes, NaN without a pair;
        within, between; excess, their difference; shuffled, the same for shuffled labels (permutations,);
        p = (1 + number of those at least as large) / (1 + permutations).
    """
    alike, compared = compare(opened, labels, num_classes)
    within, between = within_and_between(alike, compared)
    excess = within - between
    random = np.random.default_rng(derive_seed(seed, "permutations"))
    ordered = np.sort(labels)
    shuffled = np.zeros(permutations)
    for index in progress_bar(range(permutations), "permutations", permutations, "permutation"):
        mixed = opened[random.permutation(len(opened))]
        inside, outside = within_and_between(*compare(mixed, ordered, num_classes))
        shuffled[index] = inside - outside
    # the counts are exact and only the division rounds: equal values may differ in the last digit
    p = (1 + np.sum(shuffled >= excess - 1e-12)) / (1 + permutations)
    with np.errstate(invalid="ignore"):
        agreement = alike / compared
    return {
        "agreement": agreement,
        "within": within,
        "between": between,
        "excess": excess,
        "shuffled": shuffled,
        "p": p,
    }


# -------------------------------------------------------------------------------------------- accuracy and computation


def operating_points(
    model: AdaptiveResNet, loader: Loader, points: Sequence[tuple[str, float]], samples: int, seed: int
) -> list[dict[str, Any]]:
    """Measures the network as `--test` does, once for each (gate mode, threshold); see `evaluation.measure`.

    Returns for each mode, threshold (NaN unless one for all gates), error in percent, execution_rate, macs_mean,
    macs_fraction and macs_paper.
    """
    # the target rates matter only to the loss, which nothing here reports
    rates = [1.0] * len(list(model.blocks()))
    objective = Objective(rates, 0, device=next(model.parameters()).device)
    usual = model.gate_mode, model.threshold
    found = []
    for mode, threshold in progress_bar(points, "operating points", len(points), "point"):
        model.gate_mode, model.threshold = mode, threshold
        result = measure(model, loader, objective, samples=samples, seed=seed)
        values = {name: result[name] for name in ("execution_rate", "macs_mean", "macs_fraction", "macs_paper")}
        at = threshold if mode == "argmax" and isinstance(threshold, float) else math.nan  # one for all gates
        found.append({"mode": mode, "threshold": at, "error": 100 - result["top1"], **values})
    model.gate_mode, model.threshold = usual
    return found


# ---------------------------------------------------------------------------------------------- robustness


def gradient_sign(model: AdaptiveResNet, normalised: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    """The sign of the gradient of the cross entropy by the images, (N, 3, H, W), in the model's mode and gate mode.

    Through hard gates it is the straight-through one, see `AdaptiveResNet`: an attack that sees through them.
    Normalising does not change signs, so this is the sign for pixels, too.
    """
    size = max(1, GRADIENT_PIXELS // (normalised.shape[2] * normalised.shape[3]))
    parts = zip(normalised.split(size), labels.split(size), noise.split(size, dim=1), strict=True)
    signs = []
    for images, target, part in parts:
        images = images.detach().clone().requires_grad_()
        logits, _ = model(images, noise=part)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), images)
        signs.append(gradient.sign())
    return torch.cat(signs)


def fgsm(pixels: Tensor, sign: Tensor, epsilon: float) -> Tensor:
    """x + epsilon sign(grad) of pixels (N, 3, H, W), clipped to [0, 255]; epsilon is a part of that range."""
    return (pixels + 255 * epsilon * sign).clamp(0, 255)


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 255], rounded to whole numbers and once compressed at this quality, as floats."""
    images = (TF.to_pil_image(image) for image in pixels.round().to("cpu", torch.uint8))
    # through Pillow: for tensors torchvision uses encoders of its own, which are to be removed
    return torch.stack([TF.pil_to_tensor(TF.jpeg(image, quality)) for image in images]).to(pixels)


def robustness(
    model: AdaptiveResNet, loader: Loader, epsilons: Sequence[float], quality: int, seed: int
) -> Arrays:
    """Accuracy under FGSM, without and with JPEG compression of the attacked images, and what becomes of the graphs.

    The attack takes the gradient in the model's own gate mode. In "sample" it knows the noise of the evaluation, which
    is the one of `evaluation.predictions` for this seed.

    Returns:
        Arrays (2, E), without and with compression: error in percent; execution_rate; macs_mean; gates_changed, the
        fraction of gate decisions that the attack changes; images_changed, the fraction of images with such a decision.
    """
    network, cost, normaliser = accelerated_for(model, loader), count_macs(model, loader.size), loader.normaliser
    gated = torch.tensor([block.gated for block in model.blocks()])
    names = ("wrong", "executed", "macs", "gates_changed", "images_changed")
    sums = {name: np.zeros((2, len(epsilons))) for name in names}
    torch.manual_seed(seed)
    for images, labels in progress_bar(loader.batches(), "attacking", len(loader), "batch"):
        noise = draw_noise(model.num_gates, len(images), images)  # only gate mode "sample" looks at it
        original = normaliser.pixels(images)
        clean = normaliser(original)
        sign = gradient_sign(model.eval(), clean, labels, noise)
        usual = torch.stack(network(clean, noise=noise)[1], dim=1)  # (n, L)
        for column, epsilon in enumerate(epsilons):
            attacked = fgsm(original, sign, epsilon)
            for row, seen in enumerate((attacked, jpeg(attacked, quality))):
                logits, gates = network(normaliser(seen), noise=noise)
                z = torch.stack(gates, dim=1)
                changed = (z != usual)[:, gated]
                values = (logits.argmax(1) != labels, z, cost.executed(z), changed, changed.any(1))
                for name, value in zip(names, values, strict=True):
                    sums[name][row, column] += value.sum().item()
    count, gates = loader.num_images, max(1, model.num_gates)
    return {
        "error": 100 * sums["wrong"] / count,
        "execution_rate": sums["executed"] / (count * len(gated)),
        "macs_mean": sums["macs"] / count,
        "gates_changed": sums["gates_changed"] / (count * gates),
        "images_changed": sums["images_changed"] / count,
    }
