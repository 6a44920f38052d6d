"""The compiled CUDA kernels, inspected without a GPU: registers, and nothing spilled to local memory."""

import re
import shutil
import subprocess
from pathlib import Path

import cctorch
import pytest
from cctorch import _C

LIBRARY = Path(cctorch.__file__).parent / "lib" / "libcctorch.so"
ARCHITECTURES = ("sm_80", "sm_90")
MOST_REGISTERS = 128  # 2 blocks of 256 threads on every multiprocessor


def cuobjdump() -> str | None:
    try:
        import triton.backends.nvidia as nvidia
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


pytestmark = [
    pytest.mark.skipif(not _C.CUDA_BUILT, reason="built without CUDA kernels"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump (it comes with triton and with the CUDA toolkit)"),
]


def dump(*options: str) -> str:
    return subprocess.run([str(cuobjdump()), *options, str(LIBRARY)], check=True, capture_output=True, text=True).stdout


def parse_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Resource usage of each (architecture, kernel)."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function ([^\s:]+):", line):
            kernel = match[1]
        elif "REG:" in line:
            usage[architecture, kernel] = {
                name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)
            }
    return usage


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    return parse_usage(dump("--dump-resource-usage"))


# The parts of a mangled kernel name by which an op's kernels are known.
KERNELS = {
    "fake_quant": ("elementwise_kernel.*9FakeQuant", "BackwardRows.*9FakeQuant", "BackwardColumns.*9FakeQuant"),
    "fake_quant_offset": (
        "elementwise_kernel.*FakeQuantOffset",
        "BackwardRows.*FakeQuantOffset",
        "BackwardColumns.*FakeQuantOffset",
    ),
    "pact": ("elementwise_kernel.*4Pact", "BackwardRows.*4Pact", "BackwardColumns.*4Pact"),
    "fp8_quant": (
        "elementwise_kernel.*FromRaw.*FloatQuant",
        "BackwardRows.*FromRaw.*FloatQuant",
        "BackwardColumns.*FromRaw.*FloatQuant",
    ),
    "power_of_two_quant": ("elementwise_kernel.*FloatQuant",),
    "channel_gate": ("elementwise_kernel.*ChannelGate", "BackwardRows.*ChannelGate", "BackwardColumns.*ChannelGate"),
    "fake_quant_weights": ("QuantizeRows",),
    "soft_threshold": (
        "elementwise_kernel.*SoftThreshold",
        "BackwardRows.*SoftThreshold",
        "BackwardColumns.*SoftThreshold",
    ),
    "all of these": ("SumPartials",),
    "magnitude_masks": ("Prepare", "CountDigits", "ChooseDigit", "KeepAboveIjbE", "KeepTiesIjbE"),
    "magnitude_prune": ("KeepAboveIjjE", "KeepTiesIjjE"),
    "nm_masks": ("MarkGroups",),
    "apply_mask": ("ApplyMask",),
}


def test_every_op_has_kernels_for_every_architecture(usage):
    for architecture in ARCHITECTURES:
        names = [kernel for arch, kernel in usage if arch == architecture]
        for op, patterns in KERNELS.items():
            for pattern in patterns:
                assert any(re.search(pattern, name) for name in names), f"no {pattern} of {op} for {architecture}"


def test_registers(usage):
    heavy = {key: use["REG"] for key, use in usage.items() if use["REG"] > MOST_REGISTERS}
    assert not heavy


def test_nothing_is_spilled(usage):
    # Spilled registers live in local memory: a stack frame, or local bytes.
    spilled = {key: use for key, use in usage.items() if use.get("STACK", 0) or use.get("LOCAL", 0)}
    assert not spilled


def test_parser_sees_a_spill():
    text = "Fatbin elf code:\narch = sm_80\n Function kernel:\n  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:400"
    assert parse_usage(text) == {("sm_80", "kernel"): {"REG": 255, "STACK": 16, "SHARED": 0, "LOCAL": 8}}
