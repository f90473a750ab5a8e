"""Every wrong input gives one clear error and leaves earlier files as they were."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs

from lightning_prune import (
    ConfigError,
    FileFormatError,
    IterativeMagnitudePruner,
    LRRewind,
    MaskMismatchError,
    PruneError,
    ResumeError,
    SelectionError,
    TicketWriter,
    WeightRewind,
    load_ticket,
)
from lightning_prune.files import check_archive
from tests._helpers.models import ToyModule, loaders, toy_network, trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0: expected the fraction .* in \(0, 1\)"),
        ({"fraction": 1.0}, r"fraction=1.0"),
        ({"fraction": "0.2"}, r"fraction='0.2'"),
        ({"fraction": True}, r"fraction=True"),
        ({"rounds": 0}, r"rounds=0: expected the number of cuts"),
        ({"rounds": 2.5}, r"rounds=2.5"),
        ({"scope": "all"}, r"scope='all' is unknown; choose 'global' or 'layer'"),
        ({"exclude": "fc.weight"}, r"exclude='fc.weight': expected a list"),
        ({"rates": {"fc": 1.5}}, r"rates\['fc'\]=1.5"),
        ({"counting": "open_lht"}, r"counting='open_lht' is unknown.*open_lth"),
        ({"control": "shuffle"}, r"control='shuffle' is unknown"),
        ({"mode": "best"}, r"mode='best' is unknown"),
        ({"round_length": "10"}, r"round_length='10' is not a time"),
        ({"round_length": "10%"}, r"a length is in epochs"),
    ],
)
def test_pruner_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IterativeMagnitudePruner(**options)


@pytest.mark.parametrize("kind", [WeightRewind, LRRewind])
def test_rewinder_arguments(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"\(to\)=3 is not a time"):
        kind(3)
    with pytest.raises(ConfigError, match="beyond the end of training"):
        kind("120%")
    with pytest.raises(ConfigError, match="must be whole"):
        kind("0.5ep")
    with pytest.raises(ConfigError, match="optimizer_state='forget' is unknown"):
        kind("0st", optimizer_state="forget")


def cosine(net: nn.Module, length: int = 8) -> Any:
    optimizer = SGD(net.parameters(), 0.1)
    return [optimizer], [lrs.CosineAnnealingLR(optimizer, length)]


def prune(**options: Any) -> IterativeMagnitudePruner:
    return IterativeMagnitudePruner(**({"fraction": 0.3, "rounds": 2, "verbose": False} | options))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [WeightRewind("0st")], "WeightRewind acts at prune events, and no pruner"),
        (lambda: [LRRewind("0st")], "LRRewind acts at prune events, and no pruner"),
        (lambda: [TicketWriter()], "TicketWriter acts at prune events, and no pruner"),
        (lambda: [prune(), WeightRewind("1ep"), LRRewind("2ep")], r"'1ep'\) and LRRewind\(to='2ep'\) differ"),
        (lambda: [prune(), WeightRewind("4ep")], "rewinding to 4ep, but the first cut comes after 4 epochs, 48 steps"),
        (lambda: [prune(), WeightRewind("48st")], "rewinding to 48st, but the first cut"),
        (lambda: [prune(), WeightRewind("100%")], "rewinding to 100%, but the first cut"),
        (lambda: [prune(exclude=["fc9"])], "exclude: 'fc9' matches no parameter"),
        (lambda: [prune(rates={"fc9": 0.1})], "rates: 'fc9' matches no parameter"),
        (lambda: [prune(exclude=["network"])], "nothing to prune"),
        (lambda: [prune(), LRRewind("0st")], "CosineAnnealingLR is 8 epochs long, one training 4 epochs"),
    ],
)
def test_callbacks_that_cannot_work_together(tmp_path: Path, callbacks: Any, message: str) -> None:
    run = trainer(tmp_path, callbacks(), max_epochs=4)
    with pytest.raises(ConfigError, match=message):
        run.fit(ToyModule(configure=cosine), *loaders())
    assert not list(tmp_path.rglob("record.json"))


def test_two_pruners(tmp_path: Path) -> None:
    class Other(IterativeMagnitudePruner):
        pass

    with pytest.raises(ConfigError, match="two pruners in one trainer"):
        trainer(tmp_path, [prune(), Other()], max_epochs=4).fit(ToyModule(), *loaders())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `IterativeMagnitudePruner`"):
        trainer(tmp_path, [prune(), prune(fraction=0.5)], max_epochs=4)


def test_a_trainer_without_an_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, [prune()], max_epochs=-1)
    with pytest.raises(ConfigError, match="the Trainer has no end"):
        run.fit(ToyModule(), *loaders())


def test_nan_in_the_weights_names_the_tensor(tmp_path: Path) -> None:
    class Broken(ToyModule):
        def on_train_epoch_end(self) -> None:
            with torch.no_grad():
                self.network[4].weight[0, 0] = float("nan")

    run = trainer(tmp_path, [prune()], max_epochs=1)
    with pytest.raises(SelectionError, match=r"network\.4\.weight"):
        run.fit(Broken(), *loaders())


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_used_run_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    def fit() -> None:
        logger = CSVLogger(tmp_path, name="run", version="same")
        trainer(tmp_path, [prune()], max_epochs=1, logger=logger).fit(ToyModule(), *loaders())

    fit()
    record = (tmp_path / "run" / "same" / "record.json").read_bytes()
    with pytest.raises(ConfigError, match="is the record of an earlier run"):
        fit()
    assert (tmp_path / "run" / "same" / "record.json").read_bytes() == record


def checkpointed(folder: Path, **options: Any) -> Path:
    saver = ModelCheckpoint(folder / "ckpt", save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    run = trainer(folder, [prune(**options), WeightRewind("0st"), saver], max_epochs=2, enable_checkpointing=True)
    run.fit(ToyModule(), *loaders())
    return sorted((folder / "ckpt").glob("*.ckpt"))[2]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    file = checkpointed(tmp_path)
    run = trainer(tmp_path / "b", [prune(fraction=0.5), WeightRewind("0st")], max_epochs=2)
    with pytest.raises(ResumeError, match=r"written with fraction=0.3, this run has fraction=0.5"):
        run.fit(ToyModule(), *loaders(), ckpt_path=file)
    run = trainer(tmp_path / "c", [prune(rounds=1), WeightRewind("1st")], max_epochs=2)
    with pytest.raises(ResumeError, match=r"WeightRewind\(to='0st'\), this run has WeightRewind\(to='1st'\)"):
        run.fit(ToyModule(), *loaders(), ckpt_path=file)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_with_one_changed_weight(tmp_path: Path) -> None:
    """Which torch and Lightning load without a word."""
    file = checkpointed(tmp_path)
    weight = torch.load(file, weights_only=True)["state_dict"]["network.0.weight"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(weight) + 3] ^= 0x40
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["state_dict"]["network.0.weight"].numpy().tobytes() != weight
    run = trainer(tmp_path / "b", [prune(), WeightRewind("0st")], max_epochs=2)
    with pytest.raises(FileFormatError, match=r"ckpt is damaged.* CRC-32 .*Use an earlier checkpoint"):
        run.fit(ToyModule(), *loaders(), ckpt_path=file)


def test_a_checkpoint_written_without_checksums_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "plain.ckpt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.rand(5)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(file) as archive:
        assert {record.CRC for record in archive.infolist()} == {0}
    check_archive(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FileFormatError, match="is damaged"):
        check_archive(file)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:.*holds no resume state")
def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}")
    dense = trainer(tmp_path, [saver], max_epochs=1, enable_checkpointing=True)
    dense.fit(ToyModule(), *loaders())
    run = trainer(tmp_path / "b", [prune()], max_epochs=2)
    with pytest.raises(ResumeError, match="written without IterativeMagnitudePruner"):
        run.fit(ToyModule(), *loaders(), ckpt_path=saver.best_model_path)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    file = checkpointed(tmp_path)
    wider = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 3))
    run = trainer(tmp_path / "b", [prune(), WeightRewind("0st")], max_epochs=2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.fit(ToyModule(wider), *loaders(), ckpt_path=file)


def test_a_damaged_ticket_and_a_ticket_for_another_network(tmp_path: Path) -> None:
    run = trainer(tmp_path, [prune(), WeightRewind("0st"), TicketWriter()], max_epochs=1)
    run.fit(ToyModule(), *loaders())
    path = tmp_path / "run" / "version_0" / "tickets" / "round-01.safetensors"
    with pytest.raises(MaskMismatchError, match="network"):
        load_ticket(path).apply_(toy_network())
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(FileFormatError, match=r"round-01\.safetensors"):
        load_ticket(path)
    again = trainer(tmp_path / "b", [prune(masks_from=tmp_path / "run" / "version_0")], max_epochs=1)
    with pytest.raises(FileFormatError, match=r"round-01\.safetensors"):
        again.fit(ToyModule(), *loaders())
    missing = trainer(tmp_path / "c", [prune(masks_from=tmp_path / "nowhere")], max_epochs=1)
    with pytest.raises(FileFormatError, match="does not exist"):
        missing.fit(ToyModule(), *loaders())


def test_full_disk_while_a_ticket_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full(self: Path, data: bytes) -> int:
        written.append(self)
        raise OSError(28, "No space left on device")

    run = trainer(tmp_path, [prune(), WeightRewind("0st"), TicketWriter()], max_epochs=1)
    monkeypatch.setattr(
        "lightning_prune.files.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises((PruneError, OSError), match="No space left"):
        run.fit(ToyModule(), *loaders())
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.tmp"))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lightning_prune.cli", "fit", "--config", str(ROOT / "recipes" / "quickstart.yaml")]
    return subprocess.run([*line, *arguments], cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epohcs", "3"], "max_epohcs"),
        (["--data", "MNIST", "--data.root", "nowhere"], "nowhere"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--trainer.callbacks.init_args.dirpat", "x"], "dirpat"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_page_of_traceback(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize(
    ("was", "wrong", "message"),
    [
        ("rounds: 6", "rounds: six", """Parser key "rounds": Expected a <class 'int'>. Got value: six"""),
        ("rounds: 6", "round: 6", "IterativeMagnitudePruner': Option 'round' is not accepted"),
        ("fraction: 0.3", "fraction: 1.3", "ConfigError: fraction=1.3: expected the fraction"),
        pytest.param("to: 10%", "to: 150%", "WeightRewind(to)='150%'", marks=pytest.mark.slow),
        pytest.param("Pruner\n", "Prunner\n", "no attribute 'IterativeMagnitudePrunner'", marks=pytest.mark.slow),
        ("SmallConvNet", "SmallCovNet", "SmallCovNet"),
    ],
)
def test_a_wrong_value_in_a_recipe_is_named_in_a_few_lines(tmp_path: Path, was: str, wrong: str, message: str) -> None:
    text = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert was in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace(was, wrong), encoding="utf-8")
    line = [sys.executable, "-m", "lightning_prune.cli", "fit", "--config", str(recipe)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode in (1, 2)
    said = done.stderr.replace("Seed set to 0\n", "")
    assert message in said
    assert len(said) < 700
    assert not list(tmp_path.rglob("record.json"))


def test_the_command_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    done = command(tmp_path, "--ckpt_path", "bad.ckpt")
    assert done.returncode != 0
    assert "bad.ckpt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_where_parameters_lie_are_refused(kind: type) -> None:
    hidden = type("Trainer", (), {"strategy": kind.__new__(kind)})()
    message = rf"{kind.__name__} holds parameters in a form of its own, among which.*or ModelParallelStrategy \(FSDP2"
    with pytest.raises(ConfigError, match=message):
        prune().make_schedule(hidden)
