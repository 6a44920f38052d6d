"""The schema of an experiment: one YAML file says everything about one run.

config = load_config("configs/demo.yaml", ["compress.target=0.6"])
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cctorch.config_errors import explain
from cctorch.config_regularize import SVD, ChannelPruning, Frequency, Q, Section, Tucker2


class ConfigError(ValueError):
    """A configuration that can't be run: the message names the key, its value and what was expected."""


def expand(path: str) -> Path:
    """`path` with ~ and ${VARIABLE} replaced. Raises ValueError for a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"expected the environment variable {name} to be set; set it, or write the path itself")
        return os.environ[name]

    return Path(re.sub(r"\$\{(\w+)\}|\$(\w+)", value, path)).expanduser()


class Data(Section):
    kind: Literal["fashion_mnist", "cifar10", "image_folder"]
    # Absent: the environment variable CCTORCH_DATA, then where the data set is usually found.
    root: str | None = None
    # Held out of the training images: a fraction below 1, or a number of images.
    validation: int | float = 0.1
    # Of an image_folder, pixels: images of any size are scaled until their shorter side is 8/7 of it (256 for 224), and
    # the middle square is taken. Absent: images of one size, as they are.
    size: int | None = Field(default=None, ge=8)
    limit_train: int | None = Field(default=None, ge=1)
    limit_test: int | None = Field(default=None, ge=1)

    @field_validator("root")
    @classmethod
    def _exists(cls, root: str | None) -> str | None:
        if root is not None and not expand(root).exists():
            raise ValueError(f"expected an existing file or folder ({expand(root)} is none)")
        return root

    @model_validator(mode="after")
    def _size_of_a_folder(self) -> Data:
        if self.size is not None and self.kind != "image_folder":
            raise ValueError(f"size = {self.size} with kind = {self.kind}: expected kind: image_folder, or no size")
        return self

    @field_validator("validation")
    @classmethod
    def _fraction_or_count(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("expected a fraction in [0, 1) or a number of images")
        return value


class Model(Section):
    # Those of cctorch.models.create.
    name: Literal[
        "resnet8",
        "resnet20",
        "resnet32",
        "resnet56",
        "resnet110",
        "vgg16",
        "densenet40",
        "googlenet",
        "resnet50",
        "mobilenet_v2",
    ]
    weights: str | None = None

    @field_validator("weights")
    @classmethod
    def _exists(cls, weights: str | None) -> str | None:
        if weights is not None and not expand(weights).is_file():
            raise ValueError(f"expected a checkpoint file ({expand(weights)} is none)")
        return weights


class Training(Section):
    epochs: int = Field(ge=0)
    # Under torchrun, of all ranks together: each gets its share of every batch.
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["one_cycle", "cosine", "step"] = "one_cycle"
    # Fraction of all steps during which the learning rate rises.
    warmup: float = Field(default=0.3, ge=0, lt=1)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # Random crops and flips.
    augment: bool = True
    # Probability that a box of a training image, of 2 to 33 % of its area, becomes the mean color (random erasing).
    erasing: float = Field(default=0.0, ge=0, le=1)
    channels_last: bool = True
    # Autocast to bfloat16 on CUDA.
    bf16: bool = False
    # On CUDA, with one rank: record the step once and replay it, which saves the launches of its kernels.
    cuda_graphs: bool = False


class Distillation(Section):
    """Outputs of the dense model as a second target."""

    temperature: float = Field(default=4.0, gt=0)
    # Of its term in the loss; the labels' term has the rest.
    weight: float = Field(default=0.5, gt=0, le=1)


class Finetune(Training):
    distillation: Distillation | None = None


class Compress(Section):
    # Reduction of the model's budget: 0.4 of the latency leaves 0.6 of the dense time.
    target: float = Field(default=0.5, gt=0, lt=1)
    units: Literal["both", "channels", "singular_values"] = "both"
    # Of factored convolutions: k x k then 1 x 1, or 1 x k then k x 1.
    layout: Literal["channel", "spatial"] = "channel"
    basis: Literal["fixed", "exact"] = "fixed"
    gamma: float = Field(default=0.9, ge=0)
    step_fraction: float = Field(default=0.01, gt=0, le=1)
    max_rate: float = Field(default=0.95, gt=0, lt=1)
    # latency: measured on the run's device at this batch.
    budget: Literal["macs", "parameters", "bytes", "latency"] = "macs"
    # Of all but latency: what the final network has lost, dead filters with it, or what the layers' removed inputs
    # and singular values save, as in the paper.
    count: Literal["final", "nominal"] = "final"
    # Of kept channels and ranks. Absent: 8 on CUDA, 1 elsewhere.
    multiple: int | None = Field(default=None, ge=1)
    latency_batch: int = Field(default=1, ge=1)
    # With a budget of latency, whole residual branches may be removed.
    residual_branches: bool = True
    # Patterns of names of layers that are left alone, such as layer1.*.
    exclude: list[str] = Field(default=[])
    # The largest share that layers give up, by patterns of their names: {layer3.*: 0.4}.
    bounds: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={})
    # Absent: the whole training set.
    gradient_images: int | None = Field(default=None, ge=1)
    # 0: keep the running statistics of the dense model.
    bn_reestimate_images: int = Field(default=4000, ge=0)
    # Fit the weights of the compressed model to the outputs of the dense one before fine-tuning, on so many images.
    repair: bool = True
    repair_images: int = Field(default=4000, ge=1)


class Regularize(Training):
    """Training with regularization events: once in a period of mini-batches, w <- Q(w)."""

    # One after the other at each event.
    q: list[Q] = Field(min_length=1)
    frequency: Frequency
    # Patterns of names, such as layer3.*.weight. Absent: weights of convolutions and linear layers, without the first
    # convolution and the last linear layer.
    parameters: list[str] | None = None
    clear_momentum: bool = False
    # After the last event: layers as small as Q has left their weights. Only where there is no `compress`.
    apply: bool = True
    # Then fit their weights to the outputs of the dense model, as after `compress`, on so many images.
    repair: bool = False
    repair_images: int = Field(default=4000, ge=1)

    @property
    def survives_training(self) -> bool:
        """Whether what Q leaves are smaller layers, which no training makes larger."""
        narrow = all(isinstance(q, ChannelPruning) and q.axis == 1 for q in self.q)
        return self.apply and (narrow or isinstance(self.q[-1], SVD | Tucker2))

    @model_validator(mode="after")
    def _momentum_stays(self) -> Regularize:
        if self.cuda_graphs and self.clear_momentum:
            raise ValueError("cuda_graphs with clear_momentum: expected one of them, since a graph keeps the momentum")
        return self


class Quantize(Finetune):
    """Training with fake-quantized weights, a learned scale for each output channel (LSQ)."""

    # 2 to 16, of all convolutions and linear layers, but at least 8 of the first convolution and the last linear layer;
    # or by patterns of names, of which the fewest bits hold: {layer1.*: 4, linear: 8}.
    bits: int | dict[str, int]
    # What the scales start from: LSQ's multiple of the mean magnitude, the range, or the smallest squared error.
    init: Literal["lsq", "minmax", "mse"] = "mse"

    @field_validator("bits")
    @classmethod
    def _of_a_grid(cls, bits: int | dict[str, int]) -> int | dict[str, int]:
        counts = bits.values() if isinstance(bits, dict) else [bits]
        if not counts or not all(2 <= count <= 16 for count in counts):
            raise ValueError("expected 2 to 16, or a section of 2 to 16 by patterns of names")
        return bits


class Measure(Section):
    batch_sizes: list[int] = Field(default=[1, 128])
    repeats: int = Field(default=20, ge=1)

    @field_validator("batch_sizes")
    @classmethod
    def _positive(cls, sizes: list[int]) -> list[int]:
        if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
            raise ValueError("expected different batch sizes of at least 1")
        return sizes


class Checkpoint(Section):
    """The file of the compressed model. hdf5 needs `pip install cctorch[hdf5]`."""

    format: Literal["safetensors", "hdf5"] = "safetensors"
    # Of hdf5. zstd loses nothing; sz3 and zfp keep weights to within the error bound.
    codec: Literal["zstd", "sz3", "zfp"] = "zstd"
    # The largest error of a weight, in units of its tensor's root mean square.
    error_bound: float = Field(default=0.01, gt=0)

    @field_validator("format")
    @classmethod
    def _installed(cls, name: str) -> str:
        if name == "hdf5" and not all(importlib.util.find_spec(module) for module in ("h5py", "hdf5plugin")):
            raise ValueError("expected h5py and hdf5plugin to be installed: pip install cctorch[hdf5]")
        return name

    @model_validator(mode="after")
    def _codec_of_hdf5(self) -> Checkpoint:
        if self.codec != "zstd" and self.format != "hdf5":
            raise ValueError(f"codec = {self.codec} with format = {self.format}: expected format: hdf5, or no codec")
        return self

    @property
    def lossy(self) -> bool:
        return self.format == "hdf5" and self.codec != "zstd"


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Of each rank. Absent: torch's choice, or OMP_NUM_THREADS, which torchrun sets to 1.
    threads: int | None = Field(default=None, ge=1)
    # On CUDA: time cuDNN's algorithms for each shape and take the fastest. A run no longer repeats to the bit.
    cudnn_benchmark: bool = False
    # Under torchrun, train on the statistics of the whole batch, which makes the result independent of the number of
    # ranks up to rounding. false: each rank on those of its share, with less communication and another result.
    synchronize_batch_norm: bool = True
    # Under torchrun, each rank keeps a shard of parameters, gradients and momentum (FSDP2) instead of all of them.
    sharded: bool = False
    output: str = "runs"
    data: Data
    model: Model
    train: Training
    # null: no Collaborative Compression.
    compress: Compress | None = Compress()
    # After what makes the network smaller: compress, or without it regularize.
    finetune: Finetune | None = None
    # After compress and finetune, or with compress: null after the training.
    regularize: Regularize | None = None
    # The last of the trainings. Like finetune it follows a regularize that ends in smaller layers, and no other.
    quantize: Quantize | None = None
    measure: Measure = Measure()
    checkpoint: Checkpoint = Checkpoint()
    # Made of the file of the compressed model: compressed.pt2, a torch.export program, and compressed.onnx, which needs
    # `pip install cctorch[onnx]`. They may change before and after the end of a run: what is missing is written.
    export: bool = True
    onnx: bool = False

    @model_validator(mode="after")
    def _stages(self) -> Config:
        if self.compress is not None and self.finetune is None:
            raise ValueError("finetune is missing: expected a section of training settings, or compress: null")
        if self.compress is None and self.regularize is None and self.finetune is not None:
            raise ValueError(
                "finetune without compress and regularize: expected finetune: null, or a section for one of them"
            )
        if self.compress is None and self.regularize is None and self.quantize is None:
            raise ValueError("compress, regularize and quantize are null: expected a section for at least one of them")
        events = self.regularize
        after = self.stages[self.stages.index("regularize") + 1] if events else "measure"
        if events and events.repair and (self.compress is not None or not events.survives_training):
            raise ValueError(
                "regularize.repair: expected where events end in smaller layers: compress: null, apply: true, and the "
                "last q svd or tucker2, or all of them channel_pruning with axis: 1"
            )
        if events and after != "measure" and (self.compress is not None or not events.survives_training):
            raise ValueError(
                f"regularize with {after}: expected one of them, since training that follows events undoes them, "
                "unless they end in smaller layers: compress: null, apply: true, and the last q svd or tucker2, or "
                "all of them channel_pruning with axis: 1"
            )
        return self

    @property
    def stages(self) -> list[str]:
        """In their order, from "train" to "measure"."""
        return stages({name for name, section in self if section is not None})

    @model_validator(mode="after")
    def _something_to_compress(self) -> Config:
        if self.train.epochs == 0 and self.model.weights is None:
            raise ValueError("train.epochs = 0 with model.weights = null: expected weights to load or epochs to train")
        return self

    @property
    def folder(self) -> Path:
        return expand(self.output) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def stages(sections: Collection[str]) -> list[str]:
    """Those of a run whose configuration has `sections`, in their order."""
    smaller = ["compress", "finetune", "regularize"] if "compress" in sections else ["regularize", "finetune"]
    return ["train", *(name for name in (*smaller, "quantize") if name in sections), "measure"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-4 is a number) and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise ConfigError(f"the key {key!r} occurs twice (line {key_node.start_mark.line + 1}); remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The experiment in `path`, with overrides such as "compress.target=0.6" (values are YAML scalars or lists).

    Raises ConfigError naming each offending key, its value and what was expected.
    """
    file = Path(path)
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {file} can't be read: {error}") from error
    tree = _parse(text, str(file))
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """The configuration that a tree of plain values describes. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(explain(dict(problem), Config) for problem in error.errors())
        raise ConfigError("\n".join(lines)) from None


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"the override {override!r} has no value: expected key=value, e.g. compress.target=0.6")
    node: Any = tree
    path = key.split(".")
    for depth, name in enumerate(path):
        if isinstance(node, list):
            here = ".".join(path[:depth])
            if not node:
                raise ConfigError(f"{key} = {value}: {here} is an empty list: give all of it, {here}=[...]")
            if not (name.isdecimal() and int(name) < len(node)):
                raise ConfigError(f"{key} = {value}: {here} is a list of {len(node)}: expected 0 to {len(node) - 1}")
            place: Any = int(name)
        elif isinstance(node, dict):
            place = name
        else:
            raise ConfigError(f"{key} = {value}: {'.'.join(path[:depth])} is a value, not a section")
        if depth + 1 == len(path):
            node[place] = _parse(value, override)
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})
