"""The command `cctorch`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from cctorch import distributed
from cctorch.interruption import Interrupted

_EXIT_CODES = {"finished": 0, "interrupted": os.EX_TEMPFAIL, "failed": 1, "running": 3}
_DESCRIPTION = """\
Compression-aware training: train a network, compress it by Collaborative Compression (channel pruning and low-rank
decomposition on one budget of multiply-accumulates), fine-tune it, train it with weights of few bits, measure it and
export it.

examples:
  cctorch run configs/demo.yaml                          Fashion-MNIST, ten minutes on two cores
  cctorch run configs/demo.yaml name=harder compress.target=0.7
                                                         the same with changed values, in runs/harder
  cctorch run configs/resnet20_cifar10_quantized.yaml onnx=true
                                                         weights of 4 bits, and an ONNX file of int8 weights
  cctorch run configs/demo.yaml                          run again: goes on where it was interrupted
  cctorch run configs/demo.yaml --fresh                  start over
  torchrun --nproc-per-node 4 -m cctorch run configs/demo.yaml
                                                         the same on four processes or GPUs
  cctorch report runs/demo                               write runs/demo/report.html again
  cctorch status runs/demo                               where it stands, from another terminal
  cctorch sweep runs/demo 0.3 0.5 0.7                    its dense model, compressed to each of these targets
"""
_RUN = """\
Runs what CONFIG describes: train, compress, finetune, then regularize or quantize, and measure. Writes into
runs/<name>/: config.yaml, metrics.jsonl, steps.jsonl and tensorboard/, plan.json, checkpoints/, compressed.pt2 (a
torch.export program), compressed.onnx (with onnx=true), summary.json, run.log and report.html.

An interrupted run goes on from its last checkpoint when the same command is given again. SIGTERM, SIGUSR1 and Ctrl-C
write one after the step of training that runs.

exit codes: 0 finished; 75 interrupted, the same command goes on; 2 the configuration or the data can't be run;
1 failed; 130 Ctrl-C twice. Under torchrun, which has codes of its own, ask `cctorch status RUN --exit-code`.

CIFAR-10 is looked for in data.root or the environment variable CCTORCH_DATA; ${CCTORCH_WEIGHTS} in a configuration is
the folder with the published weights.
"""
_SWEEP = """\
Draws the trade-off curve of a network. The dense model of the finished run RUN is compressed to each TARGET with the
run's own settings, from the gradients that the run has computed; nothing is fine-tuned. Shows and writes, into
RUN/sweep.json and RUN/report.html: what is left of MACs, parameters and latency, and top-1 right after compression,
with BatchNorm re-estimated and repaired, on the validation images (the test images where none were held out).

Targets that were swept before are not computed again.
"""


class _Exact(argparse.ArgumentParser):
    """An abbreviated --fresh would delete a run, and be part of the command that is said to go on with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cctorch", description=_DESCRIPTION, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Exact)
    run = commands.add_parser(
        "run", help="train, compress, fine-tune, quantize, measure", description=_RUN, formatter_class=layout
    )
    run.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    run.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="replaces a value, e.g. finetune.epochs=3 or, of a list, regularize.q.0.ratio=2",
    )
    run.add_argument("--fresh", action="store_true", help="delete this run's files and start over")
    report = commands.add_parser("report", help="write a finished run's report.html again")
    report.add_argument("run", metavar="RUN", type=Path, help="the run's folder, such as runs/demo")
    sweep = commands.add_parser(
        "sweep",
        help="compress a finished run's dense model to several targets",
        description=_SWEEP,
        formatter_class=layout,
    )
    sweep.add_argument("run", metavar="RUN", type=Path, help="the run's folder, such as runs/demo")
    sweep.add_argument("targets", metavar="TARGET", type=float, nargs="+", help="shares of the budget to remove")
    status = commands.add_parser("status", help="say where a run stands: running, interrupted or finished")
    status.add_argument("run", metavar="RUN", type=Path, help="the run's folder, such as runs/demo")
    status.add_argument("--json", action="store_true", help="one line of JSON, for programs")
    status.add_argument(
        "--exit-code",
        action="store_true",
        help="exit as the run did: 0 finished, 75 interrupted, 1 failed; 3 while it is running",
    )
    checkpoint = commands.add_parser("checkpoint", help="say what is in a compressed checkpoint (HDF5)")
    checkpoint.add_argument("file", metavar="FILE", type=Path, help="such as runs/demo/checkpoints/compressed.h5")
    return parser


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    parsed, rest = parser.parse_known_args(given)
    # argparse gives up on positional arguments that follow an option.
    if rest and (parsed.command != "run" or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if parsed.command == "run":
        parsed.overrides += rest
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a run that failed, 2 for a wrong command or configuration, 75 (EX_TEMPFAIL) for
    an interrupted run that can go on, 130 after a Ctrl-C that did not wait."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(given)
    commands = {"run": _run, "report": _report, "sweep": _sweep, "status": _status, "checkpoint": _checkpoint}
    try:
        return commands[parsed.command](parsed)
    except Interrupted as error:
        if distributed.is_main():
            print(f"\n{error}: checkpoint written; this goes on from it:\n  {_again(given)}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        print(f"\ninterrupted; this goes on from the last checkpoint:\n  {_again(given)}", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """The command: ends the process with what `main` returns."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `cctorch status RUN | head -1`: whoever read has read enough
        _silence()
        code = 128 + signal.SIGPIPE
    except OSError as error:  # such as a full disk behind `cctorch status RUN > FILE`
        _silence()
        code = _fail(error)
    if distributed.launched():
        distributed.leave(code)
    sys.exit(code)


def _silence() -> None:
    """What the standard output still holds can't be written; Python would try again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _again(given: Sequence[str]) -> str:
    launcher = [] if distributed.world_size() == 1 else ["torchrun", "...", "-m"]
    return shlex.join([*launcher, "cctorch", *(word for word in given if word != "--fresh")])


def _run(parsed: argparse.Namespace) -> int:
    from cctorch.config import load_config
    from cctorch.run import run

    try:
        run(load_config(parsed.config, parsed.overrides), fresh=parsed.fresh)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error)
    return 0


def _report(parsed: argparse.Namespace) -> int:
    from cctorch import report

    try:
        print(report.write(parsed.run))
    except (ValueError, OSError) as error:
        return _fail(error)
    return 0


def _sweep(parsed: argparse.Namespace) -> int:
    from cctorch.sweep import sweep

    try:
        sweep(parsed.run, parsed.targets)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error)
    print(f"report: {parsed.run / 'report.html'}")
    return 0


def _status(parsed: argparse.Namespace) -> int:
    from cctorch.status import status

    try:
        found = status(parsed.run)
    except (ValueError, OSError) as error:
        return _fail(error)
    print(json.dumps(asdict(found)) if parsed.json else found)
    return _EXIT_CODES[found.state] if parsed.exit_code else 0


def _checkpoint(parsed: argparse.Namespace) -> int:
    try:
        from cctorch import checkpoint

        print(checkpoint.show(parsed.file))
    except (ImportError, ValueError, OSError) as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    from cctorch.config import ConfigError
    from cctorch.data import DataError

    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror} ({error.filename})"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "the disk is full: free some space, then give the same command again"
    of = "" if distributed.is_main() else f" (rank {distributed.rank()})"
    print(f"cctorch{of}: {text}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError | DataError) else 1
