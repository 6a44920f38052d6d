"""Drives CMake, which builds everything; see CMakeLists.txt for the list of sources."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        import torch

        if not torch.__version__.startswith("2.11."):
            raise SystemExit(
                f"cctorch is built against torch 2.11, but torch {torch.__version__} is installed: "
                "pip install torch==2.11.0"
            )
        # setuptools would copy the extension alone into the source tree; the library and the headers go with it.
        in_source = self.inplace or self.editable_mode
        package = ROOT / "python" / "cctorch" if in_source else Path(self.build_lib).resolve() / "cctorch"
        build = Path(os.environ.get("CCTORCH_BUILD_DIR", ROOT / "build"))
        options = [
            f"-DLIBTORCH_ROOT={Path(torch.__file__).parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCCTORCH_CUDA={os.environ.get('CCTORCH_CUDA', 'AUTO')}",
            *os.environ.get("CCTORCH_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(package)], check=True)


setup(ext_modules=[CMakeExtension("cctorch._C")], cmdclass={"build_ext": CMakeBuild})
