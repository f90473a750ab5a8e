"""All heads stay and every head loses the same places."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.compact_files import load_compact, save_compact
from lightning_prune.errors import ConfigError, EqualityError
from tests.channels.attention_networks import NARROW, Block, X
from tests.channels.networks import arrays_of, randomised

HALF = Budget(channels=0.5)


def _plan(model: nn.Module, x: torch.Tensor, budget: Budget = HALF) -> RemovalPlan:
    return plan_removal(trace_channels(model, x, replace_attention="width"), budget)


def test_every_head_attends_with_the_places_that_stay_and_the_old_scale() -> None:
    """The block with some places of each head, written out in NumPy on the full weights."""
    model = randomised(Block(24, 4, need_weights=False))
    state = arrays_of(model)
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    plan = _plan(model, x)
    rows = np.array(plan.keep["attention.in_proj_weight"][0])
    q_rows, k_rows, v_rows = (rows[(rows >= 24 * i) & (rows < 24 * i + 24)] - 24 * i for i in range(3))
    assert (q_rows == k_rows).all()
    assert len(q_rows) == len(v_rows) == 12
    assert (v_rows == plan.keep["attention.out_proj.weight"][1]).all()
    compact(model, plan, x)

    h = x.numpy()
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * state["norm.weight"] + state["norm.bias"]
    q, k, v = np.split(h @ state["attention.in_proj_weight"].T + state["attention.in_proj_bias"], 3, axis=-1)
    out = x.numpy() + state["attention.out_proj.bias"]
    for head in range(4):
        mine = [r[r // 6 == head] for r in (q_rows, v_rows)]
        assert [len(m) for m in mine] == [3, 3]
        scores = np.exp(q[..., mine[0]] @ k[..., mine[0]].transpose(0, 2, 1) / np.sqrt(6))
        weights = scores / scores.sum(-1, keepdims=True)
        out = out + weights @ v[..., mine[1]] @ state["attention.out_proj.weight"][:, mine[1]].T
    expected = out @ state["head.weight"].T + state["head.bias"]
    assert np.allclose(model(x).detach().numpy(), expected, atol=1e-12)
    assert (model.attention.num_heads, model.attention.head_dim, model.attention.embed_dim) == (4, 3, 24)


@pytest.mark.parametrize("name", NARROW)
def test_places_leave_from_every_kind_of_attention(name: str, tmp_path: Path) -> None:
    """Equal to the masked original, all heads still there, replayed from a file."""
    build, _, shape = NARROW[name]
    model, x = build().double(), torch.rand(shape, dtype=torch.float64)
    heads = "n_heads" if name == "maxvit" else "num_heads"
    plan = _plan(model, x)
    assert compact(model, plan, x).error < 1e-12
    assert list(plan.replaced) == ["attention"]
    assert getattr(model.attention, heads) == 4
    out = model.attention.merge if name == "maxvit" else getattr(model.attention, "out_proj", None)
    out = out or model.attention.proj
    assert out.in_features == 4  # of 8: one place of each head's two
    save_compact(model, tmp_path / "small.safetensors")
    loaded = load_compact(build().double(), tmp_path / "small.safetensors")
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_places_leave_in_two_removals_and_the_scale_stays() -> None:
    model = Block(24, 4).double()
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    for width in (3, 1):
        assert compact(model, _plan(model, x), x).error < 1e-12
        assert model.attention.head_dim == width
        assert model.attention.score_scale == 6**-0.5
    heads = plan_removal(trace_channels(model, x), HALF)
    assert compact(model, heads, x).error < 1e-12
    assert (model.attention.num_heads, model.attention.head_dim) == (2, 1)


def test_scores_that_are_rescaled_are_refused() -> None:
    """The check sees a scale that follows the width."""
    model = Block(24, 4).double()
    x = torch.rand(2, 5, 24, dtype=torch.float64)
    plan = _plan(model, x)
    plan.attributes["attention"]["score_scale"] = 3**-0.5
    before = copy.copy(vars(model.attention))
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(model, plan, x)
    assert vars(model.attention) == before
    assert type(model.attention) is nn.MultiheadAttention


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="replace_attention='thin': expected True, False, 'heads' or 'width'"):
        trace_channels(Block().double(), X, replace_attention="thin")
