"""A quantized network as codes of few bits: what a file of it should hold, and the way back."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cctorch import _C, ops
from cctorch.export import positive
from cctorch.nn import FakeQuant
from cctorch.prepare import constraints, convert


class Grid(NamedTuple):
    """Of a weight: one scale for each index of dimension 0, and the bits of the codes that are multiplied by it."""

    scales: Tensor
    bits: int


def quantized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``convert(model)``, in which the weights that :func:`prepare` quantized are codes. The model stays.

    In place of a weight of n bits there are three tensors, of which n bits for each value and 4 bytes for each row:

    ==================  =============================================================================================
    ``weight.codes``    uint8: :math:`q`, n bits each, two's complement, row-major, without gaps, low bits first
    ``weight.scales``   :math:`s`, one for each row; :math:`w_{ij} = s_i q_{ij}`
    ``weight.grid``     int64: n, then the shape of the weight
    ==================  =============================================================================================

    A weight that something else acts on after its fake-quantization, or whose :class:`~cctorch.nn.FakeQuant` has groups
    or an offset, or is not signed, is stored as it is, and one that :func:`convert` leaves as its parametrizations have
    it. In C++, ``load_state_dict`` and ``decode_weights`` read the codes.

    Example:
        >>> import cctorch
        >>> from cctorch import CompressionPlan, LayerPlan
        >>> plan = CompressionPlan(layers=[LayerPlan("0", "linear", 256, 64, bits=4)])
        >>> model = cctorch.prepare(nn.Sequential(nn.Linear(256, 64, bias=False)), plan)
        >>> state = cctorch.quantized_state_dict(model)
        >>> sum(tensor.nbytes for tensor in state.values()), 256 * 64 * 4
        (8472, 65536)
        >>> weight = cctorch.dequantized_state_dict(state)["0.weight"]
        >>> torch.equal(weight, cctorch.convert(model)[0].weight)
        True
    """
    return encoded(convert(copy.deepcopy(model)).state_dict(), grids(model))


def dequantized_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with plain weights, of the type of their scales, in place of codes; the same without any.

    It is what a model takes that a plan's :func:`apply` has rebuilt.

    Raises:
        ValueError: codes, scales and grid do not fit each other, as in a damaged file.
    """
    return _C.decode_weights(dict(state))


@torch.no_grad()
def grids(model: nn.Module) -> dict[str, Grid]:
    """Of the weights of a prepared model that end on a grid, by their names in the converted one."""
    found = {}
    for path, module in model.named_modules():
        for name, steps in constraints(module).items():
            if isinstance(last := steps[-1], FakeQuant) and _is_grid_of_rows(last):
                found[f"{path}.{name}".lstrip(".")] = Grid(_scales(last), last.bits)
    return found


def encoded(state: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """``state`` with codes in place of the weights that have a grid.

    Raises:
        ValueError: a weight is not on its grid.
    """
    return _C.encode_weights(dict(state), dict(grids))


def _is_grid_of_rows(quant: FakeQuant) -> bool:
    return quant.axis == 0 and quant.groups == 1 and quant.offset is None and quant.signed


def _scales(quant: FakeQuant) -> Tensor:
    """As the operator computes them: the code 1 stands for the scale itself, to the last bit."""
    log_scale = quant.log_scale.detach()
    return ops.fake_quant(positive(log_scale).unsqueeze(1), log_scale, quant.qmin, quant.qmax, axis=0).squeeze(1)
