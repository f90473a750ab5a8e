"""A sweep file becomes arms, stages and command lines, and every arm may spend the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.commands.sweep import chosen, joined
from lightning_prune.errors import ConfigError
from lightning_prune.sweep.facts import NetworkFacts
from lightning_prune.sweep.lengths import fraction_for, rounds_for, split_rounds, total_steps
from lightning_prune.sweep.planning import Arm, Stage, plan_arms
from lightning_prune.sweep.running import commands_of, difference
from lightning_prune.sweep.schema import Sweep, read_sweep

BUDGET = {"class_path": "lightning_prune.Budget", "init_args": {"macs": 0.9}}
RECIPES: dict[str, dict[str, Any]] = {
    "train.yaml": {"model": {}, "data": {}},
    "channels.yaml": {"trainer": {"callbacks": [
        {"class_path": "lightning_prune.ChannelPruner", "init_args": {"criterion": "l1", "budget": BUDGET}},
        {"class_path": "lightning_prune.CostProfiler"},
    ]}},
    "sparsity.yaml": {"trainer": {"callbacks": {"class_path": "lightning_prune.SlimmingRegularizer"}}},
    "imp.yaml": {"trainer": {"callbacks": [
        {"class_path": "lightning_prune.IterativeMagnitudePruner"},
        {"class_path": "lightning_prune.WeightRewind", "init_args": {"to": "3%"}},
        {"class_path": "lightning_prune.LRRewind", "init_args": {"to": "3%"}},
    ]}},
    "gates.yaml": {"trainer": {"callbacks": [
        {"class_path": "lightning_prune.SlimmingRegularizer", "init_args": {"gates": True}},
        {"class_path": "lightning_prune.SlimmingPruner", "init_args": {"budget": BUDGET, "at": "9st"}},
    ]}},
    "tune.yaml": {"trainer": {"callbacks": ["lightning_prune.IterativeMagnitudePruner"]}},
}  # fmt: skip
SWEEP: dict[str, Any] = {
    "recipe": "train.yaml",
    "output": "out",
    "steps": 700,
    "first": 0.6,
    "networks": {
        "a": {"class": "x.A", "width": 0.5, "set": {"SlimmingRegularizer.strength": 3e-3, "model.lr": 0.2}},
        "b": {"class": "x.B", "width": 1.0, "args": {"deep": True}, "steps": 300},
    },
    "budgets": [0.5, 0.125],
    "seeds": [0, 3],
    "methods": {
        "scratch": {"kind": "scratch", "of": "slimming"},
        "scratch_steps": {"kind": "scratch", "of": "slimming", "equal": "steps"},
        "l1": {"kind": "cut", "recipe": "channels.yaml"},
        "random": {"kind": "cut", "recipe": "channels.yaml", "set": {"ChannelPruner.criterion": "random"}},
        "slimming": {"kind": "cut", "recipe": "channels.yaml", "first_recipe": "sparsity.yaml"},
        "imp": {"kind": "rounds", "recipe": "imp.yaml", "rewind": 0.1},
        "gates": {"kind": "whole", "recipe": "gates.yaml"},
        "tune": {"kind": "rounds", "recipe": "tune.yaml", "rounds": 3},
        "only_b": {"kind": "cut", "recipe": "channels.yaml", "networks": ["b"]},
        "dense": {"kind": "dense"},
        "continued": {"kind": "continued"},
        "narrowed": {"kind": "narrowed"},
        "narrowed_steps": {"kind": "narrowed", "equal": "steps"},
    },
}
FACTS = NetworkFacts((3, 8, 8), 16, 1000, 50, {"50": 0.3, "12.5": 0.1}, {"50": 480, "12.5": 121})


def sweep_of(folder: Path, **changes: Any) -> Sweep:
    for name, content in RECIPES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP | changes))
    return read_sweep(path)


def arms_of(sweep: Sweep) -> dict[str, Arm]:
    facts = dict.fromkeys(sweep.networks, FACTS)
    arms = plan_arms(sweep, facts, [*sweep.networks], [*sweep.methods], sweep.budgets, sweep.seeds, ["--data.root=D"])
    assert len(arms) == 2 * 2 * (2 + 2 * 10) + 2 * 2
    return {str(arm.folder): arm for arm in arms}


def given(stage: Stage, key: str) -> Any:
    (found,) = (word.partition("=")[2] for word in stage.command if word.startswith(f"--{key}="))
    return yaml.safe_load(found)


def callback(stage: Stage, name: str) -> dict[str, Any]:
    (found,) = (c["init_args"] for c in given(stage, "trainer.callbacks") if c["class_path"].endswith(f".{name}"))
    return found


def executed(stage: Stage) -> float:
    """What a fit spends, read from its command line alone: an independent count."""
    limit = callback(stage, "TrainingCost")["limit"]
    if limit is not None:
        return limit
    network, steps = given(stage, "model.init_args.network"), given(stage, "trainer.max_steps")
    callbacks = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in given(stage, "trainer.callbacks")}
    if "IterativeMagnitudePruner" in callbacks:
        point = int(callbacks["LRRewind"]["to"].removesuffix("st")) if "LRRewind" in callbacks else 0
        steps += callbacks["IterativeMagnitudePruner"]["rounds"] * (steps - point)
    macs = {0.3: 480, 0.1: 121}.get(network["init_args"].get("width"), 1000)
    return 3.0 * macs * 16 * steps


def test_every_arm_may_spend_the_same(tmp_path: Path) -> None:
    arms = arms_of(sweep_of(tmp_path))
    equal = [arm for arm in arms.values() if arm.method.equal == "cost"]
    assert len(equal) == len(arms) - 16
    for arm in equal:
        allowed = {"a": 700, "b": 300}[arm.network.name] * 3 * 1000 * 16
        assert arm.limit == allowed
        assert sum(map(executed, arm.stages)) == pytest.approx(allowed, rel=0.01), arm.label
    for arm in arms.values():
        if arm.method.equal == "steps":
            assert arm.limit is None
            assert given(arm.stages[-1], "trainer.max_steps") == {"a": 700, "b": 300}[arm.network.name]


def test_what_a_cut_is_told(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    arms = arms_of(sweep)
    l1, random, slimming = (arms[f"out/a/seed3/{name}-12.5"] for name in ("l1", "random", "slimming"))
    assert l1.stages[0] == random.stages[0]
    assert str(l1.stages[0].folder) == "out/a/seed3/first"
    assert str(slimming.stages[0].folder) == "out/a/seed3/first-sparsity"
    assert given(l1.stages[0], "trainer.max_steps") == 420
    assert callback(slimming.stages[0], "SlimmingRegularizer") == {"strength": 3e-3}
    last = random.stages[1]
    pruner = callback(last, "ChannelPruner")
    assert (pruner["criterion"], pruner["seed"], pruner["budget"]["init_args"]) == ("random", 3, {"macs": 0.125})
    assert callback(l1.stages[1], "ChannelPruner")["criterion"] == "l1"
    assert given(last, "model.init_args.network")["init_args"] == {
        "network": {"class_path": "x.A", "init_args": {"width": 0.5}},
        "weights": "out/a/seed3/first/checkpoints/last.ckpt",
    }
    assert last.needs == (Path("out/a/seed3/first/checkpoints/last.ckpt"),)
    assert {"--seed_everything=3", "--data.root=D", "--model.lr=0.2"} <= set(last.command)
    assert last.command.count("--config") == 2
    logger = given(last, "trainer.logger")["init_args"]
    assert logger == {"save_dir": "out", "name": "a/seed3", "version": "random-12.5"}
    stages = [stage.folder for _, stage in commands_of(list(arms.values()))]
    assert len(stages) == len(set(stages)) == len(arms) + 2 * 2 * 2
    assert stages.index(slimming.folder) < stages.index(Path("out/a/seed3/scratch-12.5"))


def test_what_rounds_are_told(tmp_path: Path) -> None:
    arms = arms_of(sweep_of(tmp_path))
    pruner = callback(arms["out/a/seed0/imp-12.5"].stages[0], "IterativeMagnitudePruner")
    assert (pruner["rounds"], pruner["fraction"]) == (3, 0.5)
    tune = callback(arms["out/a/seed0/tune-50"].stages[0], "IterativeMagnitudePruner")
    assert tune["rounds"] == 3
    assert (1 - tune["fraction"]) ** 3 == pytest.approx(0.5)
    stage = arms["out/a/seed0/imp-50"].stages[0]
    length = given(stage, "trainer.max_steps")
    for name in ("WeightRewind", "LRRewind"):
        assert int(callback(stage, name)["to"].removesuffix("st")) == pytest.approx(0.1 * length, abs=1.5)


@pytest.mark.parametrize("steps", [50, 299, 700, 1001])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("rewind", [0.0, 0.03, 0.1, 0.5])
def test_rounds_share_the_steps(steps: int, rounds: int, rewind: float) -> None:
    length, point = split_rounds(steps, rounds, rewind)
    assert abs(total_steps(length, rounds, point) - steps) <= (rounds if rewind == 0 else max(1, rounds / 2))
    assert 0 <= point < length
    assert point == pytest.approx(rewind * length, abs=2)


def test_rounds_for_a_budget() -> None:
    assert [rounds_for(b, 0.5) for b in (0.5, 0.25, 0.1, 0.9)] == [1, 2, 3, 1]
    assert (1 - fraction_for(0.1, 3)) ** 3 == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'; choose from .*steps"),
        ({"steps": 0}, "steps: 0: expected a whole number of at least 1"),
        ({"first": 1.0}, r"first: 1.0: expected a share in \(0, 1\)"),
        ({"budgets": [0.5, 0.5]}, "budgets: .*each value once"),
        ({"recipe": "none.yaml"}, "recipe: there is no recipe .*none.yaml"),
        ({"networks": {"a": {"width": 1}}}, "networks.a: class is missing"),
        ({"networks": {"a/b": {}}}, "networks.a/b: a name has letters"),
        ({"methods": {"m": {"kind": "cat"}}}, "methods.m.kind: 'cat': expected one of cut, whole, rounds"),
        ({"methods": {"m": {"kind": "dense", "of": "m"}}}, "methods.m .of kind dense.: unknown key 'of'"),
        ({"methods": {"m": {"kind": "scratch", "of": "z"}}}, "methods.m.of='z': expected a method of kind cut"),
        ({"methods": {"m": {"kind": "narrowed", "equal": "x"}}}, "methods.m.equal: 'x': expected cost or steps"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_where(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "cut", "recipe": "imp.yaml"}, "needs one callback with one budget"),
        ({"kind": "rounds", "recipe": "channels.yaml"}, "needs an IterativeMagnitudePruner"),
        ({"kind": "rounds", "recipe": "tune.yaml", "rewind": 0.1}, "has no WeightRewind or LRRewind"),
        ({"kind": "dense", "set": {"ChannelPruner.criterion": "l2"}}, "ChannelPruner.criterion: .* has no such"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, method: dict[str, Any], message: str) -> None:
    sweep = sweep_of(tmp_path, methods={"m": method})
    with pytest.raises(ConfigError, match=message):
        plan_arms(sweep, {"a": FACTS}, ["a"], ["m"], [0.5], [0])


def test_options_of_the_command() -> None:
    assert joined(["--a", "1", "--b=2", "--c"]) == ["--a=1", "--b=2", "--c"]
    assert chosen("0.25,0.5", [0.5, 0.25, 0.1], "--budgets", float) == [0.5, 0.25]
    with pytest.raises(ConfigError, match="--seeds x: the sweep file has 0, 1"):
        chosen("0,x", [0, 1], "--seeds", int)
    with pytest.raises(ConfigError, match="expected options for every fit"):
        joined(["a"])


def test_what_differs_is_named() -> None:
    there = {"options": {"a": json.dumps({"x": 1})}, "recipes": [{"data": {"size": 3}}]}
    here = {"options": {"a": json.dumps({"x": 1})}, "recipes": [{"data": {"size": 4}}]}
    assert difference(there, here) == "recipes.0.data.size is 3 there, and 4 in this sweep"


def test_a_cut_inside_its_own_training_comes_where_the_first_training_would_end(tmp_path: Path) -> None:
    arm = arms_of(sweep_of(tmp_path))["out/a/seed0/gates-50"]
    (stage,) = arm.stages
    text = " ".join(stage.command)
    assert '"at": "420st"' in text
    assert f'"limit": {arm.limit}' in text
    assert (stage.macs, arm.budget_on) == (arm.limit, "macs")


def test_a_method_may_suit_some_networks_only(tmp_path: Path) -> None:
    found = {arm.network.name for arm in arms_of(sweep_of(tmp_path)).values() if arm.method.name == "only_b"}
    assert found == {"b"}
    with pytest.raises(ConfigError, match=r"methods.m.networks: \['c'\]: expected a list of networks, of a, b"):
        sweep_of(tmp_path, methods={"m": {"kind": "dense", "networks": ["c"]}})
