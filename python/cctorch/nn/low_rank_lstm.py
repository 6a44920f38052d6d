import math
from collections.abc import Mapping
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cctorch import _C, ops

_States = tuple[Tensor, Tensor]


class LowRankLSTM(nn.Module):
    """An ``nn.LSTM`` of which some weights are products of two factors: ``weight = second first``.

    Takes the arguments of ``nn.LSTM``, and what that takes and gives: ``(steps, batch, features)`` or, with
    ``batch_first``, ``(batch, steps, features)``, one sequence ``(steps, features)`` or a packed sequence, and the
    states ``(h_0, c_0)`` or none; the outputs, and ``(h_n, c_n)``. :func:`cctorch.ops.low_rank_lstm` computes a layer
    in one direction.

    Parameters are named as those of ``nn.LSTM``; in place of a weight that has a rank, ``weight_ih_l0``, there are
    ``weight_ih_l0_first``, rank x columns, and ``weight_ih_l0_second``, rows x rank.

    Args:
        ranks: by the names of ``nn.LSTM``'s weights. Those that it does not name are whole.

    Example:
        >>> lstm = LowRankLSTM(16, 8, {"weight_hh_l0": 2}, batch_first=True)
        >>> y, (h, c) = lstm(torch.zeros(3, 5, 16))
        >>> y.shape, lstm.weight_hh_l0_second.shape
        (torch.Size([3, 5, 8]), torch.Size([32, 2]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        ranks: Mapping[str, int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # It checks the arguments, and knows what there is of which shape.
        dense = nn.LSTM(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device="meta"
        )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional, self.proj_size = (
            batch_first,
            float(dropout),
            bidirectional,
            proj_size,
        )
        self.ranks = dict(ranks)
        shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
        _check_ranks(self.ranks, shapes)
        for name, shape in shapes.items():
            rank = self.ranks.get(name)
            parts = [shape] if rank is None else [(rank, shape[1]), (shape[0], rank)]
            for part, size in zip(self.parts(name), parts, strict=True):
                setattr(self, part, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self.reset_parameters()

    @classmethod
    def from_dense(cls, lstm: nn.LSTM, ranks: Mapping[str, int]) -> "LowRankLSTM":
        """The truncated SVDs of the weights that ``ranks`` names, and copies of the others.

        >>> LowRankLSTM.from_dense(nn.LSTM(6, 4), {"weight_ih_l0": 2})
        LowRankLSTM(6, 4, ranks={'weight_ih_l0': 2})
        """
        new = cls(
            lstm.input_size,
            lstm.hidden_size,
            ranks,
            lstm.num_layers,
            lstm.bias,
            lstm.batch_first,
            lstm.dropout,
            lstm.bidirectional,
            lstm.proj_size,
            device="meta",
        )
        for name, dense in lstm.named_parameters():
            weight = dense.detach()
            rank = new.ranks.get(name)
            # A copy: on CUDA a weight is a part of the one tensor that all of them lie in.
            values = (weight.clone(),) if rank is None else _C.factorize(weight, list(range(weight.shape[1])), rank)
            for part, value in zip(new.parts(name), values, strict=True):
                setattr(new, part, nn.Parameter(value, requires_grad=dense.requires_grad))
        return new.train(lstm.training)

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the parameters that stand for one of ``nn.LSTM``'s."""
        return (f"{name}_first", f"{name}_second") if name in self.ranks else (name,)

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            # The product then has the variance of nn.LSTM's default.
            of_second = name.endswith("_second")
            limit = math.sqrt(3 / parameter.shape[1]) if of_second else bound
            nn.init.uniform_(parameter, -limit, limit)

    @overload
    def forward(self, input: Tensor, hx: _States | None = None) -> tuple[Tensor, _States]: ...

    @overload
    def forward(self, input: PackedSequence, hx: _States | None = None) -> tuple[PackedSequence, _States]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: _States | None = None
    ) -> tuple[Tensor | PackedSequence, _States]:
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LowRankLSTM: input has {input.dim()} dimensions, expected 2 or 3")
        if input.dim() == 2:
            h, c = self._checked(hx, input, ())
            y, (h, c) = self._layers(input.unsqueeze(1), (h.unsqueeze(1), c.unsqueeze(1)), None)
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        x = input.transpose(0, 1) if self.batch_first else input
        y, states = self._layers(x, self._checked(hx, input, (x.shape[1],)), None)
        return y.transpose(0, 1) if self.batch_first else y, states

    def _packed(self, input: PackedSequence, hx: _States | None) -> tuple[PackedSequence, _States]:
        data, batch_sizes, order, back = input
        if hx is not None and order is not None:
            hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
        y, (h, c) = self._layers(data, self._checked(hx, data, (int(batch_sizes[0]),)), batch_sizes)
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back)
        return PackedSequence(y, batch_sizes, order, back), (h, c)

    def _checked(self, hx: _States | None, input: Tensor, batch: tuple[int, ...]) -> _States:
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"LowRankLSTM: input of shape {tuple(input.shape)}, expected {self.input_size} features in the last "
                "dimension"
            )
        layers = self.num_layers * len(self._suffixes)
        sizes = [(layers, *batch, self.proj_size or self.hidden_size), (layers, *batch, self.hidden_size)]
        if hx is None:
            return input.new_zeros(sizes[0]), input.new_zeros(sizes[1])
        for name, state, size in zip(("h_0", "c_0"), hx, sizes, strict=True):
            if tuple(state.shape) != size:
                raise ValueError(f"LowRankLSTM: {name} has shape {tuple(state.shape)}, expected {size}")
        return hx

    def _layers(self, x: Tensor, hx: _States, batch_sizes: Tensor | None) -> tuple[Tensor, _States]:
        last: list[_States] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes:
                h, c = hx[0][len(last)], hx[1][len(last)]
                y, *states = self._layer(x, h, c, f"_l{layer}{suffix}", batch_sizes)
                outputs.append(y)
                last.append((states[0], states[1]))
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _layer(
        self, x: Tensor, h: Tensor, c: Tensor, place: str, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        def weight(name: str) -> list[Tensor]:
            return [getattr(self, part) for part in self.parts(name + place)]

        return ops.low_rank_lstm(
            x,
            h,
            c,
            weight("weight_ih"),
            weight("weight_hh"),
            weight("weight_hr") if self.proj_size else (),
            getattr(self, "bias_ih" + place) if self.bias else None,
            getattr(self, "bias_hh" + place) if self.bias else None,
            batch_sizes,
            reverse=place.endswith("_reverse"),
        )

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, ranks={self.ranks}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in {**defaults, "proj_size": 0}.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def _check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> None:
    weights = [name for name, shape in shapes.items() if len(shape) == 2]
    for name, rank in ranks.items():
        if name not in weights:
            raise ValueError(f"LowRankLSTM: ranks names {name!r}, expected of {', '.join(weights)}")
        rows, columns = shapes[name]
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(
                f"LowRankLSTM: ranks[{name!r}] = {rank}, expected 1 to {min(rows, columns)} for a weight of {rows} x "
                f"{columns}"
            )
