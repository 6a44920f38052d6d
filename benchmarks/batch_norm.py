"""Training-mode batch normalization in channels_last by its channels: ours, PyTorch's, and the memory's limit.

    python benchmarks/batch_norm.py [--batch 128] [--side 32] [--json FILE]

Forward and backward, float32, medians of runs taken in turns. Limit: eight passes over a tensor, at the bandwidth of
a copy of the same size: forward reads x for the sums and again for y, backward both x and the gradient for the sums and
again for the result.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from cctorch import _C, ops
from timing import in_turns, machine

PASSES = 8  # forward: x, x, y; backward: grad, x, grad, x, grad_x


def row(channels: int, batch: int, side: int) -> dict[str, float]:
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    grad = torch.randn_like(x)
    copy = torch.empty_like(x)

    def ours() -> None:
        torch.autograd.grad(ops.batch_norm(x, weight, bias)[0], (x, weight, bias), grad)

    def torchs() -> None:
        torch.autograd.grad(F.batch_norm(x, None, None, weight, bias, True), (x, weight, bias), grad)

    def copied() -> None:
        copy.copy_(x.detach())

    ms = in_turns({"ours": ours, "torch": torchs, "copy": copied}, seconds=1.0)
    return {"channels": channels, "ours": ms["ours"], "torch": ms["torch"], "limit": PASSES / 2 * ms["copy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 7, 8, 11, 16, 23, 32, 45, 64, 100, 128])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _C.keep_freed_memory()
    rows = []
    print(
        "| channels | ours, ms | PyTorch, ms | PyTorch / ours | limit, ms | ours / limit |\n|---|---|---|---|---|---|"
    )
    for channels in arguments.channels:
        rows.append(row(channels, arguments.batch, arguments.side))
        own, peer, limit = (rows[-1][key] for key in ("ours", "torch", "limit"))
        print(
            f"| {channels} | {own:.2f} | {peer:.2f} | {peer / own:.2f} | {limit:.2f} | {own / limit:.2f} |", flush=True
        )
    if arguments.json:
        settings = {"batch": arguments.batch, "side": arguments.side, **machine()}
        arguments.json.write_text(json.dumps({**settings, "rows_ms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
