from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_prune.checkpoint import Ticket, load_ticket, save_ticket
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.masks import MaskSet


class Tied(nn.Module):
    """Two names for one weight, a persistent buffer and one that is not."""

    def __init__(self, width: int = 6, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 4, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(1), persistent=False)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    net[1].running_mean.uniform_()
    net[1].num_batches_tracked.fill_(7)
    return net


def ticket_of(module: nn.Module, **info: Any) -> Ticket:
    masks = MaskSet({n: torch.rand_like(p) > 0.5 for n, p in module.named_parameters() if p.dim() > 1})
    return Ticket(masks, {n: t.clone() for n, t in module.state_dict().items()}, info)


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    ticket = ticket_of(network(), round=3, density=0.5, rewound_to_step=10)
    save_ticket(tmp_path / "tickets" / "t", ticket)
    loaded = load_ticket(tmp_path / "tickets" / "t")
    assert loaded.masks == ticket.masks
    assert loaded.masks.digest() == ticket.masks.digest()
    assert equal(dict(loaded.weights), dict(ticket.weights))
    assert loaded.info["round"] == 3
    assert loaded.info["rewound_to_step"] == 10
    assert loaded.info["versions"]["torch"] == torch.__version__


def test_applied_it_is_weights_times_mask(tmp_path: Path) -> None:
    ticket = ticket_of(network(seed=1))
    save_ticket(tmp_path / "t", ticket)
    fresh = network(seed=2)
    load_ticket(tmp_path / "t").apply_(fresh)
    for name, tensor in fresh.state_dict().items():
        expected = ticket.weights[name] * ticket.masks[name] if name in ticket.masks else ticket.weights[name]
        assert torch.equal(tensor, expected), name
    assert 0 < ticket.masks.kept < ticket.masks.total
    assert fresh[1].num_batches_tracked == 7


def test_only_the_mask(tmp_path: Path) -> None:
    ticket = ticket_of(network(seed=1))
    fresh = network(seed=2)
    own = contents(fresh)
    ticket.apply_(fresh, rewound=False)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, own[name] * ticket.masks[name] if name in ticket.masks else own[name]), name


def test_it_changes_values_and_nothing_else() -> None:
    fresh = network(seed=2).double()
    before = {name: (id(p), p.requires_grad) for name, p in fresh.named_parameters()}
    ticket_of(network(seed=1)).apply_(fresh)
    assert {name: (id(p), p.requires_grad) for name, p in fresh.named_parameters()} == before
    assert all(p.dtype == torch.float64 and p.grad_fn is None for p in fresh.parameters())


def test_a_mask_costs_one_bit_a_weight(tmp_path: Path) -> None:
    weight = torch.randn(400, 200)
    for name, masks in (("bare", {}), ("masked", {"w": weight > 0})):
        save_ticket(tmp_path / name, Ticket(MaskSet(masks), {"w": weight}, {}))
    sizes = {name: (tmp_path / name).stat().st_size for name in ("bare", "masked")}
    assert weight.numel() // 8 <= sizes["masked"] - sizes["bare"] <= weight.numel() // 8 + 300
    assert sizes["bare"] <= 4 * weight.numel() + 1200


def test_fills_go_with_the_mask(tmp_path: Path) -> None:
    module = nn.Linear(3, 2, bias=False)
    masks = MaskSet({"weight": torch.eye(2, 3).bool()}, {"weight": torch.full((2, 3), 0.25)})
    save_ticket(tmp_path / "t", Ticket(masks, dict(module.state_dict())))
    fresh = nn.Linear(3, 2, bias=False)
    load_ticket(tmp_path / "t").apply_(fresh)
    assert torch.equal(fresh.weight, torch.where(torch.eye(2, 3).bool(), module.weight, torch.tensor(0.25)))


@pytest.mark.parametrize("names", ["all", "first", "second"])
def test_shared_weights_under_any_of_their_names(names: str, tmp_path: Path) -> None:
    module, fresh = Tied(), Tied()
    weights = dict(module.state_dict())
    if names != "all":
        del weights["embed.weight" if names == "second" else "out.weight"]
    masks = MaskSet({"out.weight" if names == "second" else "embed.weight": torch.rand(4, 6) > 0.5})
    save_ticket(tmp_path / "t", Ticket(masks, weights))
    with safe_open(tmp_path / "t", "pt") as file:
        names = file.keys()
    assert sum(name.endswith(("embed.weight", "out.weight")) for name in names) == 2  # a weight and a mask
    load_ticket(tmp_path / "t").apply_(fresh)
    assert torch.equal(fresh.out.weight, module.out.weight * next(iter(masks.values())))
    assert fresh.out.weight is fresh.embed.weight


def test_weights_that_the_module_ties_and_the_ticket_does_not() -> None:
    fresh = Tied()
    before = contents(fresh)
    with pytest.raises(MaskMismatchError, match=r"out.weight \(one tensor with embed.weight in the module, another"):
        Ticket(MaskSet({}), dict(Tied(tied=False).state_dict())).apply_(fresh)
    assert equal(contents(fresh), before)


def test_buffers_that_are_not_persistent_may_be_missing() -> None:
    module, fresh = Tied(), Tied()
    scale = fresh.scale.clone()
    weights = dict(module.state_dict())
    Ticket(MaskSet({}), weights).apply_(fresh)
    assert torch.equal(fresh.scale, scale)
    Ticket(MaskSet({}), weights | {"scale": module.scale}).apply_(fresh)
    assert torch.equal(fresh.scale, module.scale)
    assert not torch.equal(module.scale, scale)


def test_a_compiled_module_and_a_plain_one(tmp_path: Path) -> None:
    plain, fresh = network(seed=1), network(seed=2)
    compiled = nn.ModuleDict({"net": torch.compile(plain)})
    assert "net._orig_mod.0.weight" in compiled.state_dict()
    masks = MaskSet({"net._orig_mod.0.weight": torch.rand(3, 1, 3, 3) > 0.5})
    save_ticket(tmp_path / "t", Ticket(masks, compiled.state_dict()))
    loaded = load_ticket(tmp_path / "t")
    assert "net.0.weight" in loaded.weights
    loaded.apply_(nn.ModuleDict({"net": fresh}))
    loaded.apply_(nn.ModuleDict({"net": torch.compile(network(seed=3))}))
    assert torch.equal(fresh[3].weight, plain[3].weight)
    assert torch.equal(fresh[0].weight, plain[0].weight * masks["net.0.weight"])
    both = {"a._orig_mod.b": torch.zeros(1), "a.b": torch.ones(1)}
    with pytest.raises(ConfigError, match="holds a tensor twice"):
        save_ticket(tmp_path / "u", Ticket(MaskSet({}), both))


def test_another_network_is_refused_with_names_and_unchanged() -> None:
    ticket = ticket_of(network())
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Identity(), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 2))
    before = contents(other)
    with pytest.raises(MaskMismatchError) as caught:
        ticket.apply_(other)
    message = str(caught.value)
    assert "belongs to another network than Sequential" in message
    assert "not in the ticket: 4.weight, 4.bias" in message
    assert "not in the module: 1.weight, 1.bias, 1.running_mean and 2 more" in message
    assert "do not fit: 0.weight (mask (3, 1, 3, 3), module (4, 1, 3, 3))" in message
    assert "Nothing was changed" in message
    assert equal(contents(other), before)


@pytest.mark.parametrize("rewound", [True, False])
def test_a_mask_for_a_buffer_or_nothing_is_refused(rewound: bool) -> None:
    module = network()
    before = contents(module)
    for name in ("1.running_mean", "9.weight"):
        masks = MaskSet({name: torch.ones(3, dtype=torch.bool)})
        with pytest.raises(MaskMismatchError, match=rf"not in the module: {name}\."):
            Ticket(masks, dict(module.state_dict())).apply_(module, rewound=rewound)
    with pytest.raises(MaskMismatchError, match=r"0.bias \(mask \(2,\), module \(3,\)\)"):
        Ticket(MaskSet({"0.bias": torch.zeros(2, dtype=torch.bool)}), {}).apply_(module, rewound=False)
    assert equal(contents(module), before)


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weight, bias: no shape yet; run one batch"):
        ticket_of(nn.Linear(3, 2)).apply_(nn.LazyLinear(2))


def test_a_file_of_masks_is_no_ticket(tmp_path: Path) -> None:
    MaskSet({"w": torch.tensor([True])}).save(tmp_path / "m")
    with pytest.raises(FileFormatError, match=r"m is not a lightning_prune ticket file: it is a 'masks' file"):
        load_ticket(tmp_path / "m")
    with pytest.raises(FileFormatError, match=r"nowhere does not exist"):
        load_ticket(tmp_path / "nowhere")


def test_info_must_be_json(tmp_path: Path) -> None:
    save_ticket(tmp_path / "t", ticket_of(network(), round=1))
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(ConfigError, match=r"\(info\) .* no JSON content: .*Tensor"):
        save_ticket(tmp_path / "t", ticket_of(network(), round=torch.tensor(1)))
    assert (tmp_path / "t").read_bytes() == before
