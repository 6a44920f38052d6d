"""The whole flow for one configuration: train, compress, fine-tune, measure, export, report.

    summary = run(load_config("configs/demo.yaml"))

Everything lands in runs/<name>/. A run that was interrupted goes on from its last checkpoint when it is run again.
Started by torchrun, every rank calls `run`: each works on its share of every batch, and rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from torch import Tensor, nn

from cctorch import _C, codes, compress_stage, distributed, measure_stage, quantize_stage, report
from cctorch.apply import apply
from cctorch.compress_stage import CompressStage
from cctorch.config import Config
from cctorch.device import describe, select_device
from cctorch.graph import trace
from cctorch.interruption import Interruption
from cctorch.log import Log
from cctorch.prepare import convert, prepare
from cctorch.regularize_stage import RegularizeStage, select
from cctorch.repair_stage import repair_network
from cctorch.session import locked, logged
from cctorch.store import Events, Folder, Steps, build, load_model
from cctorch.summary import Summary, counted, show
from cctorch.trainer import Trainer


def run(config: Config, *, fresh: bool = False, console: Console | None = None) -> Summary:
    """Runs, resumes, or (if it is finished) reads the run of `config`. `fresh` starts over.

    Raises ConfigError, data.DataError and models.CheckpointError before any training, TrainingError where the loss is
    not finite, ValueError where the target is missed by more than 1 % of the budget. Interrupted, after a signal or
    without one of its ranks: the same call goes on.
    """
    with Interruption() as interruption, distributed.joined(select_device(config)):
        # Rank 0's, in case that another machine's file says something else.
        config, fresh = distributed.on_main(lambda: (config, fresh and not distributed.was_restarted()))
        with locked(config, interruption) as folder:
            if not fresh:
                distributed.on_main(lambda: folder.check(config))
            summary = None if fresh else distributed.on_main(folder.summary)
            # What is refused is refused here, before anything is written or, for --fresh, deleted.
            ahead = None if summary else _Run(config, folder, interruption, fresh)
            with logged(folder, config, interruption, fresh, console) as log:
                return _finish(config, summary, ahead, folder, log)


def _finish(config: Config, summary: Summary | None, ahead: _Run | None, folder: Folder, log: Log) -> Summary:
    page = folder.path / "report.html"
    if ahead is not None:
        summary = ahead.execute(log)
    else:
        log.line(f"{folder.path} is finished; --fresh starts it over")
        distributed.on_main(lambda: measure_stage.export_files(config, folder, log, only_missing=True))
    assert summary is not None
    if distributed.is_main() and (ahead is not None or not page.exists()):
        report.write(folder.path)
    show(summary, log)
    log.line(f"report: {page}")
    return summary


class _Run(Trainer):
    def __init__(self, config: Config, folder: Folder, interruption: Interruption, fresh: bool) -> None:
        super().__init__(config, folder, interruption, fresh)
        measure_stage.check(config)
        self.regularized = self._regularized()
        if config.compress and (config.compress.exclude or config.compress.bounds) and not self.resuming:
            compress_stage.check_names(self._fresh(), self.feed.example(2).cpu(), config.compress)
        self.quantization: _C.CompressionPlan | None = None
        if config.quantize:
            planned = quantize_stage.planned(self._fresh(), self.feed.example(2).cpu(), config.quantize)
            self.quantization, warned = planned
            self.warnings += warned

    def execute(self, log: Log) -> Summary:
        self.log = log
        for warning in self.warnings:
            log.warning(warning)
        self.events, self.steps = Events(self.folder, self.state.events), Steps(self.folder, self.state.steps_bytes)
        try:
            log.line(
                f"data: {self.data.source}, {len(self.data.train)} training, {len(self.data.validation)} validation, "
                f"{len(self.data.test)} test images; device: {describe(self.device)}"
            )
            if self.resuming:
                behind = f" and {len(self.state.losses)} steps" if self.state.losses else ""
                log.line(f"resuming at stage {self.state.stage}, after epoch {self.state.epoch}{behind}")
            stages = {
                "train": self._train_dense,
                "compress": self._compress,
                "finetune": self._finetune,
                "regularize": self._regularize,
                "quantize": self._quantize,
            }
            while self.state.stage in stages:
                stages[self.state.stage]()
            whole = self.network.whole(self.blank)
            summary = distributed.on_main(lambda: self._measure(self.network.place(whole)))
            self.checkpoints.close()
            return summary
        finally:
            self.events.close()
            self.steps.close()
            self.checkpoints.wait()

    def _fresh(self) -> nn.Module:
        """A dense model, of which the weights don't matter."""
        return build(self.architecture, None)

    def _regularized(self) -> list[str]:
        """Names of the parameters that the regularization events act on, in the dense model."""
        settings = self.config.regularize
        if settings is None:
            return []
        names = select(self._fresh(), settings.parameters)
        if self.config.compress is None and self.state.plan is None:
            # The shapes are known already: one that does not fit Q is refused before any training.
            stage = RegularizeStage(settings, self.network.model, names, self.network.optimizer, {}, [])
            if self.config.finetune or self.config.quantize:
                stage.expect_all_smaller(self._fresh(), names, self.feed.example(2).cpu())
        return names

    def _train_dense(self) -> None:
        self.train()
        top1 = self.network.accuracy(self.data.test)
        self.events.add("dense", "train", accuracy=top1)
        self.log.line(f"dense model: test top-1 {top1:.2f} %")
        self.state.results["dense_top1"] = top1
        whole = self.network.whole(self.blank)
        distributed.on_main(lambda: self.folder.save_dense(whole, self.architecture))
        if not self.config.compress:
            example = self.feed.example(2).to(next(whole.parameters()).device)
            self.state.results |= counted(trace(whole, example).specs)
        self._begin_next(self.network.momentum())

    def _begin_next(self, momentum: dict[str, Tensor]) -> None:
        """Of the weights that training goes on with the momentum stays; the learning rate is the stage's own."""
        stages = self.config.stages
        stage = stages[stages.index(self.state.stage) + 1]
        if stage == "quantize":
            self._prepare()
            momentum = {}
        self.state.stage = stage
        self.network.optimize(self.settings, momentum)
        self.save(stage, 0)
        self.checkpoints.wait()  # what follows may need the memory of the copy, or measure times

    def _compress(self) -> None:
        settings = self.config.compress
        assert settings
        self.network.unwrap(self.blank, self.settings)
        images = self.feed.batches(self.data.train, self.config.train.batch_size)
        stage = CompressStage(settings, self.config.seed, self.network, self.data, images)
        bits = quantize_stage.bits_of(self.quantization)
        plan = stage.execute(self.folder, bits, self.events, self.log, self.state.results, self.dense)
        self.state.plan = plan.to_json()
        momentum = self.network.momentum()
        self.network.wrap(self.network.model)
        self._begin_next(momentum)

    def _finetune(self) -> None:
        self.train()
        top1 = self.network.accuracy(self.data.test)
        self.events.add("finetuned", "finetune", accuracy=top1)
        self.log.line(f"compressed model: test top-1 {top1:.2f} %")
        self._compressed(top1)
        self._begin_next(self.network.momentum())

    def _compressed(self, top1: float, grids: Mapping[str, codes.Grid] | None = None) -> None:
        self.state.results["compressed_top1"] = top1
        settings, whole = self.config.checkpoint, self.network.whole(self.blank)
        distributed.on_main(
            lambda: self.folder.save_compressed(whole, self.state.plan, self.architecture, settings, grids or {})
        )
        if settings.lossy:
            file = self.folder.deliverable(settings)
            stored = self.network.place(distributed.on_main(lambda: load_model(file)[0]))
            top1 = self.network.accuracy(self.data.test, stored)
            self.events.add("stored", self.state.stage, accuracy=top1)
            bound = f"within {settings.error_bound:g} of the weights' root mean squares"
            self.log.line(f"{file.name}, {bound}: test top-1 {top1:.2f} %")

    def _regularize(self) -> None:
        assert self.config.regularize
        stage = RegularizeStage(
            self.config.regularize,
            self.network.model,
            self.regularized,
            self.network.optimizer,
            self.state.regularization,
            self.state.results.setdefault("trace", []),
        )
        self.regularizing = stage
        self.train()
        between = self.network.accuracy(self.data.test)
        stage.finish()
        top1 = self.network.accuracy(self.data.test)
        self.events.add("regularized", "regularize", accuracy=top1)
        result = stage.result(top1, between)
        self.log.line(
            f"right after the last of {result.events} events: test top-1 {top1:.2f} % ({between:.2f} % before it); "
            f"{result.dense_bits / 8e6:.3f} MB -> {result.bits / 8e6:.3f} MB where Q acts"
        )
        self.state.results["regularized"] = asdict(result)
        # Its events are over: what comes has other parameters.
        self.regularizing, self.state.regularization = None, {}
        momentum = self.network.momentum()
        if self.config.regularize.apply and self.config.compress is None:
            top1, momentum = self._apply_regularized(stage, top1)
        self._compressed(top1)
        self._begin_next(momentum)

    def _apply_regularized(self, stage: RegularizeStage, top1: float) -> tuple[float, dict[str, Tensor]]:
        """Rebuilds the layers that are smaller for what Q left of their weights. Returns top-1 and momentum."""
        settings = self.config.regularize
        assert settings
        self.network.unwrap(self.blank, self.settings)
        example, dense = self.feed.example(2).to(self.device), self._fresh()
        found = distributed.on_main(lambda: stage.plan(self.network.model, self.regularized, example).to_json())
        plan = _C.CompressionPlan.from_json(found)
        momentum = self.network.momentum()
        if not plan.layers:
            if settings.repair:
                self.log.warning("regularize.repair: no layer has become smaller, and none is fitted")
            self.network.wrap(self.network.model)
            return top1, momentum
        smaller = sum(layer.kind != "batch_norm2d" for layer in plan.layers)
        specs = trace(dense, example.cpu()).specs
        self.network.model = self.network.place(apply(self.network.model, plan, self.network.optimizer))
        self.network.assert_identical("the layers as small as their weights")
        _C.set_bits(specs, plan, quantize_stage.bits_of(self.quantization))
        self.state.plan = plan.to_json()
        distributed.on_main(lambda: self.folder.write("plan.json", plan.to_json()))
        self.state.results |= counted(specs, plan)
        top1 = self.network.accuracy(self.data.test)
        self.events.add("applied", "regularize", accuracy=top1)
        before, after = self.state.results["dense_macs"], self.state.results["final_macs"]
        self.log.line(
            f"{smaller} layers are as small as their weights: test top-1 {top1:.2f} %, "
            f"MACs {before / 1e6:.2f} M -> {after / 1e6:.2f} M"
        )
        if settings.repair:
            images = self.feed.batches(self.data.train, settings.batch_size).head(
                settings.repair_images, self.config.seed
            )
            teacher, results = self.dense(), self.state.results
            top1 = repair_network(
                self.network, plan, teacher, images, self.data, "regularize", self.events, self.log, results
            )
        momentum = self.network.momentum()
        self.network.wrap(self.network.model)
        return top1, momentum

    def _prepare(self) -> None:
        """Every rank's scales start from the same weights."""
        settings, unchanged = self.config.quantize, self.quantization
        assert settings
        assert unchanged
        self.network.unwrap(self.blank, self.settings)
        self.state.plan = self.state.plan or unchanged.to_json()
        model = prepare(self.network.model, _C.CompressionPlan.from_json(self.state.plan), init=settings.init)
        top1 = self.network.accuracy(self.data.test)
        self.events.add("prepared", "quantize", accuracy=top1)
        self.log.line(f"quantized, before any training: test top-1 {top1:.2f} %")
        self.state.results["top1_prepared"] = top1
        self.network.wrap(model)

    def _quantize(self) -> None:
        self.train()
        self.network.unwrap(self.blank, self.settings)
        model = self.network.model
        grids = codes.grids(model)
        convert(model)
        top1 = self.network.accuracy(self.data.test)
        self.events.add("quantized", "quantize", accuracy=top1)
        result = quantize_stage.result(model.state_dict(), grids, top1, self.state.results.pop("top1_prepared"))
        self.log.line(
            f"quantized model: test top-1 {top1:.2f} %; weights {result.dense_bits / 8e6:.3f} MB -> "
            f"{result.bits / 8e6:.3f} MB"
        )
        self.state.results["quantized"] = asdict(result)
        self._compressed(top1, grids)
        self._begin_next({})

    def _measure(self, model: nn.Module) -> Summary:
        return measure_stage.measured(
            self.config, self.folder, self.feed, model, self.device, self.state.results, self.log
        )
