"""A layer of an LSTM whose weights may be products of two factors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    weight_hr: Sequence[Tensor] = (),
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One layer of an LSTM, in one direction, over all steps.

    For every step t, with :math:`\sigma` the logistic function and :math:`\circ` the product of elements,

    .. math::
        [i\;f\;g\;o] &= x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh} \\
        c_t &= \sigma(f) \circ c_{t-1} + \sigma(i) \circ \tanh(g) \\
        h_t &= \sigma(o) \circ \tanh(c_t),

    times :math:`W_{hr}^T` where that is given. Each weight is one matrix, or two factors of it, (rank, inputs) and
    (outputs, rank), applied in turn: :math:`h\,\text{first}^T\,\text{second}^T`. The products of all ``x`` are one for
    all steps.

    The steps are a loop in C++, each the products and one pass over what they give, which has a backward of one pass
    too: it makes the activations again from the gates. Derivatives of any order, autocast, :func:`torch.vmap` and
    :mod:`torch.func` see through it. A program of ``torch.compile`` or ``torch.export`` has the steps one after
    another, and so is for one number of them; with ``batch_sizes``, whose values decide, there is none.

    On CUDA cuDNN goes through all steps at once, with the product of ``weight_hh``'s factors, where that has at most
    2^24 elements (2^23 without gradients) and nothing has to see the steps. It is what ``nn.LSTM`` is there: in TF32
    for float32, unless ``torch.backends.cudnn.allow_tf32`` is off, and without second derivatives and batches of
    gradients: for these put ``torch.backends.cudnn.flags(enabled=False)`` around the call.

    Args:
        x: shape ``(steps, batch, inputs)``; the data of a packed sequence, ``(rows, inputs)``, with ``batch_sizes``.
        h: outputs of the step before the first, shape ``(batch, outputs)``.
        c: cells of that step, shape ``(batch, hidden)``.
        weight_ih: shape ``(4 hidden, inputs)``, or the factors, as a list of one or two.
        weight_hh: shape ``(4 hidden, outputs)``, or the factors.
        weight_hr: shape ``(outputs, hidden)``, or the factors; empty: ``outputs = hidden``.
        bias_ih: shape ``(4 hidden,)``, or None, as ``bias_hh``.
        batch_sizes: how many examples there are at each step, on the CPU, int64, not rising; the first is the batch.
        reverse: from the last step to the first.

    Returns:
        Outputs of all steps, in the order of ``x`` and of its shape but for the last dimension, and the h and c of the
        step computed last; in the type of the products.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> factors = [torch.zeros(1, 3), torch.zeros(8, 1)], [torch.zeros(8, 2)]
        >>> y, h, c = low_rank_lstm(torch.ones(5, 1, 3), torch.zeros(1, 2), torch.ones(1, 2), *factors)
        >>> y.shape, c
        (torch.Size([5, 1, 2]), tensor([[0.0312, 0.0312]]))
    """
    y, last_h, last_c = torch.ops.cctorch.low_rank_lstm(
        x, h, c, weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, batch_sizes, reverse
    )
    return y, last_h, last_c
