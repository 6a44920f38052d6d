"""The compiled CUDA kernels, inspected without a GPU: registers, nothing spilled, and accesses of 16 bytes."""

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


def element_wise(formula: str) -> tuple[str, ...]:
    return tuple(f"{kernel}.*{formula}" for kernel in ("ElementWise", "BackwardRows", "BackwardColumns"))


def of_lists(formula: str) -> tuple[str, ...]:
    return tuple(f"Together.*{pattern}" for pattern in element_wise(formula))


# The parts of a mangled kernel name by which an op's kernels are known.
KERNELS = {
    "fake_quant": element_wise("9FakeQuantI.*3Raw"),
    "fake_quant_offset": element_wise("FakeQuantOffset.*3Raw"),
    "pact": element_wise("4Pact.*3Raw"),
    "fp8_quant": element_wise("FloatQuant.*3Raw"),
    "power_of_two_quant": ("ElementWise.*FloatQuant.*5Given", "RowMap.*11PowersOfTwo"),
    "binary_quant": ("RowMap.*11ScaledSigns",),
    "codebook_quant": ("Together.*8codebook8Quantize",),
    "codebook_indices": ("Together.*8codebook7Indices",),
    "codebook_update and codebook_quant's gradient": ("Together.*8codebook4Sums", "Together.*8codebook5Total"),
    "channel_gate": element_wise("ChannelGate"),
    "fake_quant_weights": ("RowMap.*9OnLargest",),
    "soft_threshold": element_wise("SoftThreshold"),
    "fake_quant of a list": of_lists("9FakeQuantI.*3Raw"),
    "fake_quant_offset of a list": of_lists("FakeQuantOffset.*3Raw"),
    "fp8_quant of a list": of_lists("FloatQuant.*3Raw"),
    "soft_threshold of a list": of_lists("SoftThreshold"),
    "all of these": ("SumPartials", "Together.*SumPartials"),
    "magnitude_masks": ("Prepare", "CountDigits", "4KeepIjbE"),
    "magnitude_prune": ("4KeepIjjE",),
    "nm_masks": ("MarkGroups",),
    "channel_masks and block_masks": ("5ScoreI", "6Finish", "WriteMasks"),
    "apply_mask": ("ApplyMask",),
    "lstm_cell": ("4lstm7Forward", "4lstm8Backward"),
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


# Kernels whose time is that of the memory they touch. Counting stores nothing, and masks are 1 byte for each weight.
STREAMING = {
    "ElementWise": ("LDG.E.128", "STG.E.128"),
    "BackwardRows": ("LDG.E.128", "STG.E.128"),
    "BackwardColumns": ("LDG.E.128", "STG.E.128"),
    "ApplyMask": ("LDG.E.128", "STG.E.128"),
    "RowMap": ("LDG.E.128", "STG.E.128"),
    "8codebook8Quantize": ("LDG.E.128", "STG.E.128"),
    "8codebook4Sums": ("LDG.E.128",),
    "CountDigitsIj": ("LDG.E.128",),
    "CountDigitsIt": ("LDG.E.128",),
    "4KeepIjj": ("LDG.E.128", "STG.E.128"),
    "4KeepIjb": ("LDG.E.128",),
    "4lstm7ForwardIffLi4": ("LDG.E.128", "STG.E.128"),
    "4lstm8BackwardIffLi4": ("LDG.E.128", "STG.E.128"),
    "4lstm7ForwardIN3c104HalfEfLi8": ("LDG.E.128", "STG.E.128"),
    "4lstm8BackwardIN3c104HalfEfLi8": ("LDG.E.128", "STG.E.128"),
}


def parse_accesses(text: str) -> dict[tuple[str, str], set[str]]:
    """The loads and stores of global (LDG, STG) and local memory (LDL, STL) of each (architecture, kernel)."""
    accesses: dict[tuple[str, str], set[str]] = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match[1]
            accesses[architecture, kernel] = set()
        elif match := re.search(r"\b(?:LDG|STG|LDL|STL)\b[\w.]*", line):
            accesses[architecture, kernel].add(match[0])
    return accesses


def test_streaming_kernels_take_16_bytes_at_once():
    accesses = parse_accesses(dump("-sass"))
    assert {architecture for architecture, _ in accesses} == set(ARCHITECTURES)
    for name, expected in STREAMING.items():
        of_name = {key: found for key, found in accesses.items() if name in key[1]}
        assert len(of_name) >= len(ARCHITECTURES), f"no {name}"
        for key, found in of_name.items():
            for access in expected:
                assert any(a.startswith(access) for a in found), f"{key} has no {access}: {found}"
            assert not [a for a in found if a.startswith(("LDL", "STL"))], f"{key} spills: {found}"


def test_parser_sees_accesses():
    text = """
arch = sm_80
                Function : _Z6kernel
        /*0090*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*00a0*/              @!P0 STG.E [R2.64], R4 ;
        /*00b0*/                   STL.64 [R1], R4 ;
"""
    assert parse_accesses(text) == {("sm_80", "_Z6kernel"): {"LDG.E.128.CONSTANT", "STG.E", "STL.64"}}


def test_parser_sees_a_spill():
    text = "Fatbin elf code:\narch = sm_80\n Function kernel:\n  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:400"
    assert parse_usage(text) == {("sm_80", "kernel"): {"REG": 255, "STACK": 16, "SHARED": 0, "LOCAL": 8}}
