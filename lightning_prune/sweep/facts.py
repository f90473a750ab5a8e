"""What planning needs to know of a network: what an example costs, how large a batch is, how wide a narrow one may be.

Facts are kept in a file beside the runs, so that they are found once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_prune.callbacks.training_cost import BACKWARD, FORWARD
from lightning_prune.costs import Costs, count_costs
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.files import read_json, write_json
from lightning_prune.recipes import essence
from lightning_prune.sweep.changes import read_recipe
from lightning_prune.sweep.schema import NetworkChoice, Sweep, percent

FACTS_NAME = "network.json"
_TOLERANCE = 1e-4  # of a width, relative: finer than one channel of any network here


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network before anything is trained.

    Args:
        shape: Of one example, without the batch.
        batch_size: Examples in a training step.
        macs: Multiply-adds of the dense network's forward pass, one example.
        params: Its parameters.
        widths: By budget (as text), the width of the narrowed network.
        narrow_macs: By budget, its multiply-adds.
    """

    shape: tuple[int, ...]
    batch_size: int
    macs: int
    params: int
    widths: dict[str, float] = field(default_factory=dict)
    narrow_macs: dict[str, int] = field(default_factory=dict)

    @property
    def step_macs(self) -> int:
        """Multiply-adds of a training step of the dense network."""
        return self.training(self.macs)

    def training(self, macs: int) -> int:
        """Multiply-adds of a training step, forward and backward, of a network whose forward pass takes ``macs``."""
        return (FORWARD + BACKWARD) * macs * self.batch_size


def build(spec: Any, what: str = "network") -> nn.Module:
    """Build a network that a recipe names, ``{class_path, init_args}``.

    Raises:
        ConfigError: It cannot be built.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    try:
        return parser.instantiate_classes(parser.parse_object({"network": spec})).network
    except Exception as error:  # jsonargparse and the networks' own constructors raise many kinds
        reason = " ".join(essence(str(error)).split())[:400]
        raise ConfigError(f"{what} cannot be built ({type(error).__name__}: {reason}).") from error


def example(shape: Sequence[int], batch_size: int = 1) -> Tensor:
    """Inputs of the given shape: numbers in [0, 1), always the same."""
    return torch.rand(batch_size, *shape, generator=torch.Generator().manual_seed(0))


def costs_of(network: nn.Module, shape: Sequence[int]) -> Costs:
    """Parameters and multiply-adds an example, in evaluation."""
    network.eval()
    return count_costs(network, example(shape))


def network_facts(sweep: Sweep, network: NetworkChoice, budgets: Sequence[float], extra: Sequence[str]) -> NetworkFacts:
    """Facts of a network: those on file where they are of this recipe and this class, else found now and written.

    Args:
        sweep: The sweep.
        network: The network.
        budgets: For which the narrowed width is needed.
        extra: Options of the user's for every fit; those of the data matter here.

    Raises:
        ConfigError: The network or the data cannot be built.
    """
    path = sweep.output / network.name / FACTS_NAME
    data = [word for word in extra if word.startswith("--data.")]
    said = {"recipe": read_recipe(sweep.recipe), "network": network.spec(), "input": sweep.input}
    changes = {key: value for key, value in network.changes.items() if key.startswith("data.")}
    key = hashlib.sha256(json.dumps([said, changes], sort_keys=True, default=str).encode()).hexdigest()
    facts = _known(path, key)
    new = facts is None
    if facts is None:
        options = [*(f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changes.items()), *data]
        facts = _find(sweep, network, options)
    missing = [budget for budget in budgets if percent(budget) not in facts.widths]
    for budget in missing:
        width, macs = narrowed_width(network, facts, budget)
        facts.widths[percent(budget)], facts.narrow_macs[percent(budget)] = width, macs
    if missing or new:
        write_json(path, {"key": key, "facts": asdict(facts)})
    return facts


def _known(path: Path, key: str) -> NetworkFacts | None:
    """The facts on file, where they are of this key and whole."""
    if not path.exists():
        return None
    try:
        content = read_json(path, "facts of a network")
        values = content["facts"]
        return NetworkFacts(**values | {"shape": tuple(values["shape"])}) if content["key"] == key else None
    except (FileFormatError, KeyError, TypeError):
        return None


def _find(sweep: Sweep, network: NetworkChoice, options: Sequence[str]) -> NetworkFacts:
    data = _build_data(sweep.recipe, options)
    size = getattr(data, "batch_size", None)
    shape = sweep.input
    if shape is None or not isinstance(size, int):
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(inputs, Tensor):
            raise ConfigError(
                f"{sweep.recipe}: a training batch begins with a {type(inputs).__name__}; a sweep needs networks that "
                "take one tensor."
            )
        size, shape = len(inputs), tuple(inputs.shape[1:])
    costs = costs_of(build(network.spec(), f"networks.{network.name}"), shape)
    return NetworkFacts(shape, size, costs.macs.total, costs.params.total)


def _build_data(recipe: Path, options: Sequence[str]) -> LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    try:
        content = {"data": read_recipe(recipe)["data"]}
        config = parser.parse_args([f"--data={json.dumps(content['data'])}", *options])
        return parser.instantiate_classes(config).data
    except Exception as error:
        reason = " ".join(essence(str(error)).split())[:400]
        raise ConfigError(f"{recipe}: its data cannot be built ({type(error).__name__}: {reason}).") from error


def narrowed_width(network: NetworkChoice, facts: NetworkFacts, budget: float) -> tuple[float, int]:
    """The greatest width at which the network's multiply-adds stay within a budget, by bisection.

    Args:
        network: The network.
        facts: Of the dense one.
        budget: The fraction of its multiply-adds.

    Returns:
        The width and the multiply-adds an example.

    Raises:
        ConfigError: No width is narrow enough.
    """
    counted: dict[float, int] = {}

    def macs(width: float) -> int:
        if width not in counted:
            narrow = build(network.spec(width), f"networks.{network.name} at width {width}")
            counted[width] = costs_of(narrow, facts.shape).macs.total
        return counted[width]

    allowed = budget * facts.macs
    low, high = 0.0, network.width
    while high - low > _TOLERANCE * network.width:
        middle = float(f"{(low + high) / 2:.6g}")
        if macs(middle) <= allowed:
            low = middle
        else:
            high = middle
    if low == 0:
        raise ConfigError(f"networks.{network.name}: no width keeps only {budget:g} of the multiply-adds.")
    return low, counted[low]
