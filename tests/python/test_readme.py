"""The README's Python blocks run as they stand, given a model, an optimizer and batches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cctorch import models

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.strip().splitlines()[0][:40] for block in BLOCKS])
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    model = models.create("resnet8", in_channels=3)
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    evaluated: list[Any] = []
    names = {
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "example": batches[0][0],
        "evaluate": evaluated.append,
        "F": F,
    }
    exec("import cctorch\n" + block, names)
    assert torch.isfinite(model(batches[0][0])).all()
    if "as_if_at_event" in block:
        assert evaluated == [model]
        assert names["events"].events > 0  # type: ignore[attr-defined]
