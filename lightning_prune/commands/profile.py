"""``lightning-prune profile``: parameters, multiply-adds and latency of a network, or of two side by side."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from lightning_prune.commands.target import add_target_arguments, load_target
from lightning_prune.costs import RunAs, count_costs, measure_latency, measure_savings
from lightning_prune.costs.savings import HEADER
from lightning_prune.errors import ConfigError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str]) -> None:
    """Count, time and print.

    Raises:
        ConfigError: An option that does not fit, or a device that is not there.
        MeasurementError: A network that cannot be run or timed.
    """
    given = _parser().parse_args(arguments)
    if given.against_weights and not given.against:
        raise ConfigError("--against-weights belong to the network of --against NAME; give both.")
    if given.depth < 1:
        raise ConfigError(f"--depth {given.depth}: expected at least 1.")
    model, inputs = load_target(given)
    inputs = RunAs(batch_size=given.batch_size).inputs(inputs)
    costs = count_costs(model, inputs)
    print(costs.table(given.depth))
    if not given.against:
        if given.latency:
            latency = measure_latency(model, inputs, **_options(given))
            print(f"\na forward pass takes {latency}\n{_where(latency.environment, latency.batch_size)}")
        return
    dense, _ = load_target(
        argparse.Namespace(**vars(given) | {"model": given.against, "weights": given.against_weights})
    )
    options = _options(given) if given.latency else {}
    dense_costs = count_costs(dense, inputs)
    savings = measure_savings(model, inputs, dense, dense_costs, latency=given.latency, **options)
    print(f"\n{given.model} beside {given.against}; fractions are of the latter\n{HEADER}\n{savings.text('')}")
    if savings.comparison is not None:
        print(f"measured: {savings.comparison}")
        print(_where(savings.comparison.second.environment, savings.comparison.second.batch_size))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-prune profile", description=__doc__)
    add_target_arguments(parser)
    parser.add_argument(
        "--against", metavar="NAME", help="another network, in the forms of --model, with the same inputs"
    )
    parser.add_argument("--against-weights", metavar="FILE", help="its weights, in the forms of --weights")
    parser.add_argument("--depth", type=int, default=2, help="how deep into the modules the table goes (default: 2)")
    parser.add_argument("--no-latency", dest="latency", action="store_false", help="count only")
    parser.add_argument("--batch-size", type=int, help="cut or repeat the inputs to so many examples")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long latency is sampled (default: 2)")
    parser.add_argument("--device", help="where latency is measured, such as cuda (default: the CPU)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="data type in which latency is measured")
    parser.add_argument("--channels-last", action="store_true", help="measure with channels last in memory")
    parser.add_argument("--compile", action="store_true", help="measure compiled by torch.compile")
    return parser


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "seconds": given.seconds,
        "device": given.device,
        "dtype": None if given.dtype is None else DTYPES[given.dtype],
        "channels_last": given.channels_last,
        "compiled": given.compile,
    }


def _where(environment: dict[str, Any], batch_size: int | None) -> str:
    """What a latency was measured on, in a line."""
    how = [f"batch {batch_size}", environment["dtype"], "channels last" if environment["channels_last"] else ""]
    how += ["compiled" if environment["compiled"] else "eager", f"{environment['device']}"]
    how += [f"{environment['threads']} threads", f"load {environment['load']}", f"torch {environment['torch']}"]
    return "measured with " + ", ".join(part for part in how if part)
