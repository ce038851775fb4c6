"""Optional terms of the loss, beyond the paper: a budget for the whole network, and a teacher.

Shapes: n images, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """One target for the whole network in place of a rate for each gate: W (M - B)^2.

    M = fixed + sum_l branches[l] r[l] is what a batch executes at rates r (L,), in multiply-accumulates of the dense
    network. W sum_l max(0, floor - r[l])^2 keeps gates from closing for good before they have learned which images
    need the branch (as in Verelst, Tuytelaars, "Dynamic convolutions", CVPR 2020).
    """

    fraction: float  # B
    weight: float  # W
    fixed: float  # what every image executes: stem, shortcuts, gates, head
    branches: Tensor  # (L,), of each block
    floor: float = 0  # the rate below which no gate is to fall; 0 leaves them free

    def executed(self, rates: Tensor) -> Tensor:
        """M at these rates, (L,) -> 0-d."""
        return self.fixed + rates @ self.branches.to(rates)

    def recorded(self, rates: Tensor) -> dict[str, Tensor]:
        """What records say of it."""
        return {"macs_fraction": self.executed(rates), "macs_budget": torch.full_like(rates[0], self.fraction)}

    def terms(self, rates: Tensor, warm: float = 1) -> dict[str, Tensor]:
        """The terms of the loss. `warm`, from 0 to 1: how far the floor has come down from 1."""
        terms = {"loss_budget": self.weight * (self.executed(rates) - self.fraction).square()}
        if self.floor:
            floor = 1 - warm * (1 - self.floor)
            terms["loss_floor"] = self.weight * F.relu(floor - rates).square().sum()
        return terms


@dataclass(frozen=True)
class Distillation:
    """A trained network teaches: w T^2 KL(softmax(teacher / T) || softmax(logits / T)), cross entropy at 1 - w.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """

    teacher: Callable[[Tensor], Tensor]  # images (n, 3, H, W) -> logits (n, K), without a gradient
    weight: float = 0.5  # w
    temperature: float = 4  # T
    digest: str = ""  # of the teacher's weights

    def term(self, logits: Tensor, images: Tensor, reduction: str) -> Tensor:
        """The term for logits (n, K) of these images, as a mean or a sum over them."""
        student, teacher = (F.log_softmax(each / self.temperature, dim=1) for each in (logits, self.teacher(images)))
        reduction = "batchmean" if reduction == "mean" else reduction
        return self.weight * self.temperature**2 * F.kl_div(student, teacher, reduction=reduction, log_target=True)
