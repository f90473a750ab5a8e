"""Arms of a sweep that was never run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.record import Arm, ArmCost, ArmLatency, ArmStage

LIMIT = 1e13


def arm_of(
    method: str = "l1",
    seed: int = 0,
    value: float = 0.8,
    *,
    kind: str = "cut",
    budget: float | None = 0.5,
    kept: float | None = None,
    cost: float = LIMIT,
    limit: float | None = LIMIT,
    ratio: float | None = None,
    metrics: Mapping[str, float] | None = None,
    **others: Any,
) -> Arm:
    """An arm that reached ``test_acc`` of ``value`` and kept ``kept`` (its budget) of everything."""
    left = kept if kept is not None else 1.0 if budget is None else budget
    whole = 1.0 if kind == "rounds" else left
    given: dict[str, Any] = {
        "network": "net",
        "method": method,
        "kind": kind,
        "seed": seed,
        "budget": budget,
        "budget_on": None if budget is None else "params" if kind == "rounds" else "macs",
        "kept": {"macs": whole, "params": whole, "nonzero_params": left, "nonzero_macs": left},
        "metrics": {"test_acc": value} if metrics is None else metrics,
        "cost": ArmCost(cost, limit, 60.0 + seed, (ArmStage("net/seed0/first", cost, 10, 60.0),)),
        "latency": None if ratio is None else ArmLatency(ratio, ratio * 0.97, ratio * 1.04, 64, 1, "cpu"),
        "versions": {"torch": "2.11.0"},
    }
    return Arm(**given | others)


METHODS = {
    "channels_l1": ("cut", 0.00),
    "channels_taylor": ("cut", 0.004),
    "channels_random": ("cut", -0.02),
    "hrank": ("cut", -0.003),
    "slimming": ("cut", 0.006),
    "slimming_gates": ("cut", 0.001),
    "blocks": ("cut", -0.01),
    "magnitude_oneshot": ("rounds", 0.012),
    "imp_weight_rewind": ("rounds", 0.02),
    "imp_lr_rewind": ("rounds", 0.022),
    "imp_finetune": ("rounds", 0.018),
    "imp_early": ("rounds", 0.016),
    "learned_mask": ("rounds", 0.01),
    "supermask": ("rounds", -0.03),
}
CONTROLS = {
    "scratch": ("scratch", "cost", -0.005),
    "scratch_steps": ("scratch", "steps", -0.012),
    "narrow": ("narrowed", "cost", 0.004),
    "narrow_steps": ("narrowed", "steps", -0.008),
}


def write_sweep(folder: Path, networks: tuple[str, ...] = ("resnet20", "vit"), seeds: int = 3) -> list[Arm]:
    """A grid of all methods and controls at two budgets, written as a sweep leaves it."""
    noise = np.random.default_rng(0)
    arms = []
    for depth, network in enumerate(networks):
        for seed in range(seeds):
            common = {"network": network, "seed": seed}
            top = 0.84 - 0.05 * depth + 0.004 * noise.standard_normal()
            for name, kind in (("dense", "dense"), ("dense_continued", "continued")):
                reached = top + 0.003 * noise.standard_normal()
                arms.append(arm_of(name, value=reached, kind=kind, budget=None, ratio=1.0, **common))
            for budget in (0.5, 0.25):
                loss = 0.06 * (1 - budget)
                entries = [(name, kind, "cost", gain) for name, (kind, gain) in METHODS.items()]
                entries += [(name, kind, equal, gain) for name, (kind, equal, gain) in CONTROLS.items()]
                for name, kind, equal, gain in entries:
                    reached = top - loss + gain + 0.003 * noise.standard_normal()
                    off = 1.05 if (name, network, seed) == ("hrank", "vit", 0) else 1 + 0.004 * noise.standard_normal()
                    free = equal == "steps"
                    cut = {"val_acc": 0.1 + 0.5 * budget} if kind == "cut" else None
                    arms.append(
                        arm_of(
                            name,
                            value=reached,
                            kind=kind,
                            budget=budget,
                            kept=budget * (1 - 0.02 * abs(noise.standard_normal())),
                            cost=LIMIT * (budget if free else off),
                            limit=None if free else LIMIT,
                            ratio=None if kind == "rounds" else 0.2 + 0.8 * budget + 0.05 * noise.standard_normal(),
                            equal=equal,
                            of="channels_l1" if kind == "scratch" else None,
                            before=None if cut is None else {"val_acc": top - 0.01},
                            after_cut=cut,
                            **common,
                        )
                    )
    for arm in arms:
        percent = "" if arm.budget is None else f"-{100 * arm.budget:g}"
        arm.write(folder / arm.network / f"seed{arm.seed}" / f"{arm.method}{percent}")
    return arms
