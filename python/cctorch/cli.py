"""The command `cctorch`."""

from __future__ import annotations

import argparse
import errno
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

_DESCRIPTION = """\
Compression-aware training: train a network, compress it by Collaborative Compression (channel pruning and low-rank
decomposition on one budget of multiply-accumulates), fine-tune it, measure it and export it.

examples:
  cctorch run configs/demo.yaml                          Fashion-MNIST, ten minutes on two cores
  cctorch run configs/demo.yaml name=harder compress.target=0.7
                                                         the same with changed values, in runs/harder
  cctorch run configs/demo.yaml                          run again: goes on where it was interrupted
  cctorch run configs/demo.yaml --fresh                  start over
  cctorch report runs/demo                               write runs/demo/report.html again
  cctorch status runs/demo                               where it stands, from another terminal
  cctorch sweep runs/demo 0.3 0.5 0.7                    its dense model, compressed to each of these targets
"""
_RUN = """\
Runs what CONFIG describes and writes into runs/<name>/: config.yaml, metrics.jsonl and tensorboard/, plan.json,
checkpoints/, compressed.pt2 (a torch.export program), summary.json, run.log and report.html.

An interrupted run goes on from its last epoch when the same command is given again.

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


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cctorch", description=_DESCRIPTION, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="train, compress, fine-tune, measure", description=_RUN, formatter_class=layout
    )
    run.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    run.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value, e.g. finetune.epochs=3")
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
    """Returns the exit code: 0, 1 for a run that can't go on, 2 for a wrong command, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(given)
    try:
        return {"run": _run, "report": _report, "sweep": _sweep, "status": _status}[parsed.command](parsed)
    except KeyboardInterrupt:
        resume = shlex.join(["cctorch", *(word for word in given if word != "--fresh")])
        print(
            f"\ninterrupted; this goes on from what was finished (of training, the last epoch):\n  {resume}",
            file=sys.stderr,
        )
        return 130


def _run(parsed: argparse.Namespace) -> int:
    from cctorch import _C
    from cctorch.config import load_config
    from cctorch.run import run, select_device

    try:
        config = load_config(parsed.config, parsed.overrides)
        if select_device(config).type == "cpu":
            _C.keep_freed_memory()
        run(config, fresh=parsed.fresh)
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
    return 0


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror} ({error.filename})"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = "the disk is full: free some space, then give the same command again"
    print(f"cctorch: {text}", file=sys.stderr)
    return 1
