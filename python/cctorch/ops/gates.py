"""Gates that training drives to 0 or 1."""

import torch
from torch import Tensor


def sigmoid_gate(x: Tensor, logit: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Multiplies every channel by a gate between 0 and 1: :math:`y_{n,c,\dots} = x_{n,c,\dots} \cdot \sigma(l_c / T)`.

    As the temperature falls during training, the gates become a step function of the logits (Savarese et al. 2020 raise
    its inverse from 1). The gates are a small vector computed by PyTorch; :func:`channel_gate` multiplies. Works under
    ``torch.vmap``.

    Args:
        x: shape ``(N, C, ...)``; float32, float64, float16 or bfloat16.
        logit: shape ``(C,)``, of the type of ``x`` or, where that is half precision, float32.
        temperature: positive.

    Returns:
        Tensor of the shape, type and dense layout of ``x``.

    Raises:
        RuntimeError: for a temperature that is not positive, or as :func:`channel_gate`.

    Example:
        >>> sigmoid_gate(torch.ones(1, 2), torch.tensor([0.0, 5.0]), temperature=0.1)
        tensor([[0.5000, 1.0000]])
    """
    y: Tensor = torch.ops.cctorch.sigmoid_gate(x, logit, temperature)
    return y


def hard_concrete(
    log_alpha: Tensor,
    training: bool = True,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples gates that are exactly 0 or 1 with some probability (Louizos et al. 2018, eq. 10 to 13).

    .. math::

        u \sim U(0, 1), \qquad s = \sigma((\log u - \log(1 - u) + \log\alpha) / \beta), \qquad
        z = \text{clamp}(s (\zeta - \gamma) + \gamma, 0, 1)

    Without ``training`` the gate is certain: :math:`s = \sigma(\log\alpha)`. Differentiable in ``log_alpha``; a gate at
    0 or 1 has no gradient. :func:`hard_concrete_open` has the penalty that goes with it.

    Args:
        log_alpha: any shape; float32, float64, float16 or bfloat16.
        training: draw ``u``, else use the certain gate.
        beta: temperature, positive.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end, above 1.
        generator: of the device of ``log_alpha``; PyTorch's default one where it is None. ``torch.compile`` takes None
            only. CUDA graphs draw anew at every replay.

    Returns:
        Gates of the shape and type of ``log_alpha``, from 0 to 1. Works under ``torch.vmap``, whose ``randomness`` must
        be "different" or "same" in training.

    Raises:
        RuntimeError: for a ``beta``, ``gamma`` or ``zeta`` out of range, or a wrong type.

    Example:
        >>> hard_concrete(torch.tensor([-10.0, 0.0, 10.0]), training=False)
        tensor([0.0000, 0.5000, 1.0000])
    """
    z: Tensor = torch.ops.cctorch.hard_concrete(log_alpha, training, beta, gamma, zeta, generator=generator)
    return z


def hard_concrete_open(log_alpha: Tensor, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1) -> Tensor:
    r"""The probability that a hard concrete gate is not 0 (Louizos et al. 2018, eq. 12).

    .. math:: P(z \ne 0) = \sigma(\log\alpha - \beta \log(-\gamma / \zeta))

    Its sum over the gates, each times the weights behind it, is the expected L0 norm, the penalty in the loss.

    Args:
        log_alpha: any shape; float32, float64, float16 or bfloat16.
        beta, gamma, zeta: as for :func:`hard_concrete`.

    Returns:
        Probabilities of the shape and type of ``log_alpha``.

    Raises:
        RuntimeError: for a ``beta``, ``gamma`` or ``zeta`` out of range, or a wrong type.

    Example:
        >>> hard_concrete_open(torch.tensor([0.0, 10.0]))
        tensor([0.8318, 1.0000])
    """
    probability: Tensor = torch.ops.cctorch.hard_concrete_open(log_alpha, beta, gamma, zeta)
    return probability
