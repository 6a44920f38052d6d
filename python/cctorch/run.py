"""The whole flow for one configuration: train, compress, fine-tune, measure, export, report.

    summary = run(load_config("configs/demo.yaml"))

Everything lands in runs/<name>/. A run that was interrupted goes on from its last epoch when it is run again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cctorch import _C, batch_norm, collaborative, data, export, measure, models, report
from cctorch.apply import apply
from cctorch.config import Config, ConfigError, Training, expand
from cctorch.log import Log, duration
from cctorch.repair import repair
from cctorch.store import Architecture, Events, Folder, State, build, load_model
from cctorch.train import make_optimizer, momentum_by_name, restore_momentum, train_epoch


@dataclass(frozen=True)
class Figures:
    """One model, measured. `latency` is in seconds, by batch size; `macs` per image."""

    top1: float
    parameters: int
    macs: int
    bytes: int
    latency: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """What a run found; summary.json."""

    name: str
    device: str
    target: float
    before: Figures
    after: Figures
    nominal_macs: int
    top1_compressed: float
    top1_reestimated: float | None
    gradient_seconds: float
    curve_seconds: float
    heuristic_seconds: float
    layers: list[dict[str, Any]]
    warnings: list[str]
    top1_repaired: float | None = None
    repair_seconds: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Summary:
        tree = json.loads(text)
        return Summary(**{**tree, "before": Figures(**tree["before"]), "after": Figures(**tree["after"])})


def run(config: Config, *, fresh: bool = False, console: Console | None = None) -> Summary:
    """Runs, resumes, or (if it is finished) reads the run of `config`. `fresh` starts over.

    Raises ConfigError, data.DataError and models.CheckpointError before any training, TrainingError where the loss is
    not finite, ValueError where the target is missed by more than 1 % of the model's MACs.
    """
    folder = Folder(config.folder)
    if fresh:
        folder.clear()
    folder.begin(config)
    with Log(folder.path / "run.log", console) as log, warnings.catch_warnings():
        warnings.showwarning = log.show_warning
        finished = folder.path / "summary.json"
        if finished.exists():
            summary = Summary.from_json(finished.read_text())
            log.line(f"{folder.path} is finished; --fresh starts it over")
            if not (folder.path / "report.html").exists():
                report.write(folder.path)
        else:
            summary = _Run(config, folder, log).execute()
            report.write(folder.path)
        show(summary, log)
        log.line(f"report: {folder.path / 'report.html'}")
        return summary


def show(summary: Summary, log: Log) -> None:
    """The one table."""
    before, after = summary.before, summary.after
    table = Table(title=f"{summary.name}, on {summary.device}", title_justify="left")
    for heading in ("", "before", "after", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("top-1", f"{before.top1:.2f} %", f"{after.top1:.2f} %", f"{after.top1 - before.top1:+.2f}")
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("parameters", before.parameters, after.parameters, lambda value: f"{value / 1e6:.3f} M"),
        ("MACs", before.macs, after.macs, lambda value: f"{value / 1e6:.2f} M"),
        ("size on disk", before.bytes, after.bytes, lambda value: f"{value / 1e6:.3f} MB"),
    ]
    for batch in before.latency:
        label = f"latency, batch {batch}"
        rows.append((label, before.latency[batch], after.latency[batch], lambda value: f"{value * 1e3:.2f} ms"))
    for label, old, new, text in rows:
        table.add_row(label, text(old), text(new), f"{new / old:.3f}")
    log.table(table)
    restored = (
        f", {summary.top1_reestimated:.2f} % with BatchNorm re-estimated"
        if summary.top1_reestimated is not None
        else ""
    )
    if summary.top1_repaired is not None:
        restored += f", {summary.top1_repaired:.2f} % repaired in {summary.repair_seconds:.1f} s"
    log.line(f"right after compression: {summary.top1_compressed:.2f} %{restored}")
    log.line(
        f"reduction of MACs: {1 - summary.nominal_macs / before.macs:.1%} nominal, "
        f"{1 - after.macs / before.macs:.1%} final (dead filters removed); target {summary.target:.1%}"
    )
    log.line(
        f"search: gradients {summary.gradient_seconds:.1f} s, rate curves {summary.curve_seconds:.1f} s, "
        f"heuristic {summary.heuristic_seconds:.1f} s"
    )


def select_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch sees no CUDA device; expected auto or cpu on this machine")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


class _Run:
    def __init__(self, config: Config, folder: Folder, log: Log) -> None:
        self.config, self.folder, self.log = config, folder, log
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.device = select_device(config)
        self.data = data.load(config.data, config.seed, self.device)
        self.architecture = Architecture(
            config.model.name, self.data.classes, self.data.shape, self.data.mean, self.data.std
        )
        state, damaged = folder.load_state()
        for warning in damaged:
            log.warning(warning)
        self.state = state or State()
        self.model = self._model()
        self.optimizer = self._optimizer(self.state.momentum)
        self.events = Events(folder, self.state.events)
        log.line(
            f"data: {self.data.source}, {len(self.data.train)} training, {len(self.data.validation)} validation, "
            f"{len(self.data.test)} test images; device: {self.device_name}"
        )
        if state:
            log.line(f"resuming at stage {state.stage}, after epoch {state.epoch}")

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    @property
    def settings(self) -> Training:
        return self.config.train if self.state.stage == "train" else self.config.finetune

    def execute(self) -> Summary:
        try:
            if self.state.stage == "train":
                self._train()
                self._finish_dense()
            if self.state.stage == "compress":
                self._compress()
            if self.state.stage == "finetune":
                self._train()
                self._finish_compressed()
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

    def _place(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        return model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload,no-any-return]

    def _optimizer(self, momentum: dict[str, Tensor]) -> torch.optim.SGD:
        optimizer = make_optimizer(self.model, self.settings)
        restore_momentum(self.model, optimizer, momentum)
        return optimizer

    def _batches(self, images: data.ImageSet, batch_size: int) -> data.Batches:
        return data.Batches(images, batch_size, self.data.mean, self.data.std, self.config.train.channels_last)

    def _accuracy(self, images: data.ImageSet) -> float:
        return measure.accuracy(self.model, self._batches(images, 500))

    def _save(self, stage: str, epoch: int) -> None:
        self.state.stage, self.state.epoch = stage, epoch
        self.state.model, self.state.events = self.model.state_dict(), self.events.all
        self.state.momentum = momentum_by_name(self.model, self.optimizer)
        self.folder.save_state(self.state)

    def _train(self) -> None:
        stage, settings = self.state.stage, self.settings
        batches = self._batches(self.data.train, settings.batch_size)
        offset = 0 if stage == "train" else self.config.train.epochs
        for epoch in range(self.state.epoch, settings.epochs):
            label = f"{stage} {epoch + 1}/{settings.epochs}"
            with self.log.task(label, len(batches)) as task:
                result = train_epoch(
                    self.model,
                    batches.epoch(self.config.seed, offset + epoch, settings.augment),
                    self.optimizer,
                    settings,
                    epoch=epoch,
                    steps=len(batches),
                    images=len(self.data.train),
                    progress=lambda step, loss, task=task: task.update(step, f"loss {loss:.4f}"),  # type: ignore[misc]
                )
            accuracy = self._accuracy(self.data.validation) if len(self.data.validation) else None
            self.events.add("epoch", stage, epoch=epoch + 1, accuracy=accuracy, **asdict(result))
            shown = "" if accuracy is None else f"  validation top-1 {accuracy:.2f} %"
            self.log.line(
                f"{label}  loss {result.loss:.4f}{shown}  {duration(result.seconds)}, "
                f"{result.images_per_second:.0f} images/s"
            )
            self._save(stage, epoch + 1)

    def _finish_dense(self) -> None:
        top1 = self._accuracy(self.data.test)
        self.events.add("dense", "train", accuracy=top1)
        self.log.line(f"dense model: test top-1 {top1:.2f} %")
        self.state.results["dense_top1"] = top1
        self.folder.save_model(self.folder.dense, self.model, None, self.architecture)
        self._save("compress", 0)

    def _compress(self) -> None:
        settings = self.config.compress
        images = self._batches(self.data.train, self.config.train.batch_size)
        if settings.gradient_images is not None:
            images = images.head(settings.gradient_images, self.config.seed)
        example = next(iter(images))[0][:2]
        with self.log.stages() as progress:
            found = collaborative.compress(
                self.model,
                images,
                example,
                target=settings.target,
                units=settings.units,
                basis=settings.basis,
                gamma=settings.gamma,
                step_fraction=settings.step_fraction,
                max_rate=settings.max_rate,
                progress=progress,
            )
        for warning in found.warnings:
            self.log.warning(warning)
        self.folder.write("plan.json", found.plan.to_json())
        self.folder.write("curves.json", json.dumps([_curve(curve) for curve in found.curves]))
        self.log.line(
            f"search: gradients {found.gradient_seconds:.1f} s, rate curves {found.curve_seconds:.1f} s, heuristic "
            f"{found.heuristic_seconds:.1f} s; MACs {found.dense_macs / 1e6:.2f} M -> {found.final_macs / 1e6:.2f} M"
        )
        self.state.plan = found.plan.to_json()
        self.state.results |= _search_results(found)
        self.model = self._place(apply(self.model, found.plan, self.optimizer))
        momentum = momentum_by_name(self.model, self.optimizer)
        self.state.stage = "finetune"
        self.optimizer = self._optimizer(momentum)
        self._reestimate()
        self._repair(found.plan)
        self._save("finetune", 0)

    def _reestimate(self) -> None:
        top1 = self._accuracy(self.data.test)
        self.events.add("compressed", "compress", accuracy=top1)
        self.log.line(f"right after compression: test top-1 {top1:.2f} %")
        self.state.results |= {"top1_compressed": top1, "top1_reestimated": None}
        count = self.config.compress.bn_reestimate_images
        if count:
            batches = self._batches(self.data.train, self.config.train.batch_size).head(count, self.config.seed)
            batch_norm.reestimate(self.model, batches)
            top1 = self._accuracy(self.data.test)
            self.events.add("reestimated", "compress", accuracy=top1)
            self.log.line(f"BatchNorm statistics re-estimated: test top-1 {top1:.2f} %")
            self.state.results["top1_reestimated"] = top1

    def _repair(self, plan: _C.CompressionPlan) -> None:
        self.state.results |= {"top1_repaired": None, "repair_seconds": None}
        settings = self.config.compress
        if not settings.repair:
            return
        dense = self._place(load_model(self.folder.dense)[0])
        batches = self._batches(self.data.train, self.config.train.batch_size).head(
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
        self.state.results["compressed_top1"] = top1
        self.folder.save_model(self.folder.compressed, self.model, self.state.plan, self.architecture)
        self._save("measure", 0)

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
            export.save_program(self.model.cpu(), self._example(2).cpu(), self.folder.path / "compressed.pt2")
        shared = {field: results[field] for field in Summary.__dataclass_fields__ if field in results}
        summary = Summary(
            name=self.config.name,
            device=self.device_name,
            target=self.config.compress.target,
            before=before,
            after=after,
            **shared,
        )
        self.folder.write("summary.json", summary.to_json())
        return summary

    def _figures(self, model: nn.Module, top1: float, macs: int) -> tuple[Figures, dict[str, float]]:
        settings = self.config.measure
        latency = {
            str(batch): measure.latency(model, self._example(batch), repeats=settings.repeats)
            for batch in settings.batch_sizes
        }
        figures = Figures(top1, measure.parameters(model), macs, measure.size_on_disk(model), latency)
        return figures, measure.layer_times(model, self._example(max(settings.batch_sizes)))

    def _example(self, batch: int) -> Tensor:
        images = self.data.test
        index = torch.arange(batch, device=images.labels.device) % len(images)
        return next(iter(self._batches(images.take(index), batch)))[0]


def _seconds_of(layer: str, times: dict[str, float]) -> float:
    """Of a layer, or of the parts that it was replaced by."""
    return sum(seconds for name, seconds in times.items() if name == layer or name.startswith(f"{layer}."))


def _curve(curve: _C.RateCurve) -> dict[str, Any]:
    return {name: getattr(curve, name) for name in ("name", "rate", "loss", "a", "b", "allocated")}


def _search_results(found: collaborative.Compression) -> dict[str, Any]:
    layers = []
    for spec in found.model_specs:
        plan = found.plan.find(spec.name)
        layers.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "in_channels": spec.in_channels,
                "out_channels": spec.out_channels,
                "kept_in": len(plan.kept_in) if plan else spec.in_channels,
                "kept_out": len(plan.kept_out) if plan else spec.out_channels,
                "rank": plan.rank if plan else None,
                "full_rank": min(
                    spec.out_channels, spec.in_channels // spec.groups * spec.kernel_height * spec.kernel_width
                ),
                "macs_before": spec.macs,
                "macs_after": _C.layer_macs(spec, plan, True),
            }
        )
    names = ("dense_macs", "nominal_macs", "final_macs", "gradient_seconds", "curve_seconds", "heuristic_seconds")
    return {name: getattr(found, name) for name in names} | {"layers": layers, "warnings": list(found.warnings)}
