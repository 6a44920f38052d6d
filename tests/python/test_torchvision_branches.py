"""torchvision's residual networks without every other branch, and with channels removed elsewhere."""

import copy

import cctorch
import networks
import pytest
import torch
import torchvision
from cctorch import _C, branches
from cctorch.graph import trace

NETWORKS = {
    "resnet18": 8,
    "resnext50_32x4d": 16,
    "regnet_x_400mf": 22,
    "regnet_y_400mf": 16,
    "mobilenet_v2": 10,
    "mobilenet_v3_small": 6,
    "mnasnet0_5": 10,
    "efficientnet_b0": 9,
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_other_branch_is_removed(name: str) -> None:
    torch.manual_seed(0)
    model = networks.randomized(torchvision.models.get_model(name, weights=None))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    graph = trace(model, x)
    found = branches.removable(model, graph, graph.branches, x)
    assert len(found) == len(graph.branches) == NETWORKS[name]
    plan = networks.random_plan(graph, ranks=False)
    branches.remove(plan, found[::2], graph)
    graph.channels.resolve(plan)
    smaller = cctorch.apply(copy.deepcopy(model), plan)
    expected = networks.projected(copy.deepcopy(model), plan)(x)
    torch.testing.assert_close(smaller(x), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    assert networks.counted_macs(smaller, x) == _C.final_macs(graph.specs, plan)
    exported = torch.export.export(smaller, (x,)).module()
    torch.testing.assert_close(exported(x), smaller(x))
