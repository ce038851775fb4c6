"""Straight-through Gumbel-softmax sampling: one pure function and a thin Module around it.

Sources: Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017;
Maddison, Mnih, Teh, "The concrete distribution", ICLR 2017; used for the gates of
Veit, Belongie, "Convolutional networks with adaptive inference graphs", ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise from uniform samples: -log(-log(u)), the same shape.

    Finite for every u in [0, 1]: a float32 generator does return 0, and 1 after rounding, where the
    bare formula is infinite, so u is first moved to the nearest number strictly inside (0, 1).
    """
    limits = torch.finfo(uniform.dtype)
    uniform = uniform.clamp(limits.tiny, 1 - limits.eps / 2)
    return -torch.log(-torch.log(uniform))


def gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = True, noise: Tensor | None = None) -> Tensor:
    """Samples softmax((logits + g) / tau) over dim 1, or its one-hot argmax with that gradient.

    Args:
        logits: (N, K, ...), unnormalised log-probabilities of K classes.
        tau: temperature, above 0. It shapes the soft sample and the gradient, never the hard sample.
        hard: return the exact one-hot argmax, differentiated as the soft sample (straight through).
        noise: the Gumbel noise g, of the shape of logits; drawn from the default generator if None.

    Returns:
        (N, K, ...) samples that sum to 1 over dim 1.

    Raises:
        ValueError: if tau is not above 0.
    """
    if not tau > 0:
        raise ValueError(f"temperature {tau}: must be above 0")
    if noise is None:
        noise = gumbel_noise(torch.rand_like(logits))
    perturbed = logits + noise
    soft = torch.softmax(perturbed / tau, dim=1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(1, perturbed.argmax(1, keepdim=True), 1)
    return one_hot + (soft - soft.detach())  # the bracket is exactly 0, so the value is exactly 0 or 1


class GumbelSoftmax(nn.Module):
    """Module form of :func:`gumbel_softmax`, with the call signature of the original code."""

    def forward(self, logits: Tensor, temp: float = 1, force_hard: bool = False) -> Tensor:
        """Samples from logits (N, K, ...) at temperature temp.

        As in the original, the sample is soft while training unless force_hard, and hard in eval mode.
        """
        return gumbel_softmax(logits, tau=temp, hard=force_hard or not self.training)


GumbleSoftmax = GumbelSoftmax  # the original's spelling
