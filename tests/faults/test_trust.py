"""A recipe imports nothing that is not allowed or trusted, and none is too large to read."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from jsonargparse._common import parsing_settings

from lightning_prune import recipes
from lightning_prune.cli import main
from lightning_prune.errors import ConfigError, FileFormatError
from lightning_prune.recipes import ALLOWED, parse_yaml, reading, split_trust

ROOT = Path(__file__).parents[2]
PAYLOAD = """
from pathlib import Path
from torch import nn
from lightning.pytorch import Callback
Path({marker!r}).touch()

class Net(nn.Linear):
    def __init__(self): super().__init__(4, 2)

class Watch(Callback): ...

def rate(step): return 1.0
"""


@pytest.fixture(autouse=True)
def _one_set_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where the program has arguments of its own."""
    monkeypatch.setattr("sys.argv", ["lightning-prune"])


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that appears when the module ``downloaded_thing`` is imported; it lies on the import path."""
    path = tmp_path / "imported"
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "downloaded_thing.py").write_text(PAYLOAD.format(marker=str(path)))
    monkeypatch.syspath_prepend(folder)
    yield path
    sys.modules.pop("downloaded_thing", None)


def recipe(folder: Path, **parts: Any) -> Path:
    content = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    content["trainer"] |= {"max_epochs": 1, "fast_dev_run": 1, "enable_progress_bar": False}
    for key, value in parts.items():
        content["model"]["init_args"] |= {key: value} if key in ("network", "optimizer", "scheduler") else {}
        content["trainer"] |= {key: value} if key in ("callbacks", "logger", "plugins", "strategy", "profiler") else {}
        content |= {key: value} if key in ("data", "trust", "ckpt_path") else {}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def refused(path: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    """What the command says of a recipe that it does not read."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), *words])
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr().err
    assert len(said) < 1500
    return said


NAMED = {
    "network": {"class_path": "downloaded_thing.Net"},
    "data": {"class_path": "downloaded_thing.Net"},
    "optimizer": {"class_path": "downloaded_thing.Net"},
    "scheduler": "downloaded_thing.rate",
    "callbacks": [{"class_path": "lightning_prune.TicketWriter"}, {"class_path": "downloaded_thing.Watch"}],
    "logger": {"class_path": "downloaded_thing.Net"},
    "plugins": [{"class_path": "downloaded_thing.Net"}],
    "strategy": {"class_path": "downloaded_thing.Net"},
}


@pytest.mark.parametrize("place", NAMED)
def test_what_a_recipe_names_is_not_imported(
    place: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refused(recipe(tmp_path, **{place: NAMED[place]}), capsys)
    assert "downloaded_thing." in said
    assert "nothing of it was imported" in said
    assert "--trust downloaded_thing" in said
    assert not marker.exists()
    assert "downloaded_thing" not in sys.modules


def test_trust_lets_it_in(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture) -> None:
    path = recipe(tmp_path, callbacks=[{"class_path": "downloaded_thing.Watch"}])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--trust", "downloaded_thing", "--config", str(path), "--print_config"])
    assert not stopped.value.code
    assert "downloaded_thing.Watch" in capsys.readouterr().out
    assert marker.exists()  # otherwise nothing here could have been seen


def test_a_module_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in the working directory when it is trusted, behind everything that is installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_thing.py").write_text("from lightning.pytorch import Callback\nclass Mine(Callback): ...\n")
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the wrong yaml')")
    before = list(sys.path)
    path = recipe(tmp_path, callbacks=[{"class_path": "my_thing.Mine"}])
    with pytest.raises(SystemExit) as stopped:
        main(["--trust=my_thing", "fit", "--config", str(path), "--print_config"])
    assert not stopped.value.code
    assert sys.modules.pop("my_thing").Mine
    assert sys.path == before


def test_a_recipe_cannot_trust_itself(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(recipe(tmp_path, trust=["downloaded_thing"], network={"class_path": "downloaded_thing.Net"}), capsys)
    assert not marker.exists()
    assert "downloaded_thing" in said or "trust" in said


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.os.system",
        "torch.nn.modules.module.warnings.warn",
        "torch.hub.load",
        "torch.load",
        "torch.ops.load_library",
        "torch.utils.cpp_extension.load",
        "torch.utils.data.datapipes.iter.FileOpener",
        "torchvision.datasets.utils.extract_archive",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher",
        "lightning_prune.cli.main",
        "lightning_prune.commands.target.subprocess",
        "builtins.exec",
        "jsonargparse.set_parsing_settings",
        "pickle.loads",
    ],
)
@pytest.mark.parametrize("place", ["callable", "any", "class"])
def test_names_that_are_refused_wherever_they_stand(name: str, place: str) -> None:
    kinds = {"callable": Callable, "any": Any, "class": type}
    with reading():
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=kinds[place])
        if place != "any":
            with pytest.raises(jsonargparse.ArgumentError, match=r"not allowed"):
                parser.parse_object({"value": name})
            return
        parsed = parser.instantiate_classes(parser.parse_object({"value": {"class_path": name}}))
        assert parsed.value in ({"class_path": name}, jsonargparse.Namespace(class_path=name))  # data, nothing else


@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.optim.SGD", "torch.optim.lr_scheduler.StepLR"])
def test_names_that_are_allowed(name: str) -> None:
    with reading():
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=type)
        assert parser.parse_object({"value": name}).value.__module__.startswith(ALLOWED)


def test_the_policy_ends_with_the_command() -> None:
    before = dict(parsing_settings)
    loader = jsonargparse.get_loader("yaml")

    def fail() -> None:
        assert recipes.trusted() == ("my_package",)
        assert parsing_settings["import_paths_enforced"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), reading(["my_package"]):
        fail()
    assert parsing_settings == before
    assert jsonargparse.get_loader("yaml") is loader
    assert recipes.trusted() == ()


@pytest.mark.parametrize("words", [["--trust"], ["--trust", ""], ["--trust", "../x"], ["--trust=jsonargparse"]])
def test_wrong_words_after_trust(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--trust .*: expected names of packages or modules"):
        split_trust(words)


def test_trust_is_taken_out_wherever_it_stands() -> None:
    names, rest = split_trust(["--trust", "a,b.c", "fit", "--trust=d", "--config", "x.yaml"])
    assert names == ["a", "b.c", "d"]
    assert rest == ["fit", "--config", "x.yaml"]


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BOMBS = {
    "aliases that multiply": LAUGHS,
    "an alias within itself": "a: &a [1, *a]",
    "deep lists": "[" * 1000 + "]" * 1000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(200)),
    "long": "#" * (recipes.MAX_BYTES + 1),
    "many": "[" + "1," * (recipes.MAX_NODES + 1) + "]",
    "python object": "!!python/object/apply:os.mkdir ['exploded']",
    "python name": "!!python/name:os.system",
    "a number of many digits": "a: " + "1" * 10_000,
    "no YAML": "a: [1, }",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.timeout(20)
def test_yaml_that_explodes(bomb: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileFormatError, match="this is no YAML of plain values"):
        parse_yaml(BOMBS[bomb])
    (tmp_path / "bomb.yaml").write_text(BOMBS[bomb])
    if bomb not in ("aliases that multiply", "deep lists", "python object", "a number of many digits"):
        return
    for config in (tmp_path / "bomb.yaml", recipe(tmp_path, network="bomb.yaml")):  # also where a recipe names a file
        assert refused(config, capsys).strip()
    assert not (tmp_path / "exploded").exists()


def test_plain_yaml_is_read() -> None:
    assert parse_yaml("a: &x {b: [1, 2]}\nc: *x") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_checkpoints_that_may_run_code_are_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(recipe(tmp_path), capsys, "--weights_only=false")
    assert "would let a checkpoint run code" in said


def test_shipped_recipes_name_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    paths = sorted((ROOT / "recipes").rglob("*.yaml"))
    names = {
        line.split("class_path:")[1].strip()
        for path in paths
        for line in path.read_text().splitlines()
        if "class_path:" in line
    }
    assert len(names) > 20
    assert all(name.startswith(tuple(f"{entry}." for entry in ALLOWED)) for name in names)
