"""Two data-parallel ranks under gloo."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cctorch import regularize as r
from torch import nn
from torch.nn.parallel import DistributedDataParallel

REGULARIZERS = {
    "pruning, noise and quantization": lambda: r.Compose(
        [r.UniformNoise(0.05, seed=5), r.MagnitudePruning(0.6), r.UniformQuantization(4)]
    ),
    "low rank": lambda: r.SVD(ratio=2.0),
}


def train(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)
    events = r.Events(parallel.named_parameters(), REGULARIZERS[name](), r.AdaptivePeriod(0.1, 2, 6), optimizer)
    data = torch.Generator().manual_seed(rank)
    for _ in range(15):
        optimizer.zero_grad()
        y = parallel(torch.randn(4, 3, 8, 8, generator=data))
        nn.functional.cross_entropy(y, torch.arange(4)).backward()
        optimizer.step()
        events.step()
    events.finish()
    torch.save([events.state_dict(), model.state_dict()], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_ranks_stay_equal_to_the_bit(name: str, tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path), name), nprocs=2)
    (events, model), (other_events, other_model) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert events["events"] > 3
    for state, other in ((events, other_events), (model, other_model)):
        assert state.keys() == other.keys()
        for key, value in state.items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, key
