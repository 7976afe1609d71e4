"""Measure what `speed_up` does to a network: what it replaces, whether values stay equal, and how much faster they come.

    python benchmarks/dropin.py my_project.networks:make_unet    a function that returns (network, args, kwargs)
    python benchmarks/dropin.py --table [--sources DIR]          the networks of dropin_networks.py

The original, a second copy of it, a copy with all kinds of replacements and one with each kind alone are called in turn, in
inference and in training, in fp32 and in bf16. A ratio is the median of the ratios within the rounds, above 1 where the changed
copy is faster; on a CPU it is of the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import dropin_networks
import dropin_report
import results
import script
import timer
from ccella_fast import speed_up
from ccella_fast.dropin import fusion
from ccella_fast.dropin.comparison import Example, ValueComparison, Values, compare, compute, in_float64, tensors_in
from ccella_fast.dropin.matching import KINDS, SpeedUpReport
from ccella_fast.dropin.replacement import map_tensors, watched
from ccella_fast.dropin.rules import torch_layers
from ccella_fast.environment import describe_environment
from ccella_fast.errors import ConfigError
from ccella_fast.storage import write_json

ORIGINAL, AGAIN, ALL = "original", "again", "all"
SLOWEST = 0.97  # of the lowest ratio of the original to itself
_LEAST_ROUNDS = 9  # the median of three calls of a network that takes 0.3 s differs from that of nine by a tenth
EPILOG = """Exit codes: 0 ok; 1 a wrong value or gradient, a network that is slower than its original beyond the noise, or
nothing measured; 2 usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = script.make_parser(__doc__)
    parser.epilog = EPILOG
    parser.add_argument("network", nargs="*", metavar="MODULE:FUNCTION", help="returns (network, args, kwargs)")
    parser.add_argument("--table", action="store_true", help="measure the networks of dropin_networks.py")
    parser.add_argument("--project", nargs="+", metavar="NAME", help="only those of these projects; writes no table")
    parser.add_argument(
        "--sources", type=Path, metavar="DIR", help="the folder with the checkouts of dropin_networks.py"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="for the rounds of a measurement, nine or more (default: 3)"
    )
    return script.run_script(parser, run, argv)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write the table, and return the exit code."""
    chosen = _chosen(arguments)
    device = script.default_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of other projects
    record = new_record(device)
    for network in chosen:
        row = {"project": network.project, "name": network.name, **measure(network.make, device, arguments.seconds)}
        record["networks"].append(row)
        judge(record)
        print(dropin_report.describe(row), flush=True)
    record["seconds"] = round(time.time() - record.pop("begin"), 1)
    print(dropin_report.summary(record))
    if arguments.table and not arguments.project:
        write_json(dropin_report.RECORD, record)
        print(dropin_report.write_markdown())
    found = [row["status"] for row in record["networks"]]
    return 1 if {"wrong", "slower"} & set(found) or not {"ok"} & set(found) else 0


def _chosen(arguments: argparse.Namespace) -> list[dropin_networks.Network]:
    if bool(arguments.network) == arguments.table:
        raise ConfigError(
            "either MODULE:FUNCTION or --table is needed", field="network", fix="give one of them, not both"
        )
    if not arguments.table:
        return [dropin_networks.Network("", name, _imported(name)) for name in arguments.network]
    networks = dropin_networks.networks(arguments.sources)
    projects = list(dict.fromkeys(network.project for network in networks))
    unknown = set(arguments.project or []) - set(projects)
    if unknown:
        why = f"the table has no project '{sorted(unknown)[0]}'"
        raise ConfigError(why, field="--project", fix=f"give one of {', '.join(projects)}")
    return [network for network in networks if network.project in (arguments.project or projects)]


def _imported(name: str) -> Callable[[], dropin_networks.Built]:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "give the module and a function of it that returns (network, args, kwargs), as in my_project.networks:make_unet"
        raise ConfigError(f"{name} cannot be imported: {error}", field="network", fix=fix) from error


def new_record(device: torch.device) -> dict[str, Any]:
    """A record without networks."""
    environment = describe_environment()
    machine = environment["cpu"]["name"] if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "format": "ccella_fast.dropin", "date": results.now(), "commit": results.commit(), "device": device.type,
        "machine": machine, "environment": environment, "begin": time.time(), "networks": [],
    }  # fmt: skip


def judge(record: dict[str, Any]) -> None:
    """Set what the ratios are compared with, and the status of the networks that are right but slower than that."""
    rows = [row for row in record["networks"] if row["status"] in ("ok", "slower")]
    again = [ratios[AGAIN]["median"] for row in rows for ratios in row["ratios"].values()]
    record["lowest_again"] = min(again, default=1.0)
    for row in rows:
        ratios = [ratios[ALL]["median"] for ratios in row["ratios"].values()]
        row["status"] = "slower" if min(ratios, default=1.0) < SLOWEST * record["lowest_again"] else "ok"


# One network


def measure(make: Callable[[], dropin_networks.Built], device: torch.device, seconds: float) -> dict[str, Any]:
    """A row of the record: status, what is replaced, equality and ratios by precision.

    The status is missing if a package is, failed if the original cannot be computed, wrong if the sped-up copy cannot or its
    values or gradients differ by more than `compare` allows, and ok otherwise.
    """
    row: dict[str, Any] = {"status": "ok", "why": "", "replaced": {}, "unknown": {}, "equality": {}, "ratios": {}}
    try:
        torch.manual_seed(0)
        network, args, kwargs = make()
        network, example = _on(device, network), tuple(map_tensors(lambda each: each.to(device), (args, kwargs)))
        _fill_constants(network)
        _call(network, example, training=True)
    except ImportError as error:
        return row | {"status": "missing", "why": _first_line(error)}
    except Exception as error:  # of a foreign network
        return row | {"status": "failed", "why": f"the original: {_first_line(error)}"}
    versions, report = _versions(network)
    row["replaced"] = {kind: len(names) for kind, names in report.swapped.items() if kind != "metatensor"}
    row["unknown"] = {name: [report.total[name] - count, report.total[name]] for name, count in report.unknown.items()}
    row["refused"] = report.refused
    try:
        with watched() as calls:
            _call(versions[ALL], example, training=False)
        row["computing"] = sum(calls.values())
        for precision in ("fp32", "bf16"):
            cast = contextlib.nullcontext()
            if precision == "bf16":
                low = _in_bf16(network, example)
                if low is None:
                    cast = torch.autocast(device.type, torch.bfloat16)
                    row["autocast"] = True
                else:
                    versions, example = {name: each.bfloat16() for name, each in versions.items()}, low
            with cast:
                found = [_compare(versions, example, device, training=training) for training in (False, True)]
            row["equality"][precision] = {
                "differences": _largest([each.differences for each in found]),
                "errors": _largest([each.errors for each in found]),
            }
            wrong = [each.phrase for each in found if not each.is_right]
            if wrong:
                return row | {"status": "wrong", "why": f"{precision}: {wrong[0]}", "ratios": {}}
            for training in (False, True) if row["replaced"] else ():  # otherwise the copy is the original
                name = f"{precision} training" if training else precision
                row["ratios"][name] = _ratios(versions, example, device, training, seconds, cast)
    except _DiffersFromItself as error:
        return row | {"status": "failed", "why": f"two calls of the original: {error}", "ratios": {}}
    except Exception as error:  # the original computes the same
        return row | {"status": "wrong", "why": f"the sped-up network: {_first_line(error)}", "ratios": {}}
    return row


def _versions(network: nn.Module) -> tuple[dict[str, nn.Module], SpeedUpReport]:
    """The original, a copy of it, a copy with everything replaced, and one with each kind alone if there are several."""
    versions = {ORIGINAL: network, AGAIN: copy.deepcopy(network), ALL: copy.deepcopy(network)}
    report = speed_up(versions[ALL])
    kinds = [kind for kind in report.swapped if kind != "metatensor"]
    for kind in kinds if len(kinds) > 1 else []:
        versions[kind] = copy.deepcopy(network)
        speed_up(versions[kind], without=KINDS.keys() - {kind})
    return versions, report


def _on(device: torch.device, network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"the function must return (network, args, kwargs), got {type(network).__name__} as network")
    network.to(device)  # that of wdm-3d returns nothing
    return network


def _fill_constants(network: nn.Module) -> None:
    """Disturb parameters that have one value throughout.

    Many networks start with zeros in the last convolution of a block, behind which no difference could be seen.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


def _in_bf16(network: nn.Module, example: Example) -> Example | None:
    """The example in bf16, or None if the original does not compute with weights in bf16."""
    low = map_tensors(lambda each: each.bfloat16() if each.is_floating_point() else each, tuple(example))
    try:
        _call(copy.deepcopy(network).bfloat16(), low, training=True)
    except RuntimeError:
        return None
    return low


def _call(network: nn.Module, example: Example, *, training: bool) -> None:
    args, kwargs = example
    network.train(training)
    with torch.set_grad_enabled(training):
        outputs = [each for each in tensors_in(network(*args, **kwargs)) if each.is_floating_point()]
        if training:
            torch.stack([each.float().square().mean() for each in outputs]).sum().backward()
            for parameter in network.parameters():
                parameter.grad = None


def _compare(
    versions: dict[str, nn.Module], example: Example, device: torch.device, *, training: bool
) -> ValueComparison:
    """Outputs in evaluation mode, or outputs and gradients in training mode."""
    for network in versions.values():
        network.train(training)

    in_autocast = torch.is_autocast_enabled(device.type)

    def truth() -> Values:
        """In float64, or, for autocast of a network that has matrices of its own in fp32, in fp32."""
        with torch.autocast(device.type, enabled=False):
            try:
                return in_float64(versions[ORIGINAL], example, gradients=training)
            except RuntimeError:
                if not in_autocast:
                    raise
                return compute(versions[ORIGINAL], example, gradients=training)

    before = compute(versions[ORIGINAL], example, gradients=training)
    with _as_on_a_gpu():
        found = compare(before, compute(versions[ALL], example, gradients=training), truth)
    if not found.is_right:
        again = compare(before, compute(versions[AGAIN], example, gradients=training), truth)
        if not again.is_right and again.errors:
            raise _DiffersFromItself(again.phrase)
    return found


class _DiffersFromItself(Exception):  # noqa: N818
    """The original computes other values the second time."""


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let replacements compute wherever they may, also where the original is faster on a CPU: all of them are compared."""
    with (
        mock.patch.object(fusion, "norm_and_silu_pay", lambda x: x.ndim > 2),
        mock.patch.object(fusion, "attention_pays", lambda x, scores: True),
        mock.patch.object(fusion, "upsampling_pays", lambda x: True),
        mock.patch.object(torch_layers.FusedGroupNorm, "suits", lambda self, x: x.ndim > 2),
    ):
        yield


def _ratios(
    versions: dict[str, nn.Module],
    example: Example,
    device: torch.device,
    training: bool,
    seconds: float,
    cast: contextlib.AbstractContextManager[Any],
) -> dict[str, Any]:
    """By version: the quartiles of the ratio of the original's time to its time; in training without single kinds."""
    timed = (ORIGINAL, AGAIN, ALL) if training else versions

    def calls(network: nn.Module) -> Callable[[timer.Stopwatch], None]:
        return lambda stopwatch: _call(network, example, training=training)

    with cast:
        timings = timer.measure(
            {name: calls(versions[name]) for name in timed},
            device,
            budget=seconds,
            least_rounds=_LEAST_ROUNDS,
            clock=time.process_time,
        )
    original = timings[ORIGINAL].rounds
    found = {name: timer.ratio(original, timing.rounds) for name, timing in timings.items() if name != ORIGINAL}
    found[ORIGINAL] = timer.summary(original)
    return {name: {key: _short(value) for key, value in facts.items()} for name, facts in found.items()}


def _largest(found: list[dict[str, float]]) -> dict[str, float | None]:
    """Of evaluation and training."""
    names = dict.fromkeys(name for each in found for name in each)
    return {name: _short(max(each[name] for each in found if name in each)) for name in names}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}"


def _short(value: float) -> float | None:
    """Four digits; None if it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
