import pytest
import torch
from cctorch.ops import fake_quant, fake_quant_groups, fake_quant_offset
from torch import Tensor


def one_by_one(x: Tensor, log_scale: Tensor, size: int, offset: Tensor | None) -> Tensor:
    """Each group on its own, per tensor."""
    rows = []
    for row in range(x.shape[0]):
        parts = []
        for group, members in enumerate(x[row].flatten().split(size)):
            scale = log_scale[row, group].view(1)
            if offset is None:
                parts.append(fake_quant(members, scale, -4, 3, None, 0.5))
            else:
                parts.append(fake_quant_offset(members, scale, offset[row, group].view(1), -4, 3, None, 0.5))
        rows.append(torch.cat(parts).view(x.shape[1:]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 6, 3, 3), 9), ((4, 6, 3, 3), 54), ((3, 8), 2), ((5, 4), 1), ((6,), 1)]
)
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_every_group_on_its_own(
    shape: tuple[int, ...], size: int, with_offset: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    groups = x[0].numel() // size
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    log_scale, offset = ((torch.randn(shape[0], groups) / 4 - b).to(kind) for b in (1, 0))
    leaves = [t.requires_grad_() for t in ((x, log_scale, offset) if with_offset else (x, log_scale))]
    grad = torch.randn(shape).to(dtype)
    offsets = offset if with_offset else None
    y = fake_quant_groups(x, log_scale, -4, 3, size, 0.5, offsets)
    expected = one_by_one(x, log_scale, size, offsets)
    assert y.stride() == x.stride()
    assert torch.equal(y, expected)
    results = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_opcheck_compile_and_empty() -> None:
    x, log_scale, offset = torch.randn(4, 6, requires_grad=True), torch.zeros(4, 3), torch.zeros(4, 3)
    leaves = [log_scale.requires_grad_(), offset.requires_grad_()]
    torch.library.opcheck(torch.ops.cctorch.fake_quant_groups.default, (x, leaves[0], -4, 3, 2, 0.5, leaves[1]))
    compiled = torch.compile(fake_quant_groups, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, log_scale, -4, 3, 2), fake_quant_groups(x, log_scale, -4, 3, 2))
    assert fake_quant_groups(torch.empty(0, 6), torch.empty(0, 3), -4, 3, 2).shape == (0, 6)


@pytest.mark.parametrize(
    ("x", "log_scale", "size", "message"),
    [
        (torch.ones(4, 6), torch.zeros(4, 3), 4, "group_size must divide the 6 elements.*got 4"),
        (torch.ones(4, 6), torch.zeros(4, 3), 0, "group_size must be at least 1, got 0"),
        (torch.ones(4, 6), torch.zeros(12), 2, r"log_scale must be rows x groups, got shape \[12\]"),
        (torch.ones(4, 6), torch.zeros(3, 4), 2, r"log_scale must be rows x groups, 4 x 3, got shape \[3, 4\]"),
        (torch.ones(()), torch.zeros(1, 1), 1, "x must have at least one dimension"),
    ],
)
def test_bad_arguments(x: Tensor, log_scale: Tensor, size: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fake_quant_groups(x, log_scale, -4, 3, size)
