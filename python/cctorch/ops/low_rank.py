"""Layers whose weight is a product of two factors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_linear(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer of weight ``second @ first``: :math:`y = (x\,\text{first}^T)\,\text{second}^T + \text{bias}`.

    The factors are multiplied out first where that takes fewer multiplications for the rows of ``x``:
    :math:`N r C + \text{rows} \cdot C N < \text{rows} \cdot r (C + N)`. With symbolic shapes
    (``torch.compile(dynamic=True)``) they are always applied in turn, so that no program is tied to a number of rows.

    Args:
        x: shape ``(..., C)``.
        first: shape ``(rank, C)``.
        second: shape ``(N, rank)``.
        bias: shape ``(N,)``, or None.

    Returns:
        Tensor of shape ``(..., N)``; types, autocast and derivatives as in :func:`torch.nn.functional.linear`.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> low_rank_linear(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[1.0], [2.0]])).tolist()
        [[3.0, 6.0]]
    """
    y: Tensor = torch.ops.cctorch.low_rank_linear(x, first, second, bias)
    return y


def low_rank_conv2d(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A convolution with ``first``, then one with ``second`` and the bias.

    Two layouts: k x k, then 1 x 1; or 1 x k, then k x 1. Both equal the convolution with the weight
    ``einsum("nrij,rckl->ncikjl", second, first)``, reshaped to ``(N, C, i k, j l)``, of which at most one of i and k,
    and of j and l, is not 1. The factors are multiplied out first where that takes fewer multiplications for the
    positions of ``x``, unless shapes are symbolic, as in :func:`low_rank_linear`.

    Args:
        x: shape ``(batch, C, height, width)``, or without the batch.
        first: shape ``(rank, C, kernel_height, kernel_width)`` or ``(rank, C, 1, kernel_width)``.
        second: shape ``(N, rank, 1, 1)`` or ``(N, rank, kernel_height, 1)``.
        bias: shape ``(N,)``, or None.
        stride: one integer, or one for each of height and width; that of a dimension is the stride of the factor that
            extends in it, and so with the next two.
        padding: zeros added on each side, as ``stride``.
        dilation: distance between kernel elements, as ``stride``.

    Returns:
        Tensor of shape ``(batch, N, out_height, out_width)``; types, memory format, autocast and derivatives as in
        :func:`torch.nn.functional.conv2d`.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> low_rank_conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(4, 1, 1, 1)).shape
        torch.Size([1, 4, 1, 1])
        >>> low_rank_conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 1, 3), torch.ones(4, 1, 3, 1)).shape
        torch.Size([1, 4, 1, 1])
    """
    y: Tensor = torch.ops.cctorch.low_rank_conv2d(x, first, second, bias, stride, padding, dilation)
    return y


def tucker2_conv2d(
    x: Tensor,
    first: Tensor,
    core: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Three convolutions: 1 x 1 with ``first``, k x k with ``core``, 1 x 1 with ``second`` and the bias.

    Equals the convolution with the weight ``einsum("no,oikl,ic->nckl", second, core, first)`` (Kim et al. 2016, arXiv
    1511.06530, section 3), which is multiplied out first where that takes fewer multiplications for the positions of
    ``x``, unless shapes are symbolic.

    Args:
        x: shape ``(batch, C, height, width)``, or without the batch.
        first: shape ``(rank_in, C, 1, 1)``.
        core: shape ``(rank_out, rank_in, kernel_height, kernel_width)``.
        second: shape ``(N, rank_out, 1, 1)``.
        bias: shape ``(N,)``, or None.
        stride: of ``core``, as are ``padding`` and ``dilation``: one integer, or one for each of height and width.
        padding: zeros added on each side.
        dilation: distance between kernel elements.

    Returns:
        Tensor of shape ``(batch, N, out_height, out_width)``; types, memory format, autocast and derivatives as in
        :func:`torch.nn.functional.conv2d`.

    Raises:
        RuntimeError: for shapes that do not fit; the message names the argument.

    Example:
        >>> x, core = torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3)
        >>> tucker2_conv2d(x, torch.ones(1, 2, 1, 1), core, torch.ones(4, 1, 1, 1)).shape
        torch.Size([1, 4, 1, 1])
    """
    y: Tensor = torch.ops.cctorch.tucker2_conv2d(x, first, core, second, bias, stride, padding, dilation)
    return y


def truncated_svd(
    matrices: Sequence[Tensor], ranks: Sequence[int], bases: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    r"""The nearest matrices of lower rank (Eckart and Young 1936), as products of two factors; many at once.

    ``left[i] @ right[i]`` approximates ``matrices[i]``. The basis is sought at the smaller side, m of m x n, by

    - the eigenvectors of the Gram matrix :math:`A A^T` in float64, where m <= 64, and for float64 input;
    - otherwise in float32: Chebyshev subspace iteration on the Gram matrix for ranks below m / 3, its eigenvectors for
      the others. Half-precision input is treated as float32.

    Rounding of a Gram matrix, of size eps, loses of the squared norm that could be kept no more than
    :math:`4 \sqrt{rank}\,\epsilon\,|A|^2` and, where the kept eigenvalues of :math:`A A^T` are off the rest by a gap,
    no more than :math:`(4 \epsilon |A|^2 / gap)^2 \lambda_1` (the sin-theta theorem of Davis and Kahan 1970). The
    float32 result stands only where that is at most 0.1 % of the error; else the float64 Gram matrix is used, and
    float64 input that fails the same test with float64's epsilon gets a full singular value decomposition. The
    iteration itself has no bound that holds for every matrix: it was fitted to be within 0.1 % of the least error for
    spectra without a gap. Where that is not near enough, pass float64.

    With ``bases``, one half-step of subspace iteration replaces all that, if by an estimate (the angles by which
    the basis turned) the result is within the same 0.1 %; after a second half-step without success the bases are
    ignored. They make no difference for float64 input, and on a CPU for m <= 24. Outside the CPU all is in float64:
    the eigenvectors of the Gram matrix, or two whole steps from ``bases``, by the same estimate. All matrices of one
    shape are decomposed together there, and the host waits once to read all estimates.

    Several matrices are decomposed in parallel, one on each thread; a single one has all threads. No gradient.

    Args:
        matrices: shapes ``(..., rows, columns)``, on one device, not empty of rows or columns.
        ranks: one for each, from 1 to min(rows, columns).
        bases: nothing, or for each matrix the factor at its smaller side (``left`` where rows <= columns, else
            ``right``) that an earlier call returned for a similar matrix, or an empty tensor.

    Returns:
        ``left``, of shapes ``(..., rows, rank)``, and ``right``, ``(..., rank, columns)``, of the matrices' types.
        The factor at the smaller side has orthonormal columns (rows), only nearly where a start was used.

    Raises:
        RuntimeError: for ranks, shapes, types or devices that do not fit; the message names the argument.

    Example:
        >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> left, right = truncated_svd([matrix], [1])
        >>> (left[0] @ right[0]).abs().tolist()
        [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    factors: tuple[list[Tensor], list[Tensor]] = torch.ops.cctorch.truncated_svd(matrices, ranks, bases)
    return factors


def tucker2(
    weights: Sequence[Tensor],
    ranks: Sequence[tuple[int, int]],
    iterations: int = 2,
    bases: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    r"""Tucker-2 decompositions: low rank in output and in input channels; many weights at once.

    ``einsum("no,oi...,ci->nc...", out, core, in)`` approximates a weight: the truncated higher-order SVD, then
    higher-order orthogonal iteration (De Lathauwer et al. 2000), which changes one basis at a time for the better.
    The first bases come by the routes, and with the accuracy, of :func:`truncated_svd`. So do all later ones in
    float64, of weights of up to 64 outputs and inputs, and outside the CPU; the others are made better by two steps of
    subspace iteration, :math:`B \leftarrow B\, G\, (G - 0.7\, t\, I)` with the unfolding's Gram matrix G and the
    smallest t of the basis' eigenvalues. Where that was tried, the error was within 0.1 % of orthogonal iteration's.

    Args:
        weights: shapes ``(N, C, ...)``, on one device.
        ranks: of outputs and of inputs, for each weight.
        iterations: changes of both bases after the higher-order SVD.
        bases: nothing, or for each weight the pair of ``out`` and ``in`` that an earlier call returned for a similar
            one, or empty tensors: one step of subspace iteration then replaces each decomposition, unless the bases
            turn too far.

    Returns:
        ``core``, ``out`` and ``in``, of shapes ``(rank_out, rank_in, ...)``, ``(N, rank_out)`` and ``(C, rank_in)``;
        the last two have orthonormal columns.

    Raises:
        RuntimeError: for ranks, shapes, types or devices that do not fit; the message names the argument.

    Example:
        >>> core, out, inner = tucker2([torch.ones(4, 2, 3, 3)], [(1, 1)])
        >>> core[0].shape, out[0].shape, inner[0].shape
        (torch.Size([1, 1, 3, 3]), torch.Size([4, 1]), torch.Size([2, 1]))
    """
    ranks_out, ranks_in = [r[0] for r in ranks], [r[1] for r in ranks]
    bases_out, bases_in = [b[0] for b in bases], [b[1] for b in bases]
    op = torch.ops.cctorch.tucker2
    factors: tuple[list[Tensor], list[Tensor], list[Tensor]] = op(
        weights, ranks_out, ranks_in, iterations, bases_out, bases_in
    )
    return factors
