"""Times the forward pass, and a training step, of a low-rank LSTM beside the dense one and a loop in Python.

    OMP_NUM_THREADS=1 python benchmarks/low_rank_lstm.py [--size 256] [--steps 32] [--batch 16] [--rank 32]
    python benchmarks/low_rank_lstm.py --device cuda

Milliseconds, medians of runs taken in turns. The loop is what one writes without an operator: the same products, a step
at a time, from Python. "steps" is ours without cuDNN, which is otherwise given the product of the factors.
"""

import argparse
from collections.abc import Callable

import torch
from cctorch.nn import LowRankLSTM
from timing import in_turns
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.functional import linear


def looped(lstm: LowRankLSTM, x: Tensor) -> Tensor:
    h = c = x.new_zeros(x.shape[1], lstm.hidden_size)
    (ih_first, ih_second), (hh_first, hh_second) = (
        [lstm.get_parameter(part) for part in lstm.parts(name)] for name in ("weight_ih_l0", "weight_hh_l0")
    )
    inputs = linear(linear(x, ih_first), ih_second, lstm.bias_ih_l0 + lstm.bias_hh_l0)
    outputs = []
    for step in inputs.unbind(0):
        i, f, g, o = (step + linear(linear(h, hh_first), hh_second)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def without_cudnn(lstm: LowRankLSTM, x: Tensor) -> Tensor:
    with cudnn.flags(enabled=False):
        y: Tensor = lstm(x)[0]
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 256), ("steps", 32), ("batch", 16), ("rank", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    dense = nn.LSTM(given.size, given.size).to(given.device)
    lstm = LowRankLSTM.from_dense(dense, dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), given.rank))
    x = torch.randn(given.steps, given.batch, given.size, device=given.device)
    contenders: dict[str, Callable[[], Tensor]] = {
        "nn.LSTM": lambda: dense(x)[0],
        "LowRankLSTM": lambda: lstm(x)[0],
        "Python": lambda: looped(lstm, x),
    }
    rounding = {"rtol": 1e-3, "atol": 1e-3} if given.device == "cuda" else {}  # cuDNN's is TF32's
    torch.testing.assert_close(contenders["Python"](), contenders["LowRankLSTM"](), **rounding)
    if given.device == "cuda":
        contenders["LowRankLSTM, steps"] = lambda: without_cudnn(lstm, x)

    def step(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: run().square().mean().backward()

    with torch.inference_mode():
        forward = in_turns(dict(contenders), given.seconds, given.device)
    training = in_turns({name: step(run) for name, run in contenders.items()}, given.seconds, given.device)
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"size {given.size}, {given.steps} steps, batch {given.batch}, rank {given.rank}, {where}")
    print("| ms | forward | forward and backward |\n|---|---|---|")
    for name in contenders:
        print(f"| {name} | {forward[name]:.2f} | {training[name]:.2f} |")


if __name__ == "__main__":
    main()
