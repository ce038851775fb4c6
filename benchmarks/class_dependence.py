"""Do the gates treat the classes differently, beyond chance? A permutation test on the test images.

    python -m benchmarks.class_dependence --resume runs/NAME/model_best.pth.tar

Takes the flags of train.py. The statistic is the variance over the classes of a gate's opening rate, averaged over the
gates; the null distribution shuffles the labels. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from tqdm import tqdm

import cli
import train
import utils

PERMUTATIONS = 999


def variance_over_classes(z: np.ndarray, one_hot: np.ndarray) -> float:
    """z (N, L), one_hot (N, K) -> mean over the blocks of the variance over the classes of the opening rates."""
    rates = one_hot.T @ z / one_hot.sum(0)[:, None]  # (K, L)
    return float(rates.var(0).mean())


def permutation_test(z: np.ndarray, labels: np.ndarray, permutations: int, seed: int) -> dict[str, float]:
    """The statistic, its mean under shuffled labels, and p = (1 + number at least as large) / (1 + permutations)."""
    one_hot = np.eye(labels.max() + 1)[labels]
    random = np.random.default_rng(seed)
    observed = variance_over_classes(z, one_hot)
    shuffled = [
        variance_over_classes(z, one_hot[random.permutation(len(z))])
        for _ in tqdm(range(permutations), "permutations", disable=None, leave=False)
    ]
    p = (1 + sum(value >= observed for value in shuffled)) / (1 + permutations)
    return {"statistic": observed, "shuffled_mean": float(np.mean(shuffled)), "p": p, "permutations": permutations}


@torch.inference_mode()
def gate_decisions(model: torch.nn.Module, loader: object) -> tuple[np.ndarray, np.ndarray]:
    """The multipliers (N, L) of all images and their labels (N,)."""
    model.eval()
    torch.manual_seed(0)
    gates, labels = [], []
    for images, y in tqdm(loader.batches(), "evaluating", len(loader), disable=None, leave=False):
        gates.append(torch.stack(model(images)[1], 1))
        labels.append(y)
    return torch.cat(gates).cpu().numpy(), torch.cat(labels).cpu().numpy()


def main() -> None:
    args, checkpoint = cli.parse(train.make_parser(), ["--test", *sys.argv[1:]], ("depth",))
    loaded = train.load_data(args, checkpoint)
    model = train.make_model(args, len(loaded.val.classes))
    utils.load_weights(model, checkpoint["state_dict"], args.resume)
    model.to(cli.select(args), memory_format=torch.channels_last).gate_mode = args.gate_mode
    z, labels = gate_decisions(model, loaded.val)
    result = permutation_test(z, labels, PERMUTATIONS, args.seed)
    print(json.dumps({"gate_mode": args.gate_mode, "images": len(z), **result}))


if __name__ == "__main__":
    cli.main(main, "class_dependence")
