"""The whole flow for one configuration: train, compress, fine-tune, measure, export, report.

    summary = run(load_config("configs/demo.yaml"))

Everything lands in runs/<name>/. A run that was interrupted goes on from its last checkpoint when it is run again.
Started by torchrun, every rank calls `run`: each works on its share of every batch, and rank 0 writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor, nn

from cctorch import (
    _C,
    codes,
    compress_stage,
    data,
    datasets,
    distributed,
    measure_stage,
    models,
    quantize_stage,
    report,
)
from cctorch.compress_stage import CompressStage
from cctorch.config import Compress, Config, ConfigError, Finetune, Training, expand
from cctorch.device import describe, select_device, set_up
from cctorch.graph import trace
from cctorch.interruption import Interruption
from cctorch.log import Log, duration
from cctorch.network import Network
from cctorch.prepare import convert, prepare
from cctorch.regularize_stage import RegularizeStage, select
from cctorch.session import locked, logged
from cctorch.state import Checkpoints, Saved, State
from cctorch.step import Criterion, GraphedStep, Step, make_step
from cctorch.store import Architecture, Events, Folder, Steps, build, load_model
from cctorch.summary import Summary, counted, show
from cctorch.train import Partial, learning_rate, make_criterion, seeded, train_epoch


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
                return _finish(summary, ahead, folder, log)


def _finish(summary: Summary | None, ahead: _Run | None, folder: Folder, log: Log) -> Summary:
    page = folder.path / "report.html"
    if ahead is not None:
        summary = ahead.execute(log)
    else:
        log.line(f"{folder.path} is finished; --fresh starts it over")
    assert summary is not None
    if distributed.is_main() and (ahead is not None or not page.exists()):
        report.write(folder.path)
    show(summary, log)
    log.line(f"report: {page}")
    return summary


class _Run:
    log: Log
    events: Events
    steps: Steps

    def __init__(self, config: Config, folder: Folder, interruption: Interruption, fresh: bool) -> None:
        self.config, self.folder, self.interruption = config, folder, interruption
        self.vote = distributed.Vote()
        self.device = set_up(config)
        self.regularizing: RegularizeStage | None = None
        self.data = self._load_data()
        self.feed = data.Feed(self.data, config.train.channels_last)
        self.architecture = Architecture(
            config.model.name, self.data.classes, self.data.shape, self.data.mean, self.data.std
        )
        self.checkpoints = Checkpoints(folder.checkpoints)
        saved, self.damaged = (None, []) if fresh else self.checkpoints.newest()
        self.resuming = saved is not None
        self.state = saved.state if saved else State()
        torch.manual_seed(config.seed)
        self.network = self._network(saved)
        self.regularized = self._regularized()
        if config.compress and (config.compress.exclude or config.compress.bounds) and not self.resuming:
            compress_stage.check_names(self._fresh(), self.feed.example(2).cpu(), config.compress)
        self.quantization: _C.CompressionPlan | None = None
        self.warnings = self.damaged
        if config.quantize:
            planned = quantize_stage.planned(self._fresh(), self.feed.example(2).cpu(), config.quantize)
            self.quantization, warned = planned
            self.warnings += warned

    @property
    def device_name(self) -> str:
        return describe(self.device)

    @property
    def settings(self) -> Training:
        return _trainings(self.config).get(self.state.stage) or self.config.train

    def execute(self, log: Log) -> Summary:
        self.log = log
        for warning in self.warnings:
            log.warning(warning)
        self.events, self.steps = Events(self.folder, self.state.events), Steps(self.folder, self.state.steps_bytes)
        try:
            log.line(
                f"data: {self.data.source}, {len(self.data.train)} training, {len(self.data.validation)} validation, "
                f"{len(self.data.test)} test images; device: {self.device_name}"
            )
            if self.resuming:
                behind = f" and {len(self.state.losses)} steps" if self.state.losses else ""
                log.line(f"resuming at stage {self.state.stage}, after epoch {self.state.epoch}{behind}")
            if self.state.stage == "train":
                self._train()
                self._finish_dense()
            if self.state.stage == "compress" and self.config.compress:
                self._compress(self.config.compress)
            if self.state.stage == "finetune":
                self._train()
                self._finish_compressed()
            if self.state.stage == "regularize":
                self._regularize()
            if self.state.stage == "quantize":
                self._quantize()
            whole = self.network.whole(self._blank)
            summary = distributed.on_main(lambda: self._measure(self.network.place(whole)))
            self.checkpoints.close()
            return summary
        finally:
            self.events.close()
            self.steps.close()
            self.checkpoints.wait()

    def _load_data(self) -> data.Dataset:
        """Rank 0 goes first: it downloads, and decodes into the cache, what is not there."""
        loaded: list[data.Dataset] = []

        def load() -> None:
            loaded.append(datasets.load(self.config.data, self.config.seed, self.device))

        distributed.on_main(load)
        if not loaded:
            load()
        return loaded[0]

    def _network(self, saved: Saved | None) -> Network:
        """As `saved`, or with the configuration's weights, or fresh ones."""
        model = self._blank()
        if saved is None and self.config.model.weights is not None:
            models.load_weights(model, expand(self.config.model.weights))
        network = Network(model, self.config, self.settings, self.feed, self.device)
        if saved is not None:
            parameters = dict(network.model.named_parameters())
            momentum = {name: torch.empty_like(parameters[name]).detach() for name in saved.names("momentum")}
            regularization = saved.like("regularization")
            model_state = network.model.state_dict()
            tensors = {"model": model_state, "momentum": momentum, "regularization": regularization}
            self.checkpoints.load(saved, tensors)
            self.state.regularization |= regularization
            network.optimize(self.settings, momentum)
        return network

    def _blank(self) -> nn.Module:
        model = build(self.architecture, self.state.plan)
        if self.state.stage == "quantize" and self.state.plan:
            prepare(model, _C.CompressionPlan.from_json(self.state.plan))
        return model

    def _fresh(self) -> nn.Module:
        """A dense model, of which the weights don't matter."""
        return build(self.architecture, None)

    def _regularized(self) -> list[str]:
        """Names of the parameters that the regularization events act on, in the dense model."""
        settings = self.config.regularize
        if settings is None:
            return []
        names = select(self._fresh(), settings.parameters)
        if self.config.compress is None:
            # The shapes are known already: one that does not fit Q is refused before any training.
            RegularizeStage(settings, self.network.model, names, self.network.optimizer, {}, [])
        return names

    def _dense(self) -> nn.Module:
        return self.network.place(distributed.on_main(lambda: load_model(self.folder.dense)[0]))

    def _save(self, stage: str, epoch: int, partial: Partial | None = None) -> None:
        self.network.assert_identical(f"{stage}, epoch {epoch}")
        self.state.stage, self.state.epoch = stage, epoch
        self.state.losses, self.state.seconds = (partial.losses, partial.seconds) if partial else ([], 0.0)
        self.state.events = self.events.all
        regularization: dict[str, Tensor] = {}
        if self.regularizing:
            remembered = self.regularizing.events.state_dict()
            regularization = {key: value for key, value in remembered.items() if isinstance(value, Tensor)}
            self.state.regularization = {key: value for key, value in remembered.items() if key not in regularization}
            self.state.results["trace"] = self.regularizing.trace
        self.state.steps_bytes = self.steps.size()
        model, momentum = self.network.model.state_dict(), self.network.momentum()
        tensors = {"model": model, "momentum": momentum, "regularization": regularization}
        self.checkpoints.save(self.state, tensors)

    def _train(self) -> None:
        """Ends an interrupted epoch in a checkpoint. What is deferred until then is decided by all ranks together."""
        stage, settings = self.state.stage, self.settings
        self._check_slices(settings)
        step = make_step(self.network.parallel, self.network.optimizer, settings, self._criterion(settings))
        with self.interruption.deferred():
            for epoch in range(self.state.epoch, settings.epochs):
                self._epoch(stage, settings, epoch, step)
                if distributed.any_rank(self.interruption.requested):
                    raise self.interruption.interrupted()

    def _epoch(self, stage: str, settings: Training, epoch: int, step: Step | GraphedStep) -> None:
        label = f"{stage} {epoch + 1}/{settings.epochs}"
        batches = self.feed.batches(self.data.train, settings.batch_size)
        batches = batches.sliced(distributed.rank(), distributed.world_size())
        partial = Partial(list(self.state.losses), self.state.seconds)
        steps, written = len(batches), len(partial.losses)
        if not written:
            self.state.events_before = len(self.regularizing.trace) if self.regularizing else 0
        with self.log.task(label, steps) as task:

            def progress(losses: list[float]) -> None:
                nonlocal written
                task.update(len(losses), f"loss {sum(losses) / len(losses):.4f}")
                self.steps.add(
                    stage,
                    epoch + 1,
                    written,
                    losses[written:],
                    lambda step: learning_rate(settings, epoch * steps + step, settings.epochs * steps),
                )
                written = len(losses)

            seed, number = self.config.seed, self._epochs_before(stage) + epoch
            result = train_epoch(
                self.network.parallel,
                seeded(batches.epoch(seed, number, settings.augment, written), seed, number, written),
                self.network.optimizer,
                settings,
                epoch=epoch,
                steps=steps,
                images=len(self.data.train),
                train_step=step,
                progress=progress,
                after_step=self.regularizing.step if self.regularizing else lambda: None,
                stop=lambda: self.vote(self.interruption.requested),
                done=partial,
            )
        if not self.config.synchronize_batch_norm:
            distributed.broadcast_buffers(self.network.model)
        if result is None:
            self._save(stage, epoch, partial)
            raise self.interruption.interrupted()
        with self._as_if_compressed():
            accuracy = self.network.accuracy(self.data.validation) if len(self.data.validation) else None
        recent = self.regularizing.since(self.state.events_before) if self.regularizing else {}
        self.events.add("epoch", stage, epoch=epoch + 1, accuracy=accuracy, **asdict(result), **recent)
        shown = "" if accuracy is None else f"  validation top-1 {accuracy:.2f} %"
        pace = f"{duration(result.seconds)}, {result.images_per_second:.0f} images/s"
        self.log.line(f"{label}  loss {result.loss:.4f}{shown}  {pace}")
        self._save(stage, epoch + 1)

    def _check_slices(self, settings: Training) -> None:
        """Statistics of no image are none: only synchronized ones leave a rank without images alone."""
        last = len(self.data.train) % settings.batch_size or settings.batch_size
        ranks = distributed.world_size()
        if not self.config.synchronize_batch_norm and min(last, len(self.data.train)) < ranks:
            raise ConfigError(
                f"synchronize_batch_norm = False: the last of {len(self.data.train)} images in batches of "
                f"{settings.batch_size} are {last}, too few for {ranks} ranks; expected at least one each"
            )

    def _criterion(self, settings: Training) -> Criterion:
        distillation = settings.distillation if isinstance(settings, Finetune) else None
        if distillation is None:
            return make_criterion(settings)
        return make_criterion(settings, (distillation, self._dense()))

    def _finish_dense(self) -> None:
        top1 = self.network.accuracy(self.data.test)
        self.events.add("dense", "train", accuracy=top1)
        self.log.line(f"dense model: test top-1 {top1:.2f} %")
        self.state.results["dense_top1"] = top1
        whole = self.network.whole(self._blank)
        distributed.on_main(lambda: self.folder.save_dense(whole, self.architecture))
        if not self.config.compress:
            example = self.feed.example(2).to(next(whole.parameters()).device)
            self.state.results |= counted(trace(whole, example).specs)
        if self.config.compress:
            self._begin("compress", self.network.momentum())
        else:
            self._begin_last()

    def _begin_last(self) -> None:
        """What follows the compression, or the training."""
        if self.quantization is not None:
            self._prepare(self.quantization)
        else:
            self._begin("regularize" if self.config.regularize else "measure", self.network.momentum())

    def _begin(self, stage: str, momentum: dict[str, Tensor]) -> None:
        """Training that starts anew: the momentum stays, the learning rate is the stage's own."""
        self.state.stage = stage
        self.network.optimize(self.settings, momentum)
        self._save(stage, 0)
        self.checkpoints.wait()  # what follows may need the memory of the copy, or measure times

    def _compress(self, settings: Compress) -> None:
        self.network.unwrap(self._blank, self.settings)
        images = self.feed.batches(self.data.train, self.config.train.batch_size)
        stage = CompressStage(settings, self.config.seed, self.network, self.data, images)
        bits = quantize_stage.bits_of(self.quantization)
        plan = stage.execute(self.folder, bits, self.events, self.log, self.state.results, self._dense)
        self.state.plan = plan.to_json()
        momentum = self.network.momentum()
        self.network.wrap(self.network.model)
        self._begin("finetune", momentum)

    def _finish_compressed(self) -> None:
        top1 = self.network.accuracy(self.data.test)
        self.events.add("finetuned", "finetune", accuracy=top1)
        self.log.line(f"compressed model: test top-1 {top1:.2f} %")
        self._compressed(top1)
        self._begin_last()

    def _compressed(self, top1: float, grids: Mapping[str, codes.Grid] | None = None) -> None:
        self.state.results["compressed_top1"] = top1
        settings, whole = self.config.checkpoint, self.network.whole(self._blank)
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
        self._train()
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
        self._compressed(top1)
        self._save("measure", 0)
        self.checkpoints.wait()

    def _prepare(self, unchanged: _C.CompressionPlan) -> None:
        """Every rank's scales start from the same weights."""
        self.network.unwrap(self._blank, self.settings)
        self.state.plan = self.state.plan or unchanged.to_json()
        model = prepare(self.network.model, _C.CompressionPlan.from_json(self.state.plan))
        top1 = self.network.accuracy(self.data.test)
        self.events.add("prepared", "quantize", accuracy=top1)
        self.log.line(f"quantized, before any training: test top-1 {top1:.2f} %")
        self.state.results["top1_prepared"] = top1
        self.network.wrap(model)
        self._begin("quantize", {})

    def _quantize(self) -> None:
        self._train()
        self.network.unwrap(self._blank, self.settings)
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
        self.state.stage = "measure"
        self._compressed(top1, grids)
        self._begin("measure", {})

    def _epochs_before(self, stage: str) -> int:
        trainings = _trainings(self.config)
        names = list(trainings)
        return sum(settings.epochs for name in names[: names.index(stage)] if (settings := trainings[name]))

    def _as_if_compressed(self) -> contextlib.AbstractContextManager[object]:
        return self.regularizing.events.as_if_at_event() if self.regularizing else contextlib.nullcontext()

    def _measure(self, model: nn.Module) -> Summary:
        return measure_stage.measured(
            self.config, self.folder, self.feed, model, self.device, self.state.results, self.log
        )


def _trainings(config: Config) -> dict[str, Training | None]:
    """The stages that train, in their order."""
    return {
        "train": config.train,
        "finetune": config.finetune,
        "regularize": config.regularize,
        "quantize": config.quantize,
    }
