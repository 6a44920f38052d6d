"""Several ranks under gloo against one process that has all the data."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cctorch import apply, batch_norm, collaborative, distributed, measure, models, repair, session, trainer
from cctorch.config import ConfigError, parse_config
from cctorch.data import Batches, ImageSet
from cctorch.gradients import mean_gradients
from cctorch.interruption import Interrupted
from cctorch.nn import BatchNorm2d
from cctorch.report import page
from cctorch.run import run
from cctorch.store import load_model
from cctorch.train import Partial, _Losses
from rich.console import Console
from safetensors.torch import load_file
from signalled import signalled_at
from spawned import spawn
from tiny_run import images_and_labels, tree, write_dataset
from torch import Tensor, nn

RANKS = 3


def _batches(count: int, batch_size: int) -> Batches:
    images, labels = images_and_labels(count, 3)
    return Batches(ImageSet(images.to(torch.uint8).unsqueeze(1), labels), batch_size, (0.5,), (0.25,))


class _Double:
    """Batches in float64, so that an order of summation does not matter."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return ((images.double(), labels) for images, labels in self.batches)


def _network() -> nn.Module:
    torch.manual_seed(5)
    model = models.create("resnet8", 1, 4).double()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def _assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def _alone(function: Callable[[], Any]) -> Any:
    """As one process would: no rank knows of the others meanwhile."""
    world_size, distributed.world_size = distributed.world_size, lambda: 1
    try:
        return function()
    finally:
        distributed.world_size = world_size


def _normalizes_as_one() -> None:
    torch.manual_seed(1)
    # The ranks have 2, 0 and 3 of the images.
    sizes, rank = [2, 0, 3], dist.get_rank()
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64).mul_(3).add_(20)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, reference = BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
        for module in (ours, reference):
            module.load_state_dict({**module.state_dict(), "weight": torch.rand(4), "bias": torch.rand(4)})
        reference.load_state_dict(ours.state_dict())
        ours.synchronized = True
        whole = x.clone().to(memory_format=layout).requires_grad_()
        share = x.split(sizes)[rank].clone().to(memory_format=layout).requires_grad_()
        y, wanted = ours(share), reference(whole)
        torch.testing.assert_close(y, wanted.split(sizes)[rank], rtol=1e-10, atol=1e-10)
        weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (y.square() * weight.split(sizes)[rank]).sum().backward()
        (wanted.square() * weight).sum().backward()
        torch.testing.assert_close(share.grad, whole.grad.split(sizes)[rank], rtol=1e-9, atol=1e-9)
        for name, parameter in reference.named_parameters():
            own = distributed.sum_(ours.get_parameter(name).grad.clone())
            torch.testing.assert_close(own, parameter.grad, rtol=1e-9, atol=1e-9)
        _assert_close(dict(ours.named_buffers()), dict(reference.named_buffers()))
        torch.testing.assert_close(ours.eval()(share), reference.eval()(share), rtol=1e-10, atol=1e-10)
    half = BatchNorm2d(4)
    half.synchronized = True
    assert half(x.split(sizes)[rank].bfloat16()).dtype == torch.bfloat16


def _sums_are_those_of_all() -> None:
    rank = dist.get_rank()
    model, batches = _network(), _batches(31, 8)
    block, slices = _Double(batches.block(rank, RANKS)), _Double(batches.sliced(rank, RANKS))
    layers = ["conv1", "layer2.0.conv1", "linear"]
    found = mean_gradients(model, block, layers, across_ranks=True)
    _assert_close(found, _alone(lambda: mean_gradients(model, _Double(batches), layers)))
    assert measure.accuracy(model, block, across_ranks=True) == measure.accuracy(model, _Double(batches))

    one, several = copy.deepcopy(model), copy.deepcopy(model)
    batch_norm.reestimate(several, slices, across_ranks=True)
    _alone(lambda: batch_norm.reestimate(one, _Double(batches)))
    _assert_close(several.state_dict(), one.state_dict())
    assert not any(module.synchronized for module in several.modules() if isinstance(module, BatchNorm2d))

    example = next(iter(_Double(batches)))[0][:2]
    compression = collaborative.compress(model, block, example, target=0.4, across_ranks=True)
    reference = _alone(lambda: collaborative.compress(model, _Double(batches), example, target=0.4))
    assert compression.plan == reference.plan
    assert compression.final_macs == reference.final_macs
    assert bool(compression.curves) == (rank == 0)

    one, several = (apply(copy.deepcopy(model), reference.plan) for _ in range(2))
    fits = repair(several, model, reference.plan, block, step=4, ridge=1e-2, across_ranks=True).layers
    wanted = _alone(lambda: repair(one, model, reference.plan, _Double(batches), step=4, ridge=1e-2)).layers
    assert [fit.samples for fit in fits] == [fit.samples for fit in wanted]
    _assert_close(several.state_dict(), one.state_dict(), 1e-6)
    with pytest.raises(ValueError, match=r"images: \[5, 0, 5\]"):
        repair(one, model, reference.plan, list(_Double(_batches(5, 5))) if rank != 1 else [], across_ranks=True)


def _what_main_raises_all_raise() -> None:
    def main_only() -> str:
        assert dist.get_rank() == 0
        return "told"

    assert distributed.on_main(main_only) == "told"
    for error in (ConfigError("no such key"), OSError(28, "the disk is full", "file"), Interrupted("SIGTERM received")):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error).split("]")[-1].strip()):
            distributed.on_main(fail)


def _a_difference_is_named() -> None:
    model = _network()
    distributed.assert_identical("a test", model.state_dict().items())
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.weight").view(-1)[7] += 1e-12 * (dist.get_rank() == 2)
    with pytest.raises(
        distributed.MismatchError, match=r"a test: 'layer2.0.conv1.weight' of rank 2 is not that of rank"
    ):
        distributed.assert_identical("a test", model.state_dict().items())
    with pytest.raises(distributed.MismatchError, match="names of the layers"):
        distributed.assert_identical("a test", [(f"layer{dist.get_rank()}", torch.zeros(1))])


def _votes_come_one_call_later() -> None:
    vote = distributed.Vote()
    answers = [vote(step == 2 and dist.get_rank() == 1) for step in range(5)]
    assert answers == [False, False, False, True, False]
    assert distributed.any_rank(dist.get_rank() == 1)
    assert not distributed.any_rank(False)


def _hooks_go_with_the_wrapper() -> None:
    """A second wrapper over the same parameters averages once, not twice."""
    model = nn.Linear(2, 1, bias=False).double()
    example = torch.full((1, 2), float(dist.get_rank()), dtype=torch.float64)
    for _ in range(2):
        wrapped = distributed.parallel(model, example, broadcasts_buffers=False)
        assert model.weight.grad is None
        wrapped(example).sum().backward()
        assert model.weight.grad.tolist() == [[1.0, 1.0]]  # of 0, 1 and 2
        model.weight.grad = None
        del wrapped


def _losses_do_not_depend_on_how_many_are_read_at_once() -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(dist.get_rank()))
    read = []
    for stops in ((20,), (17, 20), (1, 2, 5, 20)):
        losses = _Losses(20, torch.device("cpu"), done := Partial(), 0)
        for step, value in enumerate(values):
            losses.put(step, value)
        for stop in stops:
            losses.read(stop)
        read.append(done.losses)
    assert read[0] == read[1] == read[2]


def _a_fresh_wrapper_adds_up_like_a_used_one() -> None:
    """To the bit: a run that goes on has a fresh one."""
    torch.manual_seed(0)
    model = models.create("resnet8", 1, 4).eval()
    x = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(dist.get_rank()))
    gradients = []
    used = distributed.parallel(model, x[:1], broadcasts_buffers=False)
    for _ in range(3):
        model.zero_grad()
        used(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    del used
    model.zero_grad()
    fresh = distributed.parallel(model, x[:1], broadcasts_buffers=False)
    fresh(x).square().sum().backward()
    gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


TOGETHER = [
    _normalizes_as_one,
    _sums_are_those_of_all,
    _what_main_raises_all_raise,
    _a_difference_is_named,
    _votes_come_one_call_later,
    _hooks_go_with_the_wrapper,
    _losses_do_not_depend_on_how_many_are_read_at_once,
    _a_fresh_wrapper_adds_up_like_a_used_one,
]


def _all_of(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def test_three_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    spawn(RANKS, tmp_path, _all_of, TOGETHER)


def _run(settings: dict[str, Any], name: str) -> None:
    """In float64: in float32 rounding decides now and then whether a value near 0 passes a ReLU."""
    normalize = Batches._normalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda record: "")
        patch.setattr(Batches, "_normalize", lambda self, *arguments: normalize(self, *arguments).double())
        torch.set_default_dtype(torch.float64)
        try:
            run(parse_config({**settings, "name": name}), console=Console(file=io.StringIO()))
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("several")
    # 82 training images in batches of 27: the last has 1, so that most ranks have none of it.
    content = tree(write_dataset(folder / "data", train=98, test=41), folder)
    regularize = {
        **content["train"],
        "q": [{"kind": "magnitude_pruning", "sparsity": 0.5}],
        "frequency": {"kind": "constant", "period": 3},
    }
    parts = {"train": content["train"], "finetune": content["finetune"], "regularize": regularize}
    content |= {part: {**training, "batch_size": 27, "epochs": 1} for part, training in parts.items()}
    return content


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any]) -> Path:
    _run(settings, "alone")
    return Path(settings["output"]) / "alone"


def _disturbed(settings: dict[str, Any]) -> None:
    """On two ranks: a folder that rank 1 does not see, a full disk on rank 1, a damaged checkpoint."""
    rank, elsewhere = dist.get_rank(), Path(settings["output"]) / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    checkpoints = Path(settings["output"]) / "disturbed" / "checkpoints"
    write = os.write

    def full(descriptor: int, content: Any) -> int:
        if rank == 1 and (checkpoints / "last").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_SECONDS_TO_APPEAR", 0.0)
        patch.chdir(elsewhere if rank == 1 else elsewhere.parent)
        with pytest.raises(ConfigError, match=r"output: .*disturbed of rank 0 is not seen by rank 1 \(on "):
            _run({**settings, "output": "."}, "disturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"the disk is full: .*rank1\.safetensors"):
            _run(settings, "disturbed")
    dist.barrier()
    assert [item.name for item in checkpoints.iterdir() if item.is_dir()] == ["last"]
    assert "the disk is full" in (checkpoints.parent / "failure.txt").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_epoch", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(settings, "disturbed")
    dist.barrier()
    if rank == 0:
        shutil.copytree(checkpoints.parent, elsewhere / "interrupted")
        os.truncate(checkpoints / "last" / "rank1.safetensors", 1000)
    dist.barrier()
    _run(settings, "disturbed")
    if rank == 0:
        said = " ".join((checkpoints.parent / "run.log").read_text().split())
        assert "rank1.safetensors is not what was written; going back to the state before it" in said
        assert "resuming at stage train, after epoch 1" in said
        assert "resuming at stage compress, after epoch 0" in said


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _losses(folder: Path) -> Tensor:
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def _epochs(folder: Path) -> Tensor:
    """Loss and accuracy of each."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(event["loss"], event["accuracy"]) for event in events if event["event"] == "epoch"]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_does_not_depend_on_the_number_of_ranks(settings: dict[str, Any], alone: Path, ranks: int) -> None:
    name = f"of{ranks}"
    spawn(ranks, alone.parent / f"files{ranks}", _run, settings, name)
    folder = alone.parent / name
    _assert_ended_alike(folder, alone)
    assert sorted(log.name for log in (folder / "logs").iterdir()) == [f"rank{rank}.log" for rank in range(1, ranks)]


def _sharded(settings: dict[str, Any]) -> None:
    """On two ranks: a run, and one that is interrupted in each of its stages of training and goes on."""
    settings = {**settings, "sharded": True}
    _run(settings, "sharded")
    output = Path(settings["output"])
    # It is heard one step later: after 3, 3 and 2 of the 4 steps of the stages.
    for stop in (2, 3, 2):
        with signalled_at(stop):
            _run(settings, "broken")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(output / "broken", output / "copied")
    dist.barrier()
    _run(settings, "broken")


def test_a_sharded_run_ends_as_one_alone_does(settings: dict[str, Any], alone: Path) -> None:
    spawn(2, alone.parent / "sharded-files", _sharded, settings)
    sharded, broken, copied = (alone.parent / name for name in ("sharded", "broken", "copied"))
    _assert_ended_alike(sharded, alone)
    tensors = [load_file(folder / "checkpoints" / "compressed.safetensors") for folder in (sharded, broken)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert torch.equal(_losses(sharded), _losses(broken))
    content = json.loads((copied / "checkpoints" / "last" / "state.json").read_text())["content"]
    assert content["state"]["stage"] == "regularize"
    assert len(content["state"]["losses"]) == 2
    for group in ("model", "momentum"):
        parts = content["tensors"][f"{group}.conv1.weight"]["parts"]
        assert [part["file"] for part in parts] == ["rank0.safetensors", "rank1.safetensors"]
    shutil.rmtree(broken)
    copied.rename(broken)
    _run({**settings, "sharded": True}, "broken")
    _assert_ended_alike(broken, alone)


def _quantizing(settings: dict[str, Any]) -> None:
    """On two ranks: each with all weights, and each with a shard of them, interrupted in the stage."""
    _run(settings, "quantized2")
    sharded = {**settings, "sharded": True}
    with signalled_at(9):
        _run(sharded, "quantized-sharded")
    _run(sharded, "quantized-sharded")


def test_a_quantized_run_does_not_depend_on_the_number_of_ranks(settings: dict[str, Any], alone: Path) -> None:
    # Without factors, whose signs rounding decides on: a grid has one more value below 0 than above.
    settings = {**settings, "regularize": None, "compress": {**settings["compress"], "units": "channels"}}
    settings["quantize"] = {**settings["finetune"], "bits": 4}
    _run(settings, "quantized")
    spawn(2, alone.parent / "quantized-files", _quantizing, settings)
    whole, *others = (alone.parent / name for name in ("quantized", "quantized2", "quantized-sharded"))
    wanted = load_file(whole / "checkpoints" / "compressed.safetensors")
    assert wanted["layer3.0.conv2.weight.codes"].numel() > 0
    for other in others:
        _assert_ended_alike(other, whole)
    assert json.loads((others[1] / "summary.json").read_text())["quantized"]["top1"] >= 0


def _factored(settings: dict[str, Any]) -> None:
    """On two ranks: each with all weights, and each with a shard of them."""
    _run(settings, "factored2")
    _run({**settings, "sharded": True}, "factored-sharded")


def test_layers_as_small_as_their_weights_do_not_depend_on_the_number_of_ranks(
    settings: dict[str, Any], alone: Path
) -> None:
    q = [{"kind": "tucker2", "ratio": 2.0}]
    settings = {**settings, "compress": None, "regularize": {**settings["regularize"], "q": q}}  # and then fine-tuned
    _run(settings, "factored")
    spawn(2, alone.parent / "factored-files", _factored, settings)
    whole, *others = (alone.parent / name for name in ("factored", "factored2", "factored-sharded"))
    model, _ = load_model(whole / "checkpoints" / "compressed.safetensors")
    assert any(name.endswith(".core") for name, _ in model.named_parameters())
    x = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for other in others:
        assert (other / "plan.json").read_text() == (whole / "plan.json").read_text()
        found, _ = load_model(other / "checkpoints" / "compressed.safetensors")
        # Bases of one subspace: rounding decides which.
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)


def _assert_ended_alike(folder: Path, alone: Path) -> None:
    assert (folder / "plan.json").read_text() == (alone / "plan.json").read_text()
    assert len(_losses(folder)) == 12
    torch.testing.assert_close(_losses(folder), _losses(alone), rtol=1e-9, atol=0)
    torch.testing.assert_close(_epochs(folder), _epochs(alone), rtol=1e-9, atol=0)
    for checkpoint in ("dense.safetensors", "compressed.safetensors"):
        found, wanted = (load_file(f / "checkpoints" / checkpoint) for f in (folder, alone))
        # Rounding decides on the signs of the two factors of a weight.
        _assert_close(*({name: value.abs() for name, value in state.items()} for state in (found, wanted)), 1e-7)


def test_two_ranks_go_on_from_what_is_left_and_so_does_one(settings: dict[str, Any], alone: Path) -> None:
    spawn(2, alone.parent / "disturbed-files", _disturbed, settings)
    folder = alone.parent / "disturbed"
    _assert_ended_alike(folder, alone)
    shutil.rmtree(folder)
    (alone.parent / "elsewhere" / "interrupted").rename(folder)
    _run(settings, "disturbed")
    _assert_ended_alike(folder, alone)
