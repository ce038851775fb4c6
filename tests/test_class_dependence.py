"""The permutation test finds class-dependent gates, and finds nothing where there is nothing."""

import numpy as np

from benchmarks.class_dependence import permutation_test


def test_gates_that_follow_the_class_are_found():
    labels = np.arange(1000) % 10
    z = (np.random.default_rng(0).random((1000, 9)) < 0.3 + 0.05 * labels[:, None]).astype(float)
    assert permutation_test(z, labels, 199, seed=0)["p"] == 1 / 200


def test_gates_that_ignore_the_class_are_at_chance():
    random, labels = np.random.default_rng(0), np.arange(300) % 10
    p = [permutation_test((random.random((300, 5)) < 0.5).astype(float), labels, 49, seed)["p"] for seed in range(60)]
    # p is uniform on {1/50, ..., 1} then: mean 0.51, standard deviation 0.289
    assert abs(np.mean(p) - 0.51) < 4 * 0.289 / 60**0.5
