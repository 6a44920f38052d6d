"""The C++ example beside Python: the same plan, repaired by each, is the same network."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cctorch import apply, batch_norm, datasets, load_plan
from cctorch.models import create
from cctorch.repair import repair
from safetensors.torch import load_file

# Where the test of the installed package (ctest, consumer) builds it.
TRAIN_RESNET = Path(__file__).parents[2] / "build" / "tests" / "cpp" / "consumer" / "build" / "train_resnet"


@pytest.mark.skipif(not TRAIN_RESNET.exists(), reason="the C++ example is not built: make test-cpp")
@pytest.mark.parametrize("layout", ["channel", "spatial"])
def test_both_languages_repair_alike(tmp_path: Path, layout: str) -> None:
    options = "--synthetic --blocks 1 --batch 32 --epochs 1 --finetune-epochs 0 --lr 0.02 --limit 160 --target 0.6"
    subprocess.run(
        [TRAIN_RESNET, *options.split(), "--layout", layout, "--float64", "--device", "cpu", "--out", tmp_path],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    images = datasets._idx_set(tmp_path / "synthetic", "train").take(torch.arange(160))
    pixels = (images.images.double() / 255 - 0.2860) / 0.3530
    batches = list(zip(pixels.split(32), images.labels.split(32), strict=True))

    dense = create("resnet8", in_channels=1).double()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    plan = load_plan(tmp_path / "plan.json")
    assert layout in {each.layout for each in plan.layers if each.rank}
    small = apply(copy.deepcopy(dense.eval()), plan)
    batch_norm.reestimate(small, batches)
    before = small.eval()(pixels)
    fits = repair(small, dense, plan, batches).layers
    assert any(fit.after < 0.9 * fit.before for fit in fits)

    theirs = apply(copy.deepcopy(dense), plan)
    theirs.load_state_dict(load_file(tmp_path / "compressed.safetensors"))
    with torch.no_grad():
        ours, wanted = small(pixels), theirs.eval()(pixels)
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
