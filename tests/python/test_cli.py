from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cctorch import cli, trainer
from tiny_run import tree, write_dataset


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    content = tree(write_dataset(tmp_path / "data"), tmp_path / "runs")
    for part in ("train", "finetune"):
        content[part]["epochs"] = 1
    file.write_text(yaml.safe_dump(content))
    return file


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for example in (
        "cctorch run configs/demo.yaml",
        "compress.target=0.7",
        "--fresh",
        "cctorch report runs/demo",
        "cctorch sweep",
    ):
        assert example in text
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for word in ("plan.json", "report.html", "CCTORCH_DATA", "key=value", "goes on from its last checkpoint"):
        assert word in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["run"],
        ["run", "x.yaml", "--quick"],
        ["run", "x.yaml", "--fre"],
        ["report", "a", "b"],
        ["sweep", "a"],
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: cctorch" in capsys.readouterr().err


def test_what_is_missing_is_named_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


def test_runs_reports_and_starts_over(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(file), "name=mine", "compress.target=0.3"]) == 0
    page = tmp_path / "runs" / "mine" / "report.html"
    assert page.exists()
    page.unlink()
    capsys.readouterr()
    assert cli.main(["report", str(page.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.exists()
    assert cli.main(["sweep", str(page.parent), "0.2"]) == 0
    assert "top-1 on the validation images" in capsys.readouterr().out
    assert "Trade-off" in page.read_text()
    assert cli.main(["sweep", str(page.parent), "1.2"]) == 2
    assert "target = 1.2, expected above 0 and below 1" in capsys.readouterr().err
    assert cli.main(["run", str(file), "--fresh", "name=mine", "compress.target=0.2"]) == 0
    assert yaml.safe_load((page.parent / "config.yaml").read_text())["compress"]["target"] == 0.2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compress.tagret=0.5", "compress.tagret = 0.5: unknown key; did you mean target?"),
        ("compress.target=2", "compress.target = 2: expected a value less than 1"),
        ("compress.exclude=[layer9]", "compress: exclude = 'layer9' names no layer of the model"),
        ("data.validation=5000", "data.validation = 5000: expected less than the 96 training images"),
    ],
)
def test_refusals_are_one_line_and_no_traceback(
    file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["run", str(file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cctorch: {message}")
    assert len(error.splitlines()) == 1


def test_ctrl_c_tells_how_to_go_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", interrupt)
        assert cli.main(["run", str(file), "--fresh", "name=again"]) == 130
    assert f"cctorch run {file} name=again" in capsys.readouterr().err
    assert cli.main(["run", str(file), "name=again"]) == 0


def test_a_full_disk_is_one_line_whoever_met_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "train_epoch", full)
    assert cli.main(["run", str(file)]) == 1
    assert capsys.readouterr().err == ("cctorch: the disk is full: free some space, then give the same command again\n")


def test_a_folder_without_a_run_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "holds no finished run" in capsys.readouterr().err


def test_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "cctorch", "--help"], capture_output=True, text=True, check=True)
    assert "cctorch run configs/demo.yaml" in done.stdout
