"""Measuring the latency of finished arms beside the dense network, on a machine that is quiet at that moment."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_prune.costs import compare_latency
from lightning_prune.errors import PruneError
from lightning_prune.record import ARM_NAME, ArmLatency
from lightning_prune.record import Arm as Result
from lightning_prune.sweep.facts import NetworkFacts, build, example
from lightning_prune.sweep.planning import Arm
from lightning_prune.sweep.results import network_of
from lightning_prune.sweep.schema import Sweep

SMALLER = ("cut", "whole", "scratch", "narrowed")
"""Kinds of method whose networks have other shapes than the dense one; masks leave latency as it is."""


def shapes_of(network: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The shapes of a network's parameters and buffers: networks alike in them are timed once."""
    return tuple((name, tuple(value.shape)) for name, value in network.state_dict().items())


def measure_arms(
    sweep: Sweep, arms: Sequence[Arm], facts: Mapping[str, NetworkFacts], again: bool = False
) -> list[str]:
    """Fill ``latency`` into the ``arm.json`` of finished arms; those that have it are left alone.

    The compact and the dense network run by turns in this process. Arms whose networks have the same shapes, such as a
    cut network and its control from scratch, or several seeds of a narrowed one, are timed once and share the figures.
    Each file is written when its figures are there, so the work can be stopped and gone on with.

    Args:
        sweep: The sweep, with how latency is measured.
        arms: Arms; unfinished ones are passed over.
        facts: Of each network.
        again: Whether to measure those that have figures once more.

    Returns:
        What could not be measured, by arm and reason.
    """
    finished = [arm for arm in arms if arm.method.kind in SMALLER and (arm.folder / ARM_NAME).exists()]
    results = {arm.folder: Result.read(arm.folder) for arm in finished}
    missing = {folder for folder, result in results.items() if again or result.latency is None}
    timed: dict[object, ArmLatency] = {}
    problems = []
    for arm in sorted(finished, key=lambda arm: arm.folder in missing):  # first those whose figures others can share
        latency = results[arm.folder].latency
        if not missing or (latency is not None and not again and not _is_so(latency, sweep)):
            continue
        try:
            network = network_of(arm).eval()
            key = arm.network.name, shapes_of(network)
            if latency is not None and not again:
                timed.setdefault(key, latency)
                continue
            if key not in timed:
                timed[key] = _measured(arm, network, sweep, facts[arm.network.name])
        except PruneError as error:
            problems.append(f"{arm.label}: {error}")
            continue
        replace(results[arm.folder], latency=timed[key]).write(arm.folder)
    return problems


def _is_so(latency: ArmLatency, sweep: Sweep) -> bool:
    """Whether figures were taken as the sweep file says now."""
    return (latency.batch_size, latency.threads) == (sweep.latency["batch_size"], sweep.latency["threads"])


def _measured(arm: Arm, network: nn.Module, sweep: Sweep, facts: NetworkFacts) -> ArmLatency:
    how = sweep.latency
    options = {key: how[key] for key in ("batch_size", "seconds", "device")}
    dense = build(arm.network.spec()).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(how["threads"])
    try:
        found = compare_latency(dense, network, example(facts.shape), **options)
    finally:
        torch.set_num_threads(before)
    print(f"{arm.label}: {found}", flush=True)
    device = str(found.first.environment.get("device", how["device"]))
    return ArmLatency(found.ratio, found.low, found.high, how["batch_size"], how["threads"], device)
