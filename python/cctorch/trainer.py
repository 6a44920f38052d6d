"""A run's network, where it stands, and the training that several of its stages do."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import torch
from torch import Tensor, nn

from cctorch import _C, data, datasets, distributed, models
from cctorch.config import Config, ConfigError, Finetune, Training, expand
from cctorch.device import set_up
from cctorch.interruption import Interruption
from cctorch.log import Log, duration
from cctorch.network import Network
from cctorch.prepare import prepare
from cctorch.regularize_stage import RegularizeStage
from cctorch.state import Checkpoints, Saved, State
from cctorch.step import Criterion, GraphedStep, Step, make_step
from cctorch.store import Architecture, Events, Folder, Steps, build, load_model
from cctorch.train import Partial, learning_rate, make_criterion, seeded, train_epoch


class Trainer:
    """As the newest checkpoint in `folder` has it; else from the start, and so with `fresh`.

    `log`, `events` and `steps` are to be set before it trains, and `regularizing` where the training has events.
    """

    log: Log
    events: Events
    steps: Steps

    def __init__(self, config: Config, folder: Folder, interruption: Interruption, fresh: bool) -> None:
        self.config, self.folder, self.interruption = config, folder, interruption
        self.vote = distributed.Vote()
        self.device = set_up(config)
        self.regularizing: RegularizeStage | None = None
        self.data = _load(config, self.device)
        self.feed = data.Feed(self.data, config.train.channels_last)
        self.architecture = Architecture(
            config.model.name, self.data.classes, self.data.shape, self.data.mean, self.data.std
        )
        self.checkpoints = Checkpoints(folder.checkpoints)
        saved, self.warnings = (None, []) if fresh else self.checkpoints.newest()
        self.resuming = saved is not None
        self.state = saved.state if saved else State()
        torch.manual_seed(config.seed)
        self.network = self._network(saved)

    @property
    def settings(self) -> Training:
        return _training(self.config, self.state.stage) or self.config.train

    def _network(self, saved: Saved | None) -> Network:
        """As `saved`, or with the configuration's weights, or fresh ones."""
        model = self.blank()
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

    def blank(self) -> nn.Module:
        model = build(self.architecture, self.state.plan)
        if self.state.stage == "quantize" and self.state.plan:
            prepare(model, _C.CompressionPlan.from_json(self.state.plan))
        return model

    def dense(self) -> nn.Module:
        return self.network.place(distributed.on_main(lambda: load_model(self.folder.dense)[0]))

    def save(self, stage: str, epoch: int, partial: Partial | None = None) -> None:
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

    def train(self) -> None:
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
            made = batches.epoch(seed, number, settings.augment, written, erasing=settings.erasing)
            result = train_epoch(
                self.network.parallel,
                seeded(made, seed, number, written),
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
            self.save(stage, epoch, partial)
            raise self.interruption.interrupted()
        with self._as_if_compressed():
            accuracy = self.network.accuracy(self.data.validation) if len(self.data.validation) else None
        recent = self.regularizing.since(self.state.events_before) if self.regularizing else {}
        self.events.add("epoch", stage, epoch=epoch + 1, accuracy=accuracy, **asdict(result), **recent)
        shown = "" if accuracy is None else f"  validation top-1 {accuracy:.2f} %"
        pace = f"{duration(result.seconds)}, {result.images_per_second:.0f} images/s"
        self.log.line(f"{label}  loss {result.loss:.4f}{shown}  {pace}")
        self.save(stage, epoch + 1)

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
        return make_criterion(settings, (distillation, self.dense()))

    def _epochs_before(self, stage: str) -> int:
        names = self.config.stages
        before = [_training(self.config, name) for name in names[: names.index(stage)]]
        return sum(settings.epochs for settings in before if settings)

    def _as_if_compressed(self) -> contextlib.AbstractContextManager[object]:
        return self.regularizing.events.as_if_at_event() if self.regularizing else contextlib.nullcontext()


def _load(config: Config, device: torch.device) -> data.Dataset:
    """Rank 0 goes first: it downloads, and decodes into the cache, what is not there."""
    loaded: list[data.Dataset] = []

    def load() -> None:
        loaded.append(datasets.load(config.data, config.seed, device))

    distributed.on_main(load)
    if not loaded:
        load()
    return loaded[0]


def _training(config: Config, stage: str) -> Training | None:
    """Of a stage that trains."""
    section = getattr(config, stage, None)
    return section if isinstance(section, Training) else None
