"""What inference graphs look like from outside: opening rates, computation, similarity, robustness; arrays, no figures.

Sources: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 4 (figures 3 to 7);
Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015 (the attack).

Shapes: N images, L blocks, K classes, R runs, E epsilons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

import engine
import inference
from convnet_aig import AdaptiveResNet, draw_noise
from utils import derive_seed, progress_bar

Arrays = dict[str, np.ndarray]
GRADIENT_PIXELS = 1 << 19  # of images whose gradient is taken together: 10 photographs, about 1 GiB for ResNet-50


# ---------------------------------------------------------------------------------------------- pixels


class Pixels:
    """Turns normalised images into pixels and back.

    Args:
        mean, std: per channel, in units of [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.mean, self.std, self.scale, self.shift = mean, std, 1 / std, -mean / std

    def of(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> the whole numbers in [0, 255] that they were made from, as floats."""
        return (images * self.std + self.mean).round_().clamp_(0, 255)

    def normalise(self, pixels: Tensor) -> Tensor:
        """The inverse of `of`, for pixels that need not be whole numbers."""
        return torch.addcmul(self.shift, pixels, self.scale)


# ---------------------------------------------------------------------------------------------- graphs of all images


class Gallery:
    """Keeps the images of each class that use the least and the most computation.

    Args:
        classes: indices of the K' classes to keep images of.
        count: of images on either side.
    """

    def __init__(self, classes: Sequence[int], count: int) -> None:
        self.count = count
        self.kept: dict[int, list[tuple[float, int, Tensor]]] = {index: [] for index in classes}

    def add(self, first: int, pixels: Tensor, labels: Tensor, macs: Tensor) -> None:
        """Takes the images of a batch, (n, 3, H, W), whose first one has the number `first`."""
        for row, (label, cost) in enumerate(zip(labels.tolist(), macs.tolist(), strict=True)):
            if label in self.kept:
                kept = self.kept[label]
                kept.append((cost, first + row, pixels[row].to("cpu", torch.uint8)))
                if len(kept) > 8 * self.count:
                    self.kept[label] = self.ends(kept)

    def ends(self, kept: list) -> list:
        """The cheapest and the dearest images, in this order; equal ones in the order of their numbers."""
        kept = sorted(kept, key=lambda image: image[:2])
        return kept if len(kept) <= 2 * self.count else [*kept[: self.count], *kept[-self.count :]]

    def arrays(self) -> Arrays:
        """classes (K',), numbers (K', 2 count), -1 where there are too few images, pixels (K', 2 count, H, W, 3)."""
        columns = 2 * self.count
        size = next(kept[0][2].shape[1:] for kept in self.kept.values() if kept)
        numbers = np.full((len(self.kept), columns), -1)
        pixels = np.zeros((len(self.kept), columns, *size, 3), np.uint8)
        for row, kept in enumerate(self.kept.values()):
            kept = self.ends(kept)
            half = (len(kept) + 1) // 2
            places = [*range(half), *range(columns - len(kept) + half, columns)]
            for column, (_, number, image) in zip(places, kept, strict=True):
                numbers[row, column], pixels[row, column] = number, image.permute(1, 2, 0).numpy()
        return {"gallery_classes": np.array(list(self.kept)), "gallery_numbers": numbers, "gallery_pixels": pixels}


def inference_graphs(
    network: nn.Module, loader: engine.Loader, cost: inference.Macs, pixels: Pixels, gallery: Gallery, seed: int
) -> Arrays:
    """The graph of every image in the network's gate mode, in the order of the loader.

    Args:
        network: in gate mode "argmax" or "sample".
        gallery: is filled.
        seed: as of `engine.predictions`.

    Returns:
        labels, predicted (N,); opened (N, L), whether the branch ran; macs (N,), multiply-accumulates.
    """
    found: dict[str, list[Tensor]] = {"labels": [], "predicted": [], "opened": [], "macs": []}
    first = 0
    for images, labels, logits, z in engine.predictions(network, loader, seed):
        macs = cost.executed(z)
        gallery.add(first, pixels.of(images), labels, macs)
        first += len(images)
        batch = {"labels": labels, "predicted": logits.argmax(1), "opened": z > 0.5, "macs": macs}
        for name, values in batch.items():
            found[name].append(values)
    return {name: torch.cat(values).cpu().numpy() for name, values in found.items()}


def means_by_class(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """values (N, ...) -> their mean over the images of each class (K, ...), NaN without images."""
    means = np.full((num_classes, *values.shape[1:]), np.nan)
    for index in np.unique(labels):
        means[index] = values[labels == index].mean(0)
    return means


def cluster(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average-linkage clustering of classes by their opening rates (K, L), leaves ordered so that neighbours are alike.

    Returns:
        The order of the classes (K,) and scipy's linkage matrix (K - 1, 4).
    """
    if len(rates) < 2:
        return np.arange(len(rates)), np.zeros((0, 4))
    # the time of optimal ordering grows with the square of the classes or faster
    tree = linkage(rates, "average", optimal_ordering=len(rates) <= 200)
    return leaves_list(tree), tree


# ---------------------------------------------------------------------------------------------- similarity


def agreement_of_classes(opened: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Mean agreement of two different images' graphs, by class: opened (N, L) -> (K, K), NaN without a pair.

    The agreement of two graphs is the fraction of the L gates that decide alike.
    """
    counts = np.bincount(labels, minlength=num_classes).astype(float)
    ones = means_by_class(opened, labels, num_classes) * counts[:, None]  # (K, L) images that open the gate
    ones = np.nan_to_num(ones)
    zeros = counts[:, None] - ones
    alike = ones @ ones.T + zeros @ zeros.T  # (K, K) pairs x gates
    np.fill_diagonal(alike, alike.diagonal() - opened.shape[1] * counts)  # no image is paired with itself
    pairs = np.outer(counts, counts) - np.diag(counts)
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, alike / (pairs * opened.shape[1]), np.nan)


def within_and_between(opened: np.ndarray, boundaries: np.ndarray) -> tuple[float, float]:
    """Mean agreement over all pairs of images of the same class, and over all pairs of different classes.

    Args:
        opened: (N, L), the images of a class after each other.
        boundaries: where each class begins.
    """
    counts = np.diff([*boundaries, len(opened)])[:, None].astype(float)  # (K, 1)
    ones = np.add.reduceat(opened, boundaries, axis=0, dtype=float)  # (K, L)

    def alike(ones: np.ndarray, counts: np.ndarray) -> float:
        zeros = counts - ones
        return float((ones * (ones - 1) + zeros * (zeros - 1)).sum())

    total, gates = len(opened), opened.shape[1]
    inside = alike(ones, counts)
    outside = alike(ones.sum(0), np.array([total])) - inside
    pairs_inside = float((counts * (counts - 1)).sum())
    pairs_outside = total * (total - 1.0) - pairs_inside
    ratio = [np.divide(a, gates * b) if b else np.nan for a, b in ((inside, pairs_inside), (outside, pairs_outside))]
    return float(ratio[0]), float(ratio[1])


def similarity(opened: np.ndarray, labels: np.ndarray, num_classes: int, permutations: int, seed: int) -> Arrays:
    """Are graphs of one class more alike than those of different classes, beyond chance?

    The measure is the mean agreement within classes minus that between them; chance is what it is when the labels are
    shuffled among the images.

    Args:
        opened: (N, L), the decisions of the L gates.
        permutations: number of shuffles.

    Returns:
        agreement (K, K), see `agreement_of_classes`; within, between; excess, their difference; shuffled, the same for
        shuffled labels (permutations,); p = (1 + number of those at least as large) / (1 + permutations).
    """
    by_class = np.argsort(labels, kind="stable")
    boundaries = np.unique(labels[by_class], return_index=True)[1]
    within, between = within_and_between(opened[by_class], boundaries)
    random = np.random.default_rng(derive_seed(seed, "permutations"))
    shuffled = []
    for _ in progress_bar(range(permutations), "permutations", permutations, "permutation"):
        inside, outside = within_and_between(opened[random.permutation(len(opened))], boundaries)
        shuffled.append(inside - outside)
    # sums in float64 are exact here, but for the last division: what is equal may differ in the last digit
    larger = np.sum(np.array(shuffled) >= within - between - 1e-12)
    return {
        "agreement": agreement_of_classes(opened, labels, num_classes),
        "within": np.array(within),
        "between": np.array(between),
        "excess": np.array(within - between),
        "shuffled": np.array(shuffled),
        "p": np.array((1 + larger) / (1 + permutations)),
    }


# -------------------------------------------------------------------------------------------- accuracy and computation


def operating_points(
    model: AdaptiveResNet, loader: engine.Loader, points: Sequence[tuple[str, float]], **settings: Any
) -> list[dict[str, Any]]:
    """What `--test` measures in each of some (gate mode, threshold).

    Args:
        settings: of `engine.test`.

    Returns:
        For each point its gate mode and threshold (NaN in other modes than argmax), error in percent, execution_rate,
        macs_mean, macs_fraction, macs_paper.
    """
    usual = model.gate_mode, model.threshold
    found = []
    for mode, threshold in progress_bar(points, "operating points", len(points), "point"):
        model.gate_mode, model.threshold = mode, threshold
        result = engine.test(model, loader, **settings)
        values = {name: result[name] for name in ("execution_rate", "macs_mean", "macs_fraction", "macs_paper")}
        at = threshold if mode == "argmax" else float("nan")
        found.append({"mode": mode, "threshold": at, "error": 100 - result["top1"], **values})
    model.gate_mode, model.threshold = usual
    return found


# ---------------------------------------------------------------------------------------------- robustness


def gradient_sign(model: AdaptiveResNet, normalised: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
    """The sign of the gradient of the cross entropy by the images, (N, 3, H, W), in the model's mode and gate mode.

    Through hard gates it is the straight-through one, see `AdaptiveResNet`: an attack that sees through them.
    Normalising does not change signs, so this is the sign for pixels, too.
    """
    size = max(1, GRADIENT_PIXELS // (normalised.shape[2] * normalised.shape[3]))
    noises = [None] * len(labels.split(size)) if noise is None else noise.split(size, dim=1)
    signs = []
    for images, target, part in zip(normalised.split(size), labels.split(size), noises, strict=True):
        images = images.detach().clone().requires_grad_()
        logits, _ = model(images, noise=part)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), images)
        signs.append(gradient.sign())
    return torch.cat(signs)


def fgsm(pixels: Tensor, sign: Tensor, epsilon: float) -> Tensor:
    """x + epsilon sign(grad), within the range of pixels: the fast gradient sign method.

    Args:
        pixels: (N, 3, H, W) in [0, 255].
        sign: of the gradient, see `gradient_sign`.
        epsilon: in units of the whole range.
    """
    return (pixels + 255 * epsilon * sign).clamp(0, 255)


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 255], rounded to whole numbers and once compressed at this quality, as floats."""
    images = (TF.to_pil_image(image) for image in pixels.round().to("cpu", torch.uint8))
    # through Pillow: for tensors torchvision uses encoders of its own, which are to be removed
    return torch.stack([TF.pil_to_tensor(TF.jpeg(image, quality)) for image in images]).to(pixels)


def robustness(
    model: AdaptiveResNet,
    loader: engine.Loader,
    pixels: Pixels,
    epsilons: Sequence[float],
    quality: int,
    cost: inference.Macs,
    seed: int,
) -> Arrays:
    """Accuracy under FGSM, without and with JPEG compression of the attacked images, and what becomes of the graphs.

    The attack takes the gradient in the model's own gate mode; in "sample" with the noise of the evaluation, that of
    `engine.predictions` for this seed.

    Returns:
        Arrays (2, E), without and with compression: error in percent; execution_rate; macs_mean; gates_changed, the
        fraction of gate decisions that differ from those on the images as they are; images_changed, the fraction of
        images with at least one such decision.
    """
    network = engine.accelerate(model, loader)
    gated = torch.tensor([block.gated for block in model.blocks()])
    names = ("wrong", "executed", "macs", "gates_changed", "images_changed")
    sums = {name: np.zeros((2, len(epsilons))) for name in names}
    torch.manual_seed(seed)
    for images, labels in progress_bar(loader.batches(), "attacking", len(loader), "batch"):
        noise = draw_noise(model.num_gates, len(images), images) if model.gate_mode == "sample" else None
        original = pixels.of(images)
        clean = pixels.normalise(original)
        sign = gradient_sign(model.eval(), clean, labels, noise)
        usual = torch.stack(network(clean, noise=noise)[1], dim=1)  # (n, L)
        for column, epsilon in enumerate(epsilons):
            attacked = fgsm(original, sign, epsilon)
            for row, seen in enumerate((attacked, jpeg(attacked, quality))):
                logits, gates = network(pixels.normalise(seen), noise=noise)
                z = torch.stack(gates, dim=1)
                changed = (z != usual)[:, gated]
                values = (logits.argmax(1) != labels, z, cost.executed(z), changed, changed.any(1))
                for name, value in zip(names, values, strict=True):
                    sums[name][row, column] += value.sum().item()
    count, gates = loader.num_images, max(1, int(gated.sum()))
    return {
        "error": 100 * sums["wrong"] / count,
        "execution_rate": sums["executed"] / (count * len(gated)),
        "macs_mean": sums["macs"] / count,
        "gates_changed": sums["gates_changed"] / (count * gates),
        "images_changed": sums["images_changed"] / count,
    }
