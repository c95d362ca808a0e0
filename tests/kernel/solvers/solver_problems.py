"""Kernels with their labels, and the plain forms that solvers are compared with."""

import numpy as np

from hf_ft_ext.kernel.solvers import (
    KernelModel,
    KernelSystem,
    SolverOptions,
)


def solved(options: SolverOptions, kernel, labels, start=None) -> KernelModel:
    return KernelSystem(options, kernel, labels, start).solve()


def problem(classes: int, scalars: int, n: int = 24, m: int = 40, seed: int = 0, kernels: int = 1):
    """Jacobians with a direction per class; kernels of train with train and with test, and labels."""
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(classes, 6))
    labels, truth = np.arange(n) % classes, np.arange(m) % classes
    size = 6 * scalars

    def jacobians(labels):
        features = means[labels] + rng.normal(size=(len(labels), 6))
        return np.einsum("nf,ab->nafb", features, np.eye(scalars)).reshape(len(labels), scalars, size)

    train, test = jacobians(labels), jacobians(truth)
    products = [(train, test), (np.sign(train), test), (train, np.sign(test))][-kernels:] if kernels == 2 else None
    if kernels == 2:
        kernel = np.stack([np.einsum("iap,jbp->iajb", np.sign(train), train)] * 2)
        kernel[1] = kernel[0].transpose(2, 3, 0, 1)
        other = np.stack([np.einsum("iap,jbp->iajb", a, b) for a, b in products])
        return kernel, labels, other, truth
    return (
        np.einsum("iap,jbp->iajb", train, train)[None],
        labels,
        np.einsum("iap,jbp->iajb", train, test)[None],
        truth,
    )


def random_problem(scalars: int, n: int = 15, m: int = 9, seed: int = 0, symmetric: bool = True):
    """Kernels of full rank in which all scalars are coupled, with their test side, two kernels each."""
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(n, scalars, 4 * n * scalars)), rng.normal(size=(m, scalars, 4 * n * scalars))
    left = train if symmetric else np.tanh(3 * train)
    right = test if symmetric else np.tanh(3 * test)
    kernel = np.stack([np.einsum("iap,jbp->iajb", left, train), np.einsum("iap,jbp->iajb", train, left)])
    other = np.stack([np.einsum("iap,jbp->iajb", left, test), np.einsum("iap,jbp->iajb", train, right)])
    return kernel, other


# --- the plain way, one system for each regularization ---------------------------------------------------


def flat(kernel: np.ndarray) -> np.ndarray:
    n, c, m = kernel.shape[:3]
    return kernel.reshape(n * c, m * c)
