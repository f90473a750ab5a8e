"""From a sweep file to arms, stages and command lines; nothing is run here.

Every arm may spend ``steps x 3 x multiply-adds of the dense forward pass x batch size``, a backward pass counted as two
forward passes. An arm that is cut gives the share ``first`` of it to the dense training that it shares with others, and
the rest to the cut and what follows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigError
from lightning_prune.sweep.changes import (
    callbacks_of,
    change,
    class_name,
    filled,
    is_for_callback,
    option,
    set_budget,
    set_seeds,
)
from lightning_prune.sweep.facts import NetworkFacts
from lightning_prune.sweep.lengths import (
    fraction_for,
    rounds_for,
    split_rounds,
    split_rounds_after,
    total_steps,
)
from lightning_prune.sweep.schema import Method, NetworkChoice, Sweep, percent
from lightning_prune.times import TrainTime

COMPACT, LAST = "compact.safetensors", "checkpoints/last.ckpt"
_AMPLE = 100  # times the steps of the dense network: where a limit ends a training, its length must not come before
_REWINDERS = ("WeightRewind", "LRRewind")
_PRUNERS = ("ChannelPruner", "HRankPruner", "SlimmingPruner", "IterativeMagnitudePruner", "LearnedSupermask")


@dataclass(frozen=True)
class Stage:
    """One fit.

    Args:
        folder: Of its run.
        command: The words of its command line.
        macs: What it may spend, in multiply-adds.
        needs: Files that earlier fits leave.
    """

    folder: Path
    command: tuple[str, ...]
    macs: float
    needs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One network, method, budget and seed.

    Args:
        network: Of the sweep.
        method: Of the sweep.
        budget: What is kept, or ``None``.
        budget_on: What the budget is a fraction of: ``"macs"``, or ``"params"`` (weights) where masks are chosen.
        seed: Of initialisation, data order and everything else.
        stages: In order; the last one's folder is the arm's.
        limit: What all stages together may spend; ``None`` where the steps are what is equal.
        network_spec: The network that the last stage ends with, before anything is removed.
        shape_of: Name of the arm whose compact network gives the shape.
    """

    network: NetworkChoice
    method: Method
    budget: float | None
    budget_on: str | None
    seed: int
    stages: tuple[Stage, ...]
    limit: float | None
    network_spec: Mapping[str, Any]
    shape_of: str | None = None

    @property
    def folder(self) -> Path:
        """Where ``arm.json`` lies."""
        return self.stages[-1].folder

    @property
    def label(self) -> str:
        """Network, seed and name in words."""
        return f"{self.network.name} seed {self.seed} {self.folder.name}"


@dataclass(frozen=True)
class Planner:
    """Builds the arms of one network and one seed.

    Args:
        sweep: The sweep.
        network: The network.
        facts: What is known of it.
        seed: The seed.
        extra: Options of the user's for every fit.
    """

    sweep: Sweep
    network: NetworkChoice
    facts: NetworkFacts
    seed: int
    extra: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """What an arm may spend, in steps of the dense network."""
        return self.network.steps or self.sweep.steps

    @property
    def first_steps(self) -> int:
        """Of them, those of the first training."""
        return max(1, round(self.sweep.first * self.steps))

    @property
    def total(self) -> float:
        """What an arm may spend, in multiply-adds."""
        return float(self.steps * self.facts.step_macs)

    def folder(self, name: str) -> Path:
        """The run folder of an arm or of a first training."""
        return self.sweep.output / self.network.name / f"seed{self.seed}" / name

    def arm(self, method: Method, budget: float | None) -> Arm:
        """One arm.

        Raises:
            ConfigError: A recipe that does not fit its method.
        """
        name = method.name if budget is None else f"{method.name}-{percent(budget)}"
        dense, shape_of, on = self.network.spec(), None, "macs" if budget is not None else None
        limit: float | None = self.total
        match method.kind:
            case "cut":
                assert budget is not None
                stages, on = self._cut(method, budget, name)
            case "whole":
                assert budget is not None
                stages, on = self._whole(method, budget, name)
            case "rounds":
                assert budget is not None
                stages, on = (self._rounds(method, budget, name),), "params"
            case "continued":
                stages = self._continued(method, name)
            case "dense":
                stages = (self._plain(method, name, dense, self.steps),)
            case "narrowed":
                assert budget is not None
                dense, stage = self._narrowed(method, budget, name)
                stages, limit = (stage,), None if method.equal == "steps" else limit
            case _:
                assert budget is not None
                shape_of = f"{method.of}-{percent(budget)}"
                dense, stage = self._scratch(method, name, shape_of)
                stages, limit = (stage,), None if method.equal == "steps" else limit
                on = self.arm(self.sweep.methods[str(method.of)], budget).budget_on
        return Arm(self.network, method, budget, on, self.seed, stages, limit, dense, shape_of)

    # ------------------------------------------------------------------- kinds

    def first(self, method: Method) -> Stage:
        """The first training of a cut; methods with the same recipe and changes share it."""
        name = "first"
        if method.first_recipe is not None or method.first_changes:
            name += f"-{method.first_recipe.stem if method.first_recipe is not None else method.name}"
            name += f"-{method.name}" if method.first_recipe is not None and method.first_changes else ""
        recipes = _without_none(self.sweep.recipe, method.first_recipe)
        callbacks, options = self._changed(recipes, method.first_changes)
        return self._fit(
            name, recipes, callbacks, options, self.network.spec(), steps=self.first_steps, tests=False
        )  # fmt: skip

    def _after_first(self, method: Method) -> tuple[Stage, dict[str, Any], float]:
        first = self.first(method)
        weights = first.folder / LAST
        spec = {
            "class_path": "lightning_prune.experiments.trained",
            "init_args": {"network": self.network.spec(), "weights": str(weights)},
        }
        return first, spec, self.total - first.macs

    def _cut(self, method: Method, budget: float, name: str) -> tuple[tuple[Stage, ...], str]:
        assert method.recipe is not None
        first, spec, rest = self._after_first(method)
        recipes = [self.sweep.recipe, method.recipe]
        callbacks, options = self._changed(recipes, method.changes)
        on = set_budget(callbacks, budget, method.recipe)
        stage = self._fit(
            name, recipes, callbacks, options, spec, limit=rest, needs=(first.folder / LAST,)
        )  # fmt: skip
        return (first, stage), on

    def _whole(self, method: Method, budget: float, name: str) -> tuple[tuple[Stage, ...], str]:
        assert method.recipe is not None
        recipes = [self.sweep.recipe, method.recipe]
        callbacks, options = self._changed(recipes, method.changes)
        on = set_budget(callbacks, budget, method.recipe, at=f"{self.first_steps}st")
        return (self._fit(name, recipes, callbacks, options, self.network.spec(), limit=self.total),), on

    def _continued(self, method: Method, name: str) -> tuple[Stage, ...]:
        first, spec, _ = self._after_first(method)
        callbacks, options = self._changed([self.sweep.recipe], method.changes)
        steps = self.steps - self.first_steps
        stage = self._fit(
            name, [self.sweep.recipe], callbacks, options, spec, steps=steps, needs=(first.folder / LAST,)
        )
        return first, stage

    def _plain(self, method: Method, name: str, spec: dict[str, Any], steps: int) -> Stage:
        callbacks, options = self._changed([self.sweep.recipe], method.changes)
        return self._fit(name, [self.sweep.recipe], callbacks, options, spec, steps=steps)

    def _narrowed(self, method: Method, budget: float, name: str) -> tuple[dict[str, Any], Stage]:
        spec = self.network.spec(self.facts.widths[percent(budget)])
        macs = self.facts.narrow_macs[percent(budget)]
        steps = self.steps if method.equal == "steps" else round(self.steps * self.facts.macs / macs)
        stage = self._plain(method, name, spec, steps)
        return spec, Stage(stage.folder, stage.command, float(self.facts.training(macs) * steps))

    def _scratch(self, method: Method, name: str, shape_of: str) -> tuple[dict[str, Any], Stage]:
        compact = self.folder(shape_of) / COMPACT
        spec = {
            "class_path": "lightning_prune.experiments.shaped_like",
            "init_args": {"network": self.network.spec(), "compact": str(compact)},
        }
        callbacks, options = self._changed([self.sweep.recipe], method.changes)
        length: dict[str, Any] = {"steps": self.steps} if method.equal == "steps" else {"limit": self.total}
        return spec, self._fit(name, [self.sweep.recipe], callbacks, options, spec, needs=(compact,), **length)

    def _rounds(self, method: Method, budget: float, name: str) -> Stage:
        assert method.recipe is not None
        recipes = [self.sweep.recipe, method.recipe]
        callbacks, options = self._changed(recipes, method.changes)
        rounds = method.rounds or rounds_for(budget, method.fraction)
        if not change(callbacks, "IterativeMagnitudePruner.rounds", rounds):
            raise ConfigError(f"{method.recipe}: a method of kind rounds needs an IterativeMagnitudePruner.")
        change(callbacks, "IterativeMagnitudePruner.fraction", fraction_for(budget, rounds))
        length, point = self._length_of_rounds(method, callbacks, rounds)
        used = total_steps(length, rounds, point)
        return self._fit(name, recipes, callbacks, options, self.network.spec(), steps=used, length=length)

    def _length_of_rounds(self, method: Method, callbacks: Sequence[dict[str, Any]], rounds: int) -> tuple[int, int]:
        """Length of one training and rewinding point; the recipe's rewinders are given theirs in place."""
        rewinders = [entry for entry in callbacks if class_name(entry) in _REWINDERS]
        if not rewinders:
            if method.rewind is not None:
                raise ConfigError(
                    f"methods.{method.name}.rewind={method.rewind}: {method.recipe} has no WeightRewind or LRRewind."
                )
            return split_rounds(self.steps, rounds, 0.0)
        time = TrainTime.parse(rewinders[0]["init_args"].get("to", "0st"), "to")
        if method.rewind is None and time.unit != "%" and time.value:
            if time.unit == "ep":
                raise ConfigError(f"{method.recipe}: to={time}: in a sweep give the point as '10%', or in steps.")
            length = split_rounds_after(self.steps, rounds, int(time.value))
            return length, int(time.value)
        share = float(time.value) / 100 if method.rewind is None else method.rewind
        length, point = split_rounds(self.steps, rounds, share)
        for entry in rewinders:
            entry["init_args"]["to"] = f"{point}st"
        return length, point

    # ------------------------------------------------------------ command lines

    def _changed(self, recipes: Sequence[Path], changes: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """The recipe's callbacks with the network's and the method's changes; the other changes as options."""
        callbacks = callbacks_of(recipes)
        options = []
        for given, must in ((self.network.changes, False), (changes, True)):
            for key, value in given.items():
                value = filled(value, self.seed)
                if not is_for_callback(key):
                    options.append(option(key, value))
                elif not change(callbacks, key, value) and must:
                    names = ", ".join(class_name(entry) for entry in callbacks) or "none"
                    raise ConfigError(f"set: {key}: {recipes[-1]} has no such callback; it has {names}.")
        set_seeds(callbacks, self.seed)
        return callbacks, options

    def _fit(
        self,
        name: str,
        recipes: Sequence[Path],
        callbacks: list[dict[str, Any]],
        options: Sequence[str],
        network: Mapping[str, Any],
        *,
        steps: int | None = None,
        limit: float | None = None,
        length: int | None = None,
        tests: bool = True,
        needs: tuple[Path, ...] = (),
    ) -> Stage:
        """A fit that ends after ``steps`` steps, or after ``limit`` multiply-adds.

        Where ``length`` is given, it is that of one of several rounds, which together have ``steps``.
        """
        nominal = steps if steps is not None else max(1, _AMPLE * round((limit or 0.0) / self.facts.step_macs))
        words = ["lightning-prune", "fit"]
        for recipe in recipes:
            words += ["--config", str(recipe)]
        logger = {"save_dir": str(self.sweep.output), "name": f"{self.network.name}/seed{self.seed}", "version": name}
        words += [
            f"--seed_everything={self.seed}",
            option("model.init_args.network", network),
            option("trainer.callbacks", self._companions(callbacks, limit)),
            option("trainer.logger", {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}),
            "--trainer.max_epochs=-1",
            f"--trainer.max_steps={length or nominal}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
        if length is None:  # a validation at the last step and nowhere else; rounds end with one of themselves
            words += ["--trainer.check_val_every_n_epoch=null", f"--trainer.val_check_interval={nominal}"]
        words += [*options, *([] if tests else ["--test_after_fit=false"]), *self.extra]
        macs = limit if limit is not None else float(nominal * self.facts.step_macs)
        return Stage(self.folder(name), tuple(words), macs, needs)

    def _companions(self, callbacks: list[dict[str, Any]], limit: float | None) -> list[dict[str, Any]]:
        """With the cost counted, a checkpoint at the end, and checkpoints from which a killed run goes on."""
        found = [entry for entry in callbacks if class_name(entry) != "TrainingCost"]
        if not any(class_name(e) == "ModelCheckpoint" and e["init_args"].get("save_last") for e in found):
            found.append(_checkpoint(save_last=True))
        every = self.sweep.checkpoint_every
        found.append(_checkpoint(filename="resume", every_n_train_steps=every, enable_version_counter=False))
        if not any(class_name(entry) in _PRUNERS for entry in found):  # which else keep the place in the data
            found.append({"class_path": "lightning_prune.instability.branches.SGDNoise", "init_args": {}})
        found.append({"class_path": "lightning_prune.TrainingCost", "init_args": {"limit": limit}})
        return found


def _checkpoint(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}


def _without_none(*paths: Path | None) -> list[Path]:
    return [path for path in paths if path is not None]


def plan_arms(
    sweep: Sweep,
    facts: Mapping[str, NetworkFacts],
    networks: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[float],
    seeds: Sequence[int],
    extra: Sequence[str] = (),
) -> list[Arm]:
    """The arms of a part of the grid, one network after the other, each after what it needs.

    Args:
        sweep: The sweep.
        facts: Of each network.
        networks: Names of networks.
        methods: Names of methods.
        budgets: Budgets.
        seeds: Seeds.
        extra: Options of the user's for every fit.

    Raises:
        ConfigError: A recipe that does not fit its method.
    """
    arms = []
    for network in networks:
        for seed in seeds:
            planner = Planner(sweep, sweep.networks[network], facts[network], seed, tuple(extra))
            chosen = [sweep.methods[name] for name in methods if sweep.methods[name].suits(network)]
            arms += [planner.arm(method, None) for method in chosen if not method.has_budget]
            for budget in budgets:
                with_budget = sorted((m for m in chosen if m.has_budget), key=lambda m: m.kind == "scratch")
                arms += [planner.arm(method, budget) for method in with_budget]
    return arms
