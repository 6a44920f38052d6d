"""The whole flow for one configuration: train, compress, fine-tune, measure, export, report.

    summary = run(load_config("configs/demo.yaml"))

Everything lands in runs/<name>/. A run that was interrupted goes on from its last epoch when it is run again.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cctorch import _C, batch_norm, compress_stage, data, export, measure, models, report
from cctorch.apply import apply
from cctorch.config import Compress, Config, ConfigError, Finetune, Training, expand
from cctorch.graph import trace
from cctorch.log import Log, duration
from cctorch.regularize_stage import RegularizeStage, select
from cctorch.repair import repair
from cctorch.store import Architecture, Events, Folder, State, build, load_model
from cctorch.summary import Figures, Summary, counted, search_results, show
from cctorch.train import Criterion, make_criterion, make_optimizer, momentum_by_name, restore_momentum, train_epoch


def run(config: Config, *, fresh: bool = False, console: Console | None = None) -> Summary:
    """Runs, resumes, or (if it is finished) reads the run of `config`. `fresh` starts over.

    Raises ConfigError, data.DataError and models.CheckpointError before any training, TrainingError where the loss is
    not finite, ValueError where the target is missed by more than 1 % of the budget.
    """
    folder = Folder(config.folder)
    with folder.locked():
        if not fresh:
            folder.check(config)
        # What is refused is refused here, before anything is written or, for --fresh, deleted.
        ahead = None if folder.finished and not fresh else _Run(config, folder, fresh)
        if fresh:
            folder.clear()
        folder.begin(config)
        with Log(folder.path / "run.log", console) as log, warnings.catch_warnings():
            warnings.showwarning = log.show_warning
            return _finish(folder, ahead, log)


def _finish(folder: Folder, ahead: _Run | None, log: Log) -> Summary:
    if ahead is None:
        summary = Summary.from_json((folder.path / "summary.json").read_text())
        log.line(f"{folder.path} is finished; --fresh starts it over")
        if not (folder.path / "report.html").exists():
            report.write(folder.path)
    else:
        summary = ahead.execute(log)
        report.write(folder.path)
    show(summary, log)
    log.line(f"report: {folder.path / 'report.html'}")
    return summary


def select_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no CUDA device; expected auto or cpu on this machine")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


class _Run:
    log: Log
    events: Events

    def __init__(self, config: Config, folder: Folder, fresh: bool) -> None:
        self.config, self.folder = config, folder
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.device = select_device(config)
        self.regularizing: RegularizeStage | None = None
        self.data = data.load(config.data, config.seed, self.device)
        self.feed = data.Feed(self.data, config.train.channels_last)
        self.architecture = Architecture(
            config.model.name, self.data.classes, self.data.shape, self.data.mean, self.data.std
        )
        state, self.damaged = (None, []) if fresh else folder.load_state()
        self.resuming = state is not None
        self.state = state or State()
        self.model = self._model()
        self.optimizer = self._optimizer(self.state.momentum)
        self.regularized = self._regularized()

    @property
    def device_name(self) -> str:
        return describe(self.device)

    @property
    def settings(self) -> Training:
        settings = {"finetune": self.config.finetune, "regularize": self.config.regularize}.get(self.state.stage)
        return settings or self.config.train

    def execute(self, log: Log) -> Summary:
        self.log = log
        for warning in self.damaged:
            log.warning(warning)
        self.events = Events(self.folder, self.state.events)
        try:
            log.line(
                f"data: {self.data.source}, {len(self.data.train)} training, {len(self.data.validation)} validation, "
                f"{len(self.data.test)} test images; device: {self.device_name}"
            )
            if self.resuming:
                log.line(f"resuming at stage {self.state.stage}, after epoch {self.state.epoch}")
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
            return self._measure()
        finally:
            self.events.close()

    def _model(self) -> nn.Module:
        model = build(self.architecture, self.state.plan)
        if self.state.model:
            models.load_state(model, self.state.model, str(self.folder.checkpoints / "last.pt"))
        elif self.config.model.weights is not None:
            models.load_weights(model, expand(self.config.model.weights))
        return self._place(model)

    def _regularized(self) -> list[str]:
        """Names of the parameters that the regularization events act on, in the dense model."""
        settings = self.config.regularize
        if settings is None:
            return []
        names = select(build(self.architecture, None), settings.parameters)
        if self.config.compress is None:
            # The shapes are known already: one that does not fit Q is refused before any training.
            RegularizeStage(settings, self.model, names, self.optimizer, {}, [])
        return names

    def _place(self, model: nn.Module) -> nn.Module:
        return self.feed.place(model, self.device)

    def _optimizer(self, momentum: dict[str, Tensor]) -> torch.optim.SGD:
        optimizer = make_optimizer(self.model, self.settings)
        restore_momentum(self.model, optimizer, momentum)
        return optimizer

    def _accuracy(self, images: data.ImageSet) -> float:
        return measure.accuracy(self.model, self.feed.batches(images, 500))

    def _save(self, stage: str, epoch: int) -> None:
        self.state.stage, self.state.epoch = stage, epoch
        self.state.model, self.state.events = self.model.state_dict(), self.events.all
        self.state.momentum = momentum_by_name(self.model, self.optimizer)
        if self.regularizing:
            self.state.regularization = dict(self.regularizing.events.state_dict())
            self.state.results["trace"] = self.regularizing.trace
        self.folder.save_state(self.state)

    def _train(self) -> None:
        stage, settings = self.state.stage, self.settings
        batches = self.feed.batches(self.data.train, settings.batch_size)
        criterion = self._criterion(settings)
        offset = self._epochs_before(stage)
        for epoch in range(self.state.epoch, settings.epochs):
            label = f"{stage} {epoch + 1}/{settings.epochs}"
            before = len(self.regularizing.trace) if self.regularizing else 0
            with self.log.task(label, len(batches)) as task:
                result = train_epoch(
                    self.model,
                    batches.epoch(self.config.seed, offset + epoch, settings.augment),
                    self.optimizer,
                    settings,
                    epoch=epoch,
                    steps=len(batches),
                    images=len(self.data.train),
                    criterion=criterion,
                    progress=lambda step, loss, task=task: task.update(step, f"loss {loss:.4f}"),  # type: ignore[misc]
                    after_step=self.regularizing.step if self.regularizing else lambda: None,
                )
            with self._as_if_compressed():
                accuracy = self._accuracy(self.data.validation) if len(self.data.validation) else None
            recent = self.regularizing.since(before) if self.regularizing else {}
            self.events.add("epoch", stage, epoch=epoch + 1, accuracy=accuracy, **asdict(result), **recent)
            shown = "" if accuracy is None else f"  validation top-1 {accuracy:.2f} %"
            self.log.line(
                f"{label}  loss {result.loss:.4f}{shown}  {duration(result.seconds)}, "
                f"{result.images_per_second:.0f} images/s"
            )
            self._save(stage, epoch + 1)

    def _criterion(self, settings: Training) -> Criterion:
        distillation = settings.distillation if isinstance(settings, Finetune) else None
        if distillation is None:
            return make_criterion(settings)
        return make_criterion(settings, (distillation, self._place(load_model(self.folder.dense)[0])))

    def _finish_dense(self) -> None:
        top1 = self._accuracy(self.data.test)
        self.events.add("dense", "train", accuracy=top1)
        self.log.line(f"dense model: test top-1 {top1:.2f} %")
        self.state.results["dense_top1"] = top1
        self.folder.save_model(self.folder.dense, self.model, None, self.architecture)
        if not self.config.compress:
            self.state.results |= counted(trace(self.model, self.feed.example(2)).specs)
        self._begin("compress" if self.config.compress else "regularize")

    def _begin(self, stage: str) -> None:
        """Training that starts anew: the momentum stays, the learning rate is the stage's own."""
        momentum = momentum_by_name(self.model, self.optimizer)
        self.state.stage = stage
        self.optimizer = self._optimizer(momentum)
        self._save(stage, 0)

    def _compress(self, settings: Compress) -> None:
        images = self.feed.batches(self.data.train, self.config.train.batch_size)
        with self.log.stages() as progress:
            found = compress_stage.search(self.model, images, self.config.seed, settings, progress=progress)
        for warning in found.warnings:
            self.log.warning(warning)
        self.folder.write("plan.json", found.plan.to_json())
        self.folder.save_gradients(found.gradients)
        self.folder.write("curves.json", json.dumps([_curve(curve) for curve in found.curves]))
        self.log.line(
            f"search: gradients {found.gradient_seconds:.1f} s, rate curves {found.curve_seconds:.1f} s, heuristic "
            f"{found.heuristic_seconds:.1f} s; MACs {found.dense_macs / 1e6:.2f} M -> {found.final_macs / 1e6:.2f} M"
        )
        self.state.plan = found.plan.to_json()
        self.state.results |= search_results(found)
        self.model = self._place(apply(self.model, found.plan, self.optimizer))
        self._reestimate(settings.bn_reestimate_images)
        self._repair(found.plan, settings)
        self._begin("finetune")

    def _reestimate(self, count: int) -> None:
        top1 = self._accuracy(self.data.test)
        self.events.add("compressed", "compress", accuracy=top1)
        self.log.line(f"right after compression: test top-1 {top1:.2f} %")
        self.state.results |= {"top1_compressed": top1, "top1_reestimated": None}
        if count:
            batches = self.feed.batches(self.data.train, self.config.train.batch_size).head(count, self.config.seed)
            batch_norm.reestimate(self.model, batches)
            top1 = self._accuracy(self.data.test)
            self.events.add("reestimated", "compress", accuracy=top1)
            self.log.line(f"BatchNorm statistics re-estimated: test top-1 {top1:.2f} %")
            self.state.results["top1_reestimated"] = top1

    def _repair(self, plan: _C.CompressionPlan, settings: Compress) -> None:
        if not settings.repair:
            return
        dense = self._place(load_model(self.folder.dense)[0])
        batches = self.feed.batches(self.data.train, self.config.train.batch_size).head(
            settings.repair_images, self.config.seed
        )
        with self.log.stages() as progress:
            seconds = repair(self.model, dense, plan, batches, progress=progress).seconds
        top1 = self._accuracy(self.data.test)
        self.events.add("repaired", "compress", accuracy=top1, seconds=seconds)
        self.log.line(f"weights fitted to the dense model's outputs in {seconds:.1f} s: test top-1 {top1:.2f} %")
        self.state.results |= {"top1_repaired": top1, "repair_seconds": seconds}

    def _finish_compressed(self) -> None:
        top1 = self._accuracy(self.data.test)
        self.events.add("finetuned", "finetune", accuracy=top1)
        self.log.line(f"compressed model: test top-1 {top1:.2f} %")
        self._compressed(top1)
        self._begin("regularize" if self.config.regularize else "measure")

    def _compressed(self, top1: float) -> None:
        self.state.results["compressed_top1"] = top1
        self.folder.save_model(self.folder.compressed, self.model, self.state.plan, self.architecture)

    def _regularize(self) -> None:
        assert self.config.regularize
        stage = RegularizeStage(
            self.config.regularize,
            self.model,
            self.regularized,
            self.optimizer,
            self.state.regularization,
            self.state.results.setdefault("trace", []),
        )
        self.regularizing = stage
        self._train()
        between = self._accuracy(self.data.test)
        stage.finish()
        top1 = self._accuracy(self.data.test)
        self.events.add("regularized", "regularize", accuracy=top1)
        result = stage.result(top1, between)
        self.log.line(
            f"right after the last of {result.events} events: test top-1 {top1:.2f} % ({between:.2f} % before it); "
            f"{result.dense_bits / 8e6:.3f} MB -> {result.bits / 8e6:.3f} MB where Q acts"
        )
        self.state.results["regularized"] = asdict(result)
        self._compressed(top1)
        self._save("measure", 0)

    def _epochs_before(self, stage: str) -> int:
        stages = {"train": self.config.train, "finetune": self.config.finetune, "regularize": self.config.regularize}
        names = list(stages)
        return sum(settings.epochs for name in names[: names.index(stage)] if (settings := stages[name]))

    def _as_if_compressed(self) -> contextlib.AbstractContextManager[object]:
        return self.regularizing.events.as_if_at_event() if self.regularizing else contextlib.nullcontext()

    def _measure(self) -> Summary:
        results = self.state.results
        self.log.line("measuring")
        dense = self._place(load_model(self.folder.dense)[0])
        self.model.eval()
        before, before_times = self._figures(dense, results["dense_top1"], results["dense_macs"])
        after, after_times = self._figures(self.model, results["compressed_top1"], results["final_macs"])
        for layer in results["layers"]:
            layer["seconds_before"] = _seconds_of(layer["name"], before_times)
            layer["seconds_after"] = _seconds_of(layer["name"], after_times)
        if self.config.export:
            self.log.line("exporting")
            # A program remembers its device; one on the CPU opens everywhere.
            export.save_program(self.model.cpu(), self.feed.example(2).cpu(), self.folder.path / "compressed.pt2")
        shared = {field: results[field] for field in Summary.__dataclass_fields__ if field in results}
        summary = Summary(
            name=self.config.name,
            device=self.device_name,
            target=self.config.compress.target if self.config.compress else 0.0,
            budget=self.config.compress.budget if self.config.compress else "macs",
            before=before,
            after=after,
            **shared,
        )
        self.folder.write("summary.json", summary.to_json())
        return summary

    def _figures(self, model: nn.Module, top1: float, macs: int) -> tuple[Figures, dict[str, float]]:
        settings = self.config.measure
        latency = {
            str(batch): measure.latency(model, self.feed.example(batch), repeats=settings.repeats)
            for batch in settings.batch_sizes
        }
        figures = Figures(top1, measure.parameters(model), macs, measure.size_on_disk(model), latency)
        return figures, measure.layer_times(model, self.feed.example(max(settings.batch_sizes)))


def _seconds_of(layer: str, times: dict[str, float]) -> float:
    """Of a layer, or of the parts that it was replaced by."""
    return sum(seconds for name, seconds in times.items() if name == layer or name.startswith(f"{layer}."))


def _curve(curve: _C.RateCurve) -> dict[str, Any]:
    return {name: getattr(curve, name) for name in ("name", "rate", "loss", "a", "b", "allocated")}
