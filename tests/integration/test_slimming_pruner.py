"""Network slimming's cuts: the authors' threshold recounted in NumPy, floor and cap, passes, budgets, what is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_prune import (
    Budget,
    BudgetError,
    ConfigError,
    LRRewind,
    SlimmingPruner,
    SlimmingRegularizer,
    load_compact,
    trace_channels,
)
from tests._helpers.channels import Residual, Watch, images
from tests._helpers.models import ToyModule, trainer
from tests._helpers.resuming import Case, check_moved, check_resumed
from tests._helpers.resuming import fit as resuming_fit
from tests.integration.test_resume_fits import per_epoch

NOT_SEPARATED = pytest.mark.filterwarnings("ignore:the scales have not separated")


class Plain(nn.Module):
    """Three convolutions with BatchNorm, 12, 10 and 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 12), (12, 10), (10, 8)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(1)
        for scale in self.scales():
            nn.init.normal_(scale, generator=generator)

    def scales(self) -> list[nn.Parameter]:
        return [m.weight for m in self.features if isinstance(m, nn.BatchNorm2d)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def still(network: nn.Module) -> ToyModule:
    """Trains at a rate of 0, so that a cut sees the scales that were set."""
    return ToyModule(network, lambda m: SGD(m.parameters(), 0.0))


def cut(tmp_path: Path, network: nn.Module, *args: Any, **options: Any) -> SlimmingPruner:
    prune = SlimmingPruner(*args, **({"verbose": False} | options))
    trainer(tmp_path, [prune], max_epochs=2).fit(still(network), *images())
    return prune


def reference(scales: list[np.ndarray], percent: float, floor: int = 1, cap: float = 1.0) -> list[int]:
    """The authors' rule: the value at place int(total * percent) of all sorted scales; what lies above it stays."""
    pool = np.sort(np.concatenate(scales))
    threshold = pool[int(len(pool) * percent)]
    return [min(len(s), max(int((s > threshold).sum()), floor, len(s) - int(len(s) * cap + 1e-9))) for s in scales]


def absolute(network: Plain) -> list[np.ndarray]:
    return [scale.detach().abs().numpy().copy() for scale in network.scales()]


@NOT_SEPARATED
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, 1.0])
def test_the_authors_threshold(tmp_path: Path, kept: float) -> None:
    network = Plain()
    before = absolute(network)
    cut(tmp_path, network, Budget(channels=kept), "1ep", "network_slimming")
    expected = reference(before, round(1 - kept, 9))
    assert [len(s) for s in network.scales()] == expected
    assert sum(expected) == 30 - int(30 * round(1 - kept, 9)) - 1  # one more than asked for
    for scale, old, count in zip(network.scales(), before, expected, strict=True):
        assert np.array_equal(scale.detach().abs().numpy(), old[np.sort(np.argsort(-old)[:count])])


@NOT_SEPARATED
def test_all_that_tie_with_the_authors_threshold_leave(tmp_path: Path) -> None:
    network = Plain()
    with torch.no_grad():
        for scale in network.scales():
            scale[::2] = 0.01  # 15 of 30
    cut(tmp_path, network, Budget(channels=0.7), "1ep", "network_slimming")
    assert [len(s) for s in network.scales()] == [6, 5, 4]


@NOT_SEPARATED
def test_two_passes_take_half_of_what_is_left_and_half_of_a_layer_at_most(tmp_path: Path) -> None:
    network = Plain()
    with torch.no_grad():
        network.scales()[0].mul_(0.05)  # the first layer alone would be emptied
    scales = absolute(network)
    budgets = [Budget(channels=0.5), Budget(channels=0.25)]
    seen: list[list[int]] = []

    class Seen(Watch):
        def on_prune(self, trainer: Any, pl_module: Any, event: Any) -> None:
            seen.append([len(s) for s in network.scales()])

    prune = SlimmingPruner(
        budgets, ["1ep", "2ep"], "network_slimming", max_layer_fraction=0.5, min_channels=4, verbose=False
    )
    trainer(tmp_path, [prune, LRRewind("0st"), Seen(moving=False)], max_epochs=2).fit(still(network), *images())
    for widths in seen:
        expected = reference(scales, 0.5, floor=4, cap=0.5)
        assert widths == expected
        scales = [np.sort(s)[len(s) - n :] for s, n in zip(scales, expected, strict=True)]
    assert seen[0][0] == 6
    assert seen[1][0] == 4  # the floor; half would be 3


@NOT_SEPARATED
@pytest.mark.parametrize("budget", [Budget(channels=0.41), Budget(params=0.3), Budget(macs=0.37)])
@pytest.mark.parametrize("cap", [1.0, 0.7])
def test_budgets_are_met_from_below_by_the_smallest_scales(tmp_path: Path, budget: Budget, cap: float) -> None:
    network = Plain()
    before = absolute(network)
    prune = cut(tmp_path, network, budget, "1ep", max_layer_fraction=cap)
    now, whole = prune.counts()["costs"][budget.what]
    assert now <= budget.fraction * whole
    widths = [len(s) for s in network.scales()]
    removed = [np.sort(s)[: len(s) - n] for s, n in zip(before, widths, strict=True)]
    kept = [np.sort(s)[len(s) - n :] for s, n in zip(before, widths, strict=True)]
    assert all(len(r) <= cap * len(s) for r, s in zip(removed, before, strict=True))
    free = [k for k, r, s in zip(kept, removed, before, strict=True) if len(r) + 1 <= cap * len(s)]
    assert np.concatenate(removed).max() < np.concatenate(free).min()  # one threshold, where no cap holds
    last = int(np.argmax([r.max() if len(r) else -1 for r in removed]))
    graph = trace_channels(Plain(), torch.zeros(2, 1, 6, 6))
    from lightning_prune.channels.budget import CostModel

    widths[last] += 1  # taking the last channel back exceeds the budget
    assert CostModel(graph).cost(budget.what, np.array(widths)) > budget.fraction * whole


def test_a_cap_that_cannot_meet_the_budget_is_said(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="max_layer_fraction"):
        cut(tmp_path, Plain(), Budget(channels=0.4), "1ep", max_layer_fraction=0.5)


@NOT_SEPARATED
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_scales_of_a_residual_stage_are_judged_together(tmp_path: Path, reduction: Any) -> None:
    network = Residual()
    with torch.no_grad():
        network.bn.weight.copy_(torch.tensor([1.0, 9, 2, 2, 9, 9, 9, 9]))
        network.bn_b.weight.copy_(torch.tensor([-7.0, 1, 3, 3, 9, 9, 9, 9]))  # mean: 4 5 2.5; max: 7 9 3
        network.bn_a.weight.copy_(torch.tensor([6.0, 6, 6, 6, 6, 6, 6, 6]))
    stem = network.stem.weight.detach().clone()
    cut(tmp_path, network, Budget(channels=13 / 16 if reduction == "max" else 12 / 16), "1ep", reduction=reduction)
    # mean: 2.5, 2.5, 4, 5 leave before 6; max: 3, 3 leave, then one of the 6s
    gone = {0, 1, 2, 3} if reduction == "mean" else {2, 3}
    assert torch.equal(network.stem.weight, stem[[i for i in range(8) if i not in gone]])
    assert len(network.bn_a.weight) == (8 if reduction == "mean" else 7)


def test_the_whole_method_in_one_fit(tmp_path: Path) -> None:
    """Sparsity training, two cuts, fine-tuning: smaller, separated, logged, and loaded without a callback."""
    torch.manual_seed(0)
    network = Plain()
    for scale in network.scales():
        nn.init.constant_(scale, 0.5)
    module = ToyModule(network, lambda m: SGD(m.parameters(), 0.05, momentum=0.9))
    watch = Watch(moving=False)
    penalise = SlimmingRegularizer(0.05)
    prune = SlimmingPruner(Budget(channels=0.5), ["15ep", "15ep"], verbose=False)
    run = trainer(tmp_path, [penalise, prune, LRRewind("0st"), watch], max_epochs=15)
    run.fit(module, *images())
    assert run.current_epoch == 45
    assert [event.density for event in watch.events] == [21 / 30, 0.5]
    assert [r.unit for r in prune._recorder.record.rounds] == ["channels"] * 3
    fresh = Plain()
    load_compact(fresh, prune.folder / "compact.safetensors")
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(fresh.eval()(x), network.eval()(x))
    logged = (Path(run.logger.log_dir) / "metrics.csv").read_text()
    assert "prune/scale_norm_correlation" in logged
    assert "prune/scales_near_zero" in logged
    assert all(-1 <= value <= 1 for value in prune.correlation.values())
    assert len(prune.correlation) == 3


def test_scales_that_have_not_separated_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="15 of 30 channels leave, but only 0 scales lie below 1 %"):
        cut(tmp_path, Plain(), Budget(channels=0.5), "1ep")
    network = Plain()
    with torch.no_grad():
        for scale in network.scales():
            scale[:4] *= 1e-4
    cut(tmp_path / "separated", network, Budget(channels=0.6), "1ep")  # warnings are errors here


@NOT_SEPARATED
def test_every_checkpoint_resumes(tmp_path: Path) -> None:
    def owners() -> list[Any]:
        prune = SlimmingPruner(Budget(channels=0.4), ["1ep", "2ep"], module="network", verbose=False)
        penalise = SlimmingRegularizer(0.01, coupled="group", module="network")
        return [penalise, prune, LRRewind("0st")]

    case = Case("slimming", per_epoch)
    full = resuming_fit(case, tmp_path, owners=owners())
    moved = []
    for saved in full.saved[:-1:3]:
        resumed = resuming_fit(case, tmp_path / "resumed", seeded=99, checkpoint=saved.path, hooks=(), owners=owners())
        check_resumed(full, resumed, saved)
        moved.append(check_moved(full, saved))
    assert any(moved)
    assert full.saved[0].weights.numel() > full.weights.numel()


def test_networks_without_scales_are_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ConfigError, match="passes a BatchNorm with a scale"):
        cut(tmp_path, network, Budget(channels=0.5), "1ep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counting": "round"}, "counting='round' is unknown"),
        ({"max_layer_fraction": 0}, r"max_layer_fraction=0 must lie in \(0, 1\]"),
        ({"max_layer_fraction": 1.5}, "max_layer_fraction=1.5"),
        ({"reduction": "sum"}, "reduction='sum' is unknown"),
        ({"counting": "network_slimming", "budget": Budget(macs=0.5)}, "give Budget\\(channels"),
        ({"counting": "network_slimming", "round_to": 8}, "no round_to"),
        ({"min_channels": 0}, "min_channels=0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlimmingPruner(**({"budget": Budget(channels=0.5), "at": "1ep"} | options))


def test_what_the_user_gave_is_in_the_record() -> None:
    found = SlimmingPruner(Budget(channels=0.5), "1ep", max_layer_fraction=0.5).hyper_parameters()
    assert found["counting"] == "exact"
    assert found["max_layer_fraction"] == 0.5
    assert found["budgets"] == [{"channels": 0.5}]
