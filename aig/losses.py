"""The loss of a training and its sums: cross entropy, the target rates of the gates, accuracies.

Source: Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018, sec. 3.3.

Each term of the loss has a name. Records, progress bar, tables and dashboard show whatever terms there are, as
`loss_NAME`. A further term is a line in `Objective.of_rates`, or one in `of_images` and a name in `terms` below it.

Shapes: N images, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aig.distributed import ALONE, World
from aig.terms import Budget, Distillation


def target_rate_loss(rates: Tensor, target_rates: Tensor) -> Tensor:
    """The paper's target-rate loss, mean_l (t[l] - r[l])^2, for t (L,) and r[l] = mean_n z[n, l] over a batch, (L,)."""
    return (target_rates - rates).square().mean()


def topk_correct(logits: Tensor, labels: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """{"topK": number of images whose label is among the min(k, K) highest of logits (N, K)}, 0-d tensors."""
    predicted = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # (N, max k)
    hits = predicted == labels[:, None]
    return {f"top{k}": hits[:, :k].sum() for k in ks}


class Objective:
    """What training minimises: cross entropy + lossfact * target-rate loss, by default.

    Args:
        target_rates: t_l of each block.
        lossfact: weight of the target-rate loss.
        topk: the k of the accuracies.
        device: where the network is.
        world: the processes that share each batch.
        budget: takes the place of the target rates.
        distillation: a teacher.
    """

    def __init__(
        self,
        target_rates: Sequence[float],
        lossfact: float,
        topk: Sequence[int] = (1,),
        device: torch.device | str = "cpu",
        world: World = ALONE,
        budget: Budget | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.rates = torch.tensor(target_rates, dtype=sum_dtype(torch.device(device)), device=device)  # (L,)
        self.lossfact, self.topk, self.world = lossfact, tuple(topk), world
        self.budget, self.distillation = budget, distillation
        terms = ("loss_classify", *(("loss_distill",) if distillation else ()), *self.of_rates(self.rates))
        # of the sums, beside `gates`
        self.names = (*terms, *self.of_execution(self.rates), *(f"top{k}" for k in topk))

    def of_images(
        self, logits: Tensor, y: Tensor, reduction: str = "mean", images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms that are means (or sums) over images, for logits (n, K) and labels (n,).

        A teacher needs the images themselves, (n, 3, H, W).
        """
        terms = {"loss_classify": F.cross_entropy(logits, y, reduction=reduction)}
        if self.distillation:
            terms["loss_classify"] = (1 - self.distillation.weight) * terms["loss_classify"]
            terms["loss_distill"] = self.distillation.term(logits, images, reduction)
        return terms

    def of_rates(self, rates: Tensor, warm: float | None = None) -> dict[str, Tensor]:
        """The terms that depend only on the gates' rates (L,) over the whole batch, or the whole set.

        `warm` is how far the target rates have come from 1 to their values, None for all the way.
        """
        if self.budget:
            terms = self.budget.terms(rates, 1 if warm is None else warm)
        else:
            target = self.rates.to(rates.dtype)
            target = target if warm is None else 1 - warm * (1 - target)
            terms = {"loss_target": self.lossfact * target_rate_loss(rates, target)}
        return terms

    def of_execution(self, rates: Tensor) -> dict[str, Tensor]:
        """What is recorded of branches executed at these rates, (L,)."""
        return self.budget.recorded(rates) if self.budget else {}

    def __call__(
        self,
        logits: Tensor,
        y: Tensor,
        gates: list[Tensor],
        batch_size: int,
        warm: float | None = None,
        images: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's n images of a batch of N, which may be computed in parts of N' images.

        The loss is n W / N (terms of the images) + N' / N (terms of the rates): the mean of its gradients over the W
        processes, which DistributedDataParallel takes, is the gradient of the whole batch's loss.

        Args:
            logits, y: (n, K) and (n,).
            gates: z (n,) of each block.
            batch_size: N, of all processes and parts.
            warm, images: see `of_rates` and `of_images`.

        Returns:
            The loss, and detached sums over this part in all processes: gates (L,), each term, top-k hits.
        """
        dtype = torch.promote_types(logits.dtype, torch.float32)  # what was computed in 16 bits goes on in 32
        logits, z, count = logits.to(dtype), torch.stack(gates, dim=1).to(dtype), len(y)  # (n, K), (n, L)
        opened = z.sum(0)
        of_images = self.of_images(logits, y, images=images)
        sums: dict[str, Tensor] = {}
        add(sums, count=torch.full((), count, device=z.device), gates=opened.detach())
        add(sums, **{name: term.detach() * count for name, term in of_images.items()})
        add(sums, **topk_correct(logits.detach(), y, self.topk))
        sums = self.world.total(sums)
        total = sums.pop("count").to(dtype)
        # DDP divides gradients by W, and each process differentiates only its own images: multiply by W
        rates = (sums["gates"].to(dtype) + self.world.size * (opened - opened.detach())) / total
        of_rates = self.of_rates(rates, warm)
        recorded = of_rates | self.of_execution(rates)
        add(sums, **{name: term.detach() * total for name, term in recorded.items()})
        share, part = count * self.world.size / batch_size, total / batch_size
        return sum(of_images.values()) * share + sum(of_rates.values()) * part, sums


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 for sums; float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def add(sums: dict[str, Tensor], **values: Tensor) -> None:
    """Adds tensors to running sums, in place where there is one already: no read from the device."""
    for name, value in values.items():
        sums[name] = sums[name].add_(value) if name in sums else value.to(sum_dtype(value.device), copy=True)


def averages(sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """Sums over `count` images as the means of a record: loss, its terms, accuracies in percent, execution_rate.

    Reads from the device, once.
    """
    names = sorted(name for name in sums if name.startswith(("loss_", "top", "macs_")))
    *values, execution_rate = (torch.stack([*(sums[name] for name in names), sums["gates"].mean()]) / count).tolist()
    means = dict(zip(names, values, strict=True))
    loss = sum(mean for name, mean in means.items() if name.startswith("loss_"))
    means = {name: 100 * mean if name.startswith("top") else mean for name, mean in means.items()}
    return {"loss": loss, **means, "execution_rate": execution_rate}
