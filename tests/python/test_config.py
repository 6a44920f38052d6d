from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cctorch.config import Config, ConfigError, load_config, parse_config
from tiny_run import tree, write_dataset

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree(write_dataset(tmp_path / "data"), tmp_path / "runs")))
    return file


REFUSED = [
    ("checkpoint.codec=sz3", "codec = sz3 with format = safetensors: expected format: hdf5, or no codec"),
    ("compress.target=1.0", "compress.target = 1.0: expected a value less than 1"),
    ("compress.target=0", "compress.target = 0: expected a value greater than 0"),
    ("compress.target=half", "compress.target = 'half': expected a number"),
    ("compress.target=.nan", "compress.target = nan: expected a finite number"),
    ("compress.tagret=0.5", "compress.tagret = 0.5: unknown key; did you mean target? expected one of target, units"),
    ("compres.target=0.5", "compres = {'target': 0.5}: unknown key; did you mean compress?"),
    ("compress.units=channel", "compress.units = 'channel': expected one of both, channels, singular_values"),
    ("train.epochs=-1", "train.epochs = -1: expected a value greater than or equal to 0"),
    ("train.epochs=1.5", "train.epochs = 1.5: expected a whole number"),
    ("train.epochs=true", "train.epochs = True: expected a whole number"),
    ("train.epochs=0", "train.epochs = 0 with model.weights = null: expected weights to load or epochs to train"),
    ("train.augment=1", "train.augment = 1: expected true or false"),
    ("train.erasing=1.5", "train.erasing = 1.5: expected a value less than or equal to 1"),
    ("train=3", "train = 3: expected a section with keys of its own"),
    ("finetune.clip_grad_norm=0", "finetune.clip_grad_norm = 0: expected a value greater than 0"),
    ("model.name=resnet51", "model.name = 'resnet51': expected one of resnet8, resnet20"),
    ("model.weights=nowhere.th", "model.weights = 'nowhere.th': expected a checkpoint file"),
    ("model.weights=${UNSET_FOLDER}/x.th", "expected the environment variable UNSET_FOLDER to be set"),
    ("data.root=/no/such/folder", "data.root = '/no/such/folder': expected an existing file or folder"),
    ("data.limit_train=0", "data.limit_train = 0: expected a value greater than or equal to 1"),
    ("data.validation=1.5", "data.validation = 1.5: expected a fraction in [0, 1) or a number of images"),
    ("data.validation=some", "data.validation = 'some': expected a whole number or a number"),
    ("measure.batch_sizes=[]", "measure.batch_sizes = []: expected different batch sizes of at least 1"),
    ("measure.batch_sizes=[a]", "measure.batch_sizes[0] = 'a': expected a whole number"),
    ("compress=null", "finetune without compress and regularize: expected finetune: null"),
    ("regularize={epochs: 1}", "regularize.q is missing: expected a list"),
    ("regularize={epochs: 1, q: [], frequency: {kind: constant, period: 5}}", "regularize.q = []: "),
    (
        "regularize={epochs: 1, q: [{kind: svd}], frequency: {kind: constant, period: 5}}",
        "regularize.q[0] = {'kind': 'svd'}: SVD: expected either a rank or a ratio, got neither",
    ),
    (
        "regularize={epochs: 1, q: [{kind: pruning}], frequency: {kind: constant, period: 5}}",
        "regularize.q[0].kind = 'pruning': expected one of weight_decay, uniform_noise, magnitude_pruning",
    ),
    (
        "regularize={epochs: 1, q: [{kind: magnitude_pruning, sparsity: 2}], frequency: {kind: constant, period: 5}}",
        "regularize.q[0] = {'kind': 'magnitude_pruning', 'sparsity': 2}: MagnitudePruning: sparsity = 2, expected",
    ),
    (
        "regularize={epochs: 1, q: [{kind: svd, ratio: 2, size: 1}], frequency: {kind: constant, period: 5}}",
        "regularize.q[0].size = 1: unknown key; expected one of kind, rank, ratio, view",
    ),
    (
        "regularize={epochs: 1, q: [{kind: svd, ratio: 2}], frequency: {kind: constant, period: 0}}",
        "regularize.frequency = {'kind': 'constant', 'period': 0}: ConstantPeriod: period = 0, expected at least 1",
    ),
    (
        "regularize={epochs: 1, q: [{kind: svd, ratio: 2}], frequency: {kind: stepwise, periods: [[5, 2]]}}",
        "StepwisePeriod: the first step is not 0, expected (step, period) pairs that begin at step 0",
    ),
    (
        "regularize={epochs: 1, q: [{kind: tiled_svd, tile: 8, rank: 4}], frequency: {kind: constant, period: 5}}",
        "TiledSVD: rank = 4 for tile = 8, expected at least 1 and below tile / 2",
    ),
    (
        "regularize={epochs: 1, q: [{kind: nm_pruning, n: 5}], frequency: {kind: constant, period: 5}}",
        "NMPruning: n = 5 and m = 4, expected 1 <= n <= m",
    ),
    ("compress.budget=seconds", "compress.budget = 'seconds': expected one of macs, parameters, bytes, latency"),
    ("compress.latency_batch=0", "compress.latency_batch = 0: expected a value greater than or equal to 1"),
    ("compress.bounds=0.3", "compress.bounds = 0.3: expected a section (each key a text, each value a number)"),
    ("compress.bounds={layer1.*: few}", "compress.bounds['layer1.*'] = 'few': expected a number"),
    ("compress.bounds={layer1.*: 2}", "compress.bounds['layer1.*'] = 2: expected a value less than or equal to 1"),
    ("finetune.distillation.weight=0", "finetune.distillation.weight = 0: expected a value greater than 0"),
    ("compress.exclude=layer1", "compress.exclude = 'layer1': expected a list (each entry a text)"),
    ("name=../elsewhere", "name = '../elsewhere': "),
    ("name", "the override 'name' has no value: expected key=value"),
    ("name.x=3", "name.x = 3: name is a value, not a section"),
    ("measure.batch_sizes.2=4", "measure.batch_sizes.2 = 4: measure.batch_sizes is a list of 2: expected 0 to 1"),
    ("measure.batch_sizes.few=4", "measure.batch_sizes.few = 4: measure.batch_sizes is a list of 2: expected 0 to 1"),
    ("compress={target: 0.5, target: 0.6}", "the key 'target' occurs twice"),
    ("seed=[1", "seed=[1 is not YAML"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_refuses(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, [override])


def test_names_every_problem_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["seed=x", "compress.gamma=-1"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_section_is_named(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    del content["finetune"]
    with pytest.raises(ConfigError, match="finetune is missing: expected a section"):
        parse_config(content)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "expected a mapping"), ("a: [", "is not YAML"), ("", "mapping")]
)
def test_refuses_what_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml can't be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml(file: Path) -> None:
    overrides = [
        "train.weight_decay=1e-3",
        "measure.batch_sizes=[2, 8]",
        "data.limit_train=null",
        "export=true",
        "seed=7",
    ]
    config = load_config(file, overrides)
    assert (config.train.weight_decay, config.measure.batch_sizes, config.export, config.seed) == (
        1e-3,
        [2, 8],
        True,
        7,
    )
    assert config.data.limit_train is None


def test_an_override_does_not_reach_into_an_empty_list(file: Path) -> None:
    text = "compress.exclude.0 = stem: compress.exclude is an empty list: give all of it, compress.exclude=[...]"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        load_config(file, ["compress.exclude=[]", "compress.exclude.0=stem"])


def test_overrides_reach_into_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCTORCH_WEIGHTS", str(tmp_path))
    (tmp_path / "resnet32-d509ac18.th").touch()
    config = load_config(CONFIGS / "regularize" / "tucker2.yaml", ["regularize.q.0.ratio=1.6"])
    assert config.regularize is not None
    assert config.regularize.q[0].model_dump()["ratio"] == 1.6


def test_the_resolved_configuration_reads_back(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["finetune.weight_decay=3e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    monkeypatch.setenv("CCTORCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("CCTORCH_IMAGENET", str(tmp_path))
    if weights := content["model"].get("weights"):
        (tmp_path / Path(weights).name).touch()
    config = load_config(path)
    assert isinstance(config, Config)
    assert config.name == path.stem
