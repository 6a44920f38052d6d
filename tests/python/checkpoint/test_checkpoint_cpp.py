"""The C++ reader, where pkg-config knows an HDF5 library (Debian: libhdf5-dev)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import hdf5plugin
import pytest
import torch
from cctorch import checkpoint

SOURCE = Path(__file__).parents[3] / "examples" / "cpp" / "read_checkpoint.cpp"


def _flags() -> list[str] | None:
    if shutil.which("pkg-config") is None or shutil.which("g++") is None:
        return None
    for name in ("hdf5", "hdf5-serial"):
        command = ["pkg-config", "--cflags", "--libs", name]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.split()
    return None


def test_cpp_reads_what_python_does(tmp_path: Path) -> None:
    flags = _flags()
    if flags is None:
        pytest.skip("pkg-config knows no HDF5")
    program = tmp_path / "read_checkpoint"
    build = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", str(SOURCE), *flags, "-o", str(program)]
    subprocess.run(build, check=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(1200, 1000, generator=generator),
        "pruned/a": torch.randn(300, 200, generator=generator).relu(),
        "lossless": torch.randn(5000, generator=generator),
        "counts": torch.arange(3000).reshape(30, 100),
        "bias": torch.randn(5, generator=generator),
        "bfloat16": torch.randn(50, 40, generator=generator).bfloat16(),
        "bool": torch.rand(3000, generator=generator) > 0.5,
    }
    checkpoint.save(tmp_path / "file.h5", tensors, error_bound=0.05)
    names = [name.replace("/", "%2F") for name in tensors]
    environment = {**os.environ, "HDF5_PLUGIN_PATH": hdf5plugin.PLUGINS_PATH}
    command = [str(program), str(tmp_path / "file.h5"), *names]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    loaded = checkpoint.load(tmp_path / "file.h5").tensors
    for line, (name, tensor) in zip(said, loaded.items(), strict=True):
        match = re.fullmatch(r"(\S+)((?: \d+)+): sum (\S+), squares (\S+), zeros (\d+)", line)
        assert match is not None, line
        assert match[1] == name.replace("/", "%2F")
        assert tuple(map(int, match[2].split())) == tensor.shape
        assert float(match[3]) == pytest.approx(float(tensor.double().sum()), rel=1e-9)
        assert float(match[4]) == pytest.approx(float(tensor.double().square().sum()), rel=1e-9)
        assert int(match[5]) == int((tensor == 0).sum())

    checkpoint.save(tmp_path / "float8.h5", {"w": tensors["bias"].to(torch.float8_e4m3fn)})
    command = [str(program), str(tmp_path / "float8.h5"), "w"]
    refused = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert refused.returncode == 1
    assert "w is float8_e4m3fn, which this program does not decode" in refused.stderr
