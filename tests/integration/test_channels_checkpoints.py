"""Checkpoints of compact networks: they load into fresh modules, with a Trainer and without one, or say why not."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import (
    Budget,
    ConfigError,
    FileFormatError,
    MaskMismatchError,
    compact,
    load_compact,
    load_compact_checkpoint,
    plan_removal,
    trace_channels,
)
from lightning_prune.callbacks.plans import KEY
from tests._helpers.channels import pruner, wide_network, widths
from tests._helpers.models import ToyModule, loaders, trainer


class Wide(ToyModule):
    """A user's module that is built from a hyper-parameter and has checkpoint hooks of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(wide_network(dropout=dropout))
        self.save_hyperparameters()
        self.seen: list[str] = []

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network(batch[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append(f"mine {checkpoint['mine']}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.Trainer, Wide, Path]:
    """A fit with two cuts, its best checkpoint of every round."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    saver = ModelCheckpoint(folder / "ckpt", monitor="val_acc", mode="max")
    fitted = trainer(folder, [pruner(at=["1ep", "2ep"]), saver], max_epochs=3, enable_checkpointing=True)
    module = Wide(dropout=0.1)
    fitted.fit(module, *loaders())
    fitted.save_checkpoint(folder / "after.ckpt")
    fitted.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return fitted, module, folder


def test_the_best_of_every_round_is_kept(run: tuple[pl.Trainer, Wide, Path]) -> None:
    fitted, _, folder = run
    files = sorted(p.name for p in (folder / "ckpt").iterdir())
    assert [name[-len("round00.ckpt") :] for name in files] == ["round00.ckpt", "round01.ckpt", "round02.ckpt"]
    assert fitted.checkpoint_callback.best_model_path.endswith("round02.ckpt")
    found = [widths(load_compact_checkpoint(Wide, path)) for path in sorted((folder / "ckpt").iterdir())]
    assert found == [[16, 16, 3], [11, 11, 3], [8, 8, 3]]


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("which", ["best", "after.ckpt", "weights.ckpt"])
def test_a_fresh_module_takes_a_compact_checkpoint(run: tuple[pl.Trainer, Wide, Path], stage: str, which: str) -> None:
    fitted, module, folder = run
    path = fitted.checkpoint_callback.best_model_path if which == "best" else folder / which
    fresh = Wide()
    saver = ModelCheckpoint(
        folder / "ckpt", monitor="val_acc", mode="max"
    )  # Lightning asks for every callback of the checkpoint
    evaluated = trainer(folder / "test", [pruner(at=["1ep", "2ep"]), saver], enable_checkpointing=True)
    result = getattr(evaluated, stage)(fresh, loaders()[1], ckpt_path=path)
    assert widths(fresh) == [8, 8, 3]
    assert fresh.seen == ["mine 7"]
    for (name, one), other in zip(fresh.state_dict().items(), torch.load(path)["state_dict"].values(), strict=True):
        assert torch.equal(one, other), name
    if stage == "predict" and which != "best":
        module.eval()
        assert torch.equal(torch.cat(result), torch.cat([module.network(x) for x, _ in loaders()[1]]))
    assert "on_load_checkpoint" not in vars(fresh)


def test_the_trainer_that_fitted_tests_its_own(run: tuple[pl.Trainer, Wide, Path]) -> None:
    fitted, module, folder = run
    copied = copy.deepcopy(module)
    fitted.test(copied, loaders()[1], ckpt_path=folder / "after.ckpt", verbose=False)
    assert widths(copied) == [8, 8, 3]
    first = min((folder / "ckpt").iterdir())
    with pytest.raises(MaskMismatchError, match=r"network has lost channels already, in 2 cuts.*after 0 cuts"):
        fitted.test(copied, loaders()[1], ckpt_path=first, verbose=False)


def test_a_compact_module_says_so_in_later_checkpoints(run: tuple[pl.Trainer, Wide, Path], tmp_path: Path) -> None:
    """Trained on by another trainer without the callback, and pickled in between."""
    module = copy.deepcopy(run[1])
    module.configure = None  # a function of the test's
    module = pickle.loads(pickle.dumps(module))
    module.configure = lambda net: torch.optim.SGD(net.parameters(), 0.01)
    later = trainer(tmp_path, [], max_epochs=1)
    later.fit(module.train(), *loaders())
    later.save_checkpoint(tmp_path / "later.ckpt")
    loaded = load_compact_checkpoint(Wide(), tmp_path / "later.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))


def test_the_file_at_the_end_loads_without_lightning(run: tuple[pl.Trainer, Wide, Path]) -> None:
    _, module, folder = run
    (path,) = folder.rglob("compact.safetensors")
    network = load_compact(wide_network(), path).eval()
    x = torch.randn(5, 12)
    assert torch.equal(network(x), module.eval().network(x))


def test_the_loader_builds_from_hyper_parameters(run: tuple[pl.Trainer, Wide, Path]) -> None:
    _, module, folder = run
    loaded = load_compact_checkpoint(Wide, folder / "after.ckpt")
    assert type(loaded) is Wide
    assert loaded.hparams.dropout == loaded.network[3].p == 0.1
    assert loaded.seen == ["mine 7"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
    other = load_compact_checkpoint(Wide, folder / "weights.ckpt", dropout=0.3)
    assert other.network[3].p == 0.3
    with pytest.raises(ConfigError, match="dropout: constructor arguments go with a class"):
        load_compact_checkpoint(Wide(), folder / "after.ckpt", dropout=0.3)


def test_lightning_alone_cannot(run: tuple[pl.Trainer, Wide, Path]) -> None:
    """What the loader is for."""
    with pytest.raises(RuntimeError, match="size mismatch"):
        Wide.load_from_checkpoint(run[2] / "after.ckpt")


class Other(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


class Renamed(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = wide_network()

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise AssertionError("nothing is tested")


class More(Wide):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.extra = nn.Linear(2, 2)


def change(folder: Path, tmp_path: Path, function: Any) -> Path:
    checkpoint = torch.load(folder / "after.ckpt", weights_only=True)
    function(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def test_what_does_not_fit_is_refused(run: tuple[pl.Trainer, Wide, Path], tmp_path: Path) -> None:
    after = run[2] / "after.ckpt"
    with pytest.raises(MaskMismatchError, match=r"0.weight has shape \(20, 12\), the plan expects \(16, 12\)"):
        load_compact_checkpoint(Other(), after)
    with pytest.raises(MaskMismatchError, match=r"removal plan for 'network', which this Renamed does not have"):
        load_compact_checkpoint(Renamed(), after)
    with pytest.raises(MaskMismatchError, match=r"does not fit: .*extra.weight"):
        load_compact_checkpoint(More(), after)
    cut = wide_network()
    x = torch.randn(2, 12)
    compact(cut, plan_removal(trace_channels(cut, x), Budget(channels=0.25)), x)
    module = Wide()
    module.network = cut
    with pytest.raises(MaskMismatchError, match="network has lost channels already, in 1 cuts"):
        load_compact_checkpoint(module, after)
    evaluated = trainer(tmp_path, [pruner(at=["1ep", "2ep"])])
    with pytest.raises(MaskMismatchError, match="removal plan for 'network'"):
        evaluated.test(Renamed(), loaders()[1], ckpt_path=after)


def test_files_that_cannot_be_read_are_refused(run: tuple[pl.Trainer, Wide, Path], tmp_path: Path) -> None:
    folder = run[2]
    with pytest.raises(FileFormatError, match=r"nowhere.ckpt does not exist"):
        load_compact_checkpoint(Wide, folder / "nowhere.ckpt")
    data = (folder / "after.ckpt").read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("text", b"no checkpoint"), ("empty", b"")):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=f"{name}.ckpt"):
            load_compact_checkpoint(Wide, path)
    torch.save({"a": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(FileFormatError, match="has no state_dict"):
        load_compact_checkpoint(Wide, tmp_path / "foreign.ckpt")
    with pytest.raises(FileFormatError, match=r"holds no removal plans.*load_from_checkpoint"):
        load_compact_checkpoint(Wide, change(folder, tmp_path, lambda c: c.pop(KEY)))
    with pytest.raises(FileFormatError, match=r"plans of version 99.*upgrade lightning-prune"):
        load_compact_checkpoint(Wide, change(folder, tmp_path, lambda c: c[KEY].update(version=99)))
    with pytest.raises(FileFormatError, match="the plan has version 99"):
        load_compact_checkpoint(
            Wide, change(folder, tmp_path, lambda c: c[KEY]["plans"]["network"][0].update(version=99))
        )
    with pytest.raises(FileFormatError, match="its removal plans are damaged"):
        load_compact_checkpoint(Wide, change(folder, tmp_path, lambda c: c[KEY].pop("plans")))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_no_code_in_a_file_runs(
    run: tuple[pl.Trainer, Wide, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = change(run[2], tmp_path, lambda c: c.update(evil=Evil()))
    with pytest.raises(FileFormatError, match="without running code"):
        load_compact_checkpoint(Wide, path)
    assert "code ran" not in capsys.readouterr().out
    path = change(run[2], tmp_path, lambda c: c["hyper_parameters"].update(_instantiator="os.system"))
    with pytest.raises(Exception, match=r"_instantiator|allowlist"):
        load_compact_checkpoint(Wide, path)
