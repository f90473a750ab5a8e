"""A recipe that removes channels, from the command line: fit, then resumed and tested from its checkpoint."""

from pathlib import Path

import pytest
import yaml

from lightning_prune import RunRecord, load_compact
from lightning_prune.cli import main
from lightning_prune.experiments import SmallConvNet
from tests._helpers.channels import widths

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:The dirpath has changed")
def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-prune"])
    recipe = yaml.safe_load(RECIPE.read_text())
    budgets = [{"macs": 0.6}, {"macs": 0.3}]
    recipe["trainer"]["max_epochs"] = 2
    recipe["trainer"]["enable_progress_bar"] = recipe["trainer"]["enable_model_summary"] = False
    options = {"criterion": "taylor", "budget": budgets, "at": ["1ep", "100%"], "module": "network"}
    recipe["trainer"]["callbacks"][:4] = [
        {"class_path": "ChannelPruner", "init_args": options},
        {"class_path": "LRRewind"},
    ]
    Path("channels.yaml").write_text(yaml.safe_dump(recipe))
    main(["fit", "--config", "channels.yaml"])
    out = capsys.readouterr().out
    assert "the compact network     compact.safetensors" in out
    assert "after the last round: test_acc" in out
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    record = RunRecord.read(folder)
    assert [row.costs["macs"][0] / row.costs["macs"][1] for row in record.rounds] == pytest.approx(
        [1, 0.6, 0.3], abs=0.05
    )
    assert record.method["ChannelPruner"]["budgets"] == budgets
    assert record.task["recipe"] == "channels.yaml"
    assert (record.task["networks"], record.task["data"]) == ("SmallConvNet", "Digits")
    network = load_compact(SmallConvNet(), folder / "compact.safetensors")
    assert len(record.rounds[-1].per_layer) > 2
    assert sum(kept for kept, _ in record.rounds[-1].per_layer.values()) == sum(widths(network)[:-1])
    last = str(folder / "checkpoints" / "last.ckpt")
    main(["test", "--config", "channels.yaml", "--ckpt_path", last])
    assert f"{record.final['test_acc']:.4f}"[:5] in capsys.readouterr().out
