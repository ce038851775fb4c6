"""Gumbel noise is finite everywhere, and samples and gradients are those of the papers."""

import pytest
import torch

from gumbelmodule import GumbelSoftmax, GumbleSoftmax, gumbel_noise, gumbel_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_noise_is_finite_at_the_ends_of_the_uniform_range(device, dtype):
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    below_one = torch.nextafter(one, zero) if dtype.itemsize > 2 else one - torch.finfo(dtype).eps / 2
    above_zero = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    noise = gumbel_noise(torch.stack([zero, above_zero, below_one, one]).to(device))
    assert noise.isfinite().all()
    assert noise[0] <= noise[1] < 0 < noise[2] <= noise[3]


def test_noise_is_finite_for_every_float32_that_the_generator_returns(device):
    multiples = torch.arange(2**24, dtype=torch.float32, device=device) / 2**24  # torch.rand's grid
    noise = gumbel_noise(multiples)
    assert noise.isfinite().all()
    assert (noise.diff() >= 0).all()


def test_noise_has_the_moments_of_a_gumbel_distribution():
    n = 200_000
    noise = gumbel_noise(torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    euler, variance = 0.5772156649, torch.pi**2 / 6
    assert abs(noise.mean() - euler) < 4 * (variance / n) ** 0.5
    assert abs(noise.var() - variance) < 4 * ((5.4 - 1) * variance**2 / n) ** 0.5  # kurtosis 5.4


def test_hard_samples_follow_the_softmax_of_the_logits(device):
    n = 100_000
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 2.0], device=device).expand(n, 2)
    p = torch.softmax(logits[0], 0)[1].item()
    rate = gumbel_softmax(logits)[:, 1].mean().item()
    assert abs(rate - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_hard_samples_are_exactly_one_hot_and_carry_the_gradient_of_the_soft_ones(device):
    torch.manual_seed(0)
    logits = torch.randn(1000, 3, device=device, requires_grad=True)
    noise, weights, tau = gumbel_noise(torch.rand(1000, 3)).to(device), torch.randn(1000, 3).to(device), 0.7
    hard = gumbel_softmax(logits, tau, noise=noise)
    soft = gumbel_softmax(logits, tau, hard=False, noise=noise)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert (hard.sum(1) == 1).all()
    assert torch.equal(hard.argmax(1), soft.argmax(1))
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), logits)[0] for x in (hard, soft)))


def test_soft_samples_are_the_formula():
    logits, noise = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    expected = torch.exp((logits + noise) / 0.3)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(gumbel_softmax(logits, 0.3, hard=False, noise=noise), expected)


def test_temperature_changes_soft_samples_but_no_decision():
    torch.manual_seed(0)
    logits, noise = torch.randn(1000, 2), gumbel_noise(torch.rand(1000, 2))
    assert torch.equal(gumbel_softmax(logits, 0.1, noise=noise), gumbel_softmax(logits, 10, noise=noise))
    cold, warm = (gumbel_softmax(logits, tau, hard=False, noise=noise) for tau in (0.1, 10))
    assert (cold - 0.5).abs().mean() > 2 * (warm - 0.5).abs().mean()


@pytest.mark.parametrize("tau", [0, -1, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(tau):
    with pytest.raises(ValueError, match="temperature"):
        gumbel_softmax(torch.zeros(1, 2), tau)


def test_non_finite_logits_stay_visible():
    assert gumbel_softmax(torch.tensor([[0.0, float("nan")]])).isnan().any()


def test_the_module_keeps_the_call_of_the_original():
    assert GumbleSoftmax is GumbelSoftmax
    module, logits = GumbelSoftmax(), torch.randn(50, 2)
    assert not set(module(logits, temp=0.5).unique().tolist()) <= {0.0, 1.0}
    assert set(module(logits, temp=0.5, force_hard=True).unique().tolist()) <= {0.0, 1.0}
    assert set(module.eval()(logits).unique().tolist()) <= {0.0, 1.0}
