"""Heads leave for real: what is left is right, plans replay it, failures take it back."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.channels.attention import replace, replaceable
from lightning_prune.compact_files import load_compact, save_compact
from lightning_prune.errors import EqualityError, MaskMismatchError, PruneError
from tests.channels.attention_networks import NARROW, Block, X
from tests.channels.networks import RotaryAttention, arrays_of, assert_close, check_half_equals_narrow, randomised

HALF = Budget(channels=0.5)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_attention_is_the_original_code_built_narrow(name: str) -> None:
    """Weights sliced by NumPy into the original class at half the width; its attributes are what ours became."""
    build, by_hand, shape = NARROW[name]
    model, narrow = randomised(build()), by_hand().double().eval()
    check_half_equals_narrow(model, narrow, shape)
    ours, wanted = vars(model.attention), vars(narrow.attention)
    for key, value in wanted.items():
        if isinstance(value, (int, float, list)) and not key.startswith("_"):
            assert ours[key] == value, key


def _numpy_block(state: dict[str, np.ndarray], x: np.ndarray, heads: list[int], width: int) -> np.ndarray:
    """The block with some of its heads, written out in NumPy on the full weights."""
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    h = h * state["norm.weight"] + state["norm.bias"]
    rows = state["attention.in_proj_weight"].shape[0] // 3
    out = x + state["attention.out_proj.bias"]
    for head in heads:
        place = slice(head * width, head * width + width)
        q, k, v = (h @ state["attention.in_proj_weight"][i * rows : i * rows + rows][place].T
                   + state["attention.in_proj_bias"][i * rows : i * rows + rows][place] for i in range(3))  # fmt: skip
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width))
        out = out + scores / scores.sum(-1, keepdims=True) @ v @ state["attention.out_proj.weight"][:, place].T
    return out @ state["head.weight"].T + state["head.bias"]


def test_what_is_left_is_the_sum_over_the_heads_that_stay() -> None:
    model = randomised(Block(need_weights=False))
    state = arrays_of(model)
    assert np.allclose(_numpy_block(state, X.numpy(), [0, 1, 2, 3], 3), model(X).detach().numpy(), atol=1e-12)
    plan = plan_removal(trace_channels(model, X), HALF)
    heads = sorted({i // 3 for i in plan.keep["attention.out_proj.weight"][1]})
    assert len(heads) == 2
    compact(model, plan, X)
    assert np.allclose(_numpy_block(state, X.numpy(), heads, 3), model(X).detach().numpy(), atol=1e-12)
    assert model.attention.num_heads == 2
    assert (model.attention.head_dim, model.attention.embed_dim) == (3, 12)
    assert tuple(model.attention.in_proj_weight.shape) == (18, 12)


def _class(model: nn.Module) -> type:
    return type(model.attention)


def test_tracing_planning_and_a_failed_removal_leave_the_class_as_it_was() -> None:
    model = Block().double()
    plan = plan_removal(trace_channels(model, X), HALF)
    assert _class(model) is nn.MultiheadAttention
    plan.keep["attention.out_proj.weight"][1].reverse()
    attributes = copy.copy(vars(model.attention))
    with pytest.raises(EqualityError, match="differs from its masked parent"):
        compact(model, plan, X)
    assert _class(model) is nn.MultiheadAttention
    assert vars(model.attention) == attributes


def test_the_module_stays_the_same_object_with_its_hooks_and_keys() -> None:
    model = Block().double()
    module, parameters, keys = model.attention, list(model.parameters()), list(model.state_dict())
    calls: list[str] = []
    model.attention.register_forward_hook(lambda *_: calls.append("hook"))
    compact(model, plan_removal(trace_channels(model, X), HALF), X)
    calls.clear()
    model(X)
    assert calls == ["hook"]
    assert model.attention is module
    assert isinstance(module, nn.MultiheadAttention)
    assert _class(model) is not nn.MultiheadAttention
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys


def test_only_modules_whose_heads_leave_are_recorded() -> None:
    first, second = Block(), Block()
    model = nn.Sequential(first, nn.Linear(5, 12), second).double()
    graph = trace_channels(model, X)
    assert sorted(graph.replaced) == ["0.attention", "2.attention"]
    assert "0.attention: a MultiheadAttention, replaced by one of free inner width if heads leave" in graph.explain()
    scores = {g.name: torch.arange(float(g.size)) + (100 if g.name == "2.attention" else 0) for g in graph.groups}
    plan = plan_removal(graph, Budget(channels=0.7), scores, scope="global")
    assert list(plan.replaced) == ["0.attention"]
    compact(model, plan, X)
    assert type(second.attention) is nn.MultiheadAttention
    assert type(first.attention) is not nn.MultiheadAttention


def test_the_caller_can_keep_attention_as_it_is() -> None:
    graph = trace_channels(Block().double(), X, replace_attention=False)
    assert graph.groups == []
    assert graph.replaced == {}


@pytest.mark.parametrize("name", NARROW)
def test_plans_are_replayed_on_fresh_models(name: str, tmp_path: Path) -> None:
    build, _, shape = NARROW[name]
    model, x = build(), torch.rand(shape)
    plan = plan_removal(trace_channels(model, x), HALF)
    compact(model, plan, x)
    again = RemovalPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    fresh = build()
    again.apply_(fresh)
    fresh.load_state_dict(model.state_dict())
    assert _class(fresh) is _class(model)
    save_compact(model, tmp_path / "small.safetensors")
    loaded = load_compact(build(), tmp_path / "small.safetensors")
    for other in (fresh, loaded, copy.deepcopy(model)):
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_narrowed_model_can_be_pickled_and_narrowed_again() -> None:
    model = Block(heads=4).double()
    compact(model, plan_removal(trace_channels(model, X), HALF), X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model = torch.load(buffer, weights_only=False)
    plan = plan_removal(trace_channels(model, X, replace_attention=False), HALF)
    assert compact(model, plan, X).error < 1e-12
    assert plan.replaced == {}
    assert model.attention.num_heads == 1


def test_another_kind_of_module_is_refused() -> None:
    model = Block().double()
    plan = plan_removal(trace_channels(model, X), HALF)
    fresh = Block().double()
    fresh.attention.__class__ = type("Own", (nn.MultiheadAttention,), {})
    with pytest.raises(MaskMismatchError, match=r"replaces module 'attention'.*has a .*Own"):
        plan.apply_(fresh)
    plan.replaced["attention"] = "some.later.Attention"
    with pytest.raises(MaskMismatchError, match=r"a some.later.Attention; this Block has a torch.nn"):
        plan.apply_(Block().double())


def test_subclasses_and_computed_weights_are_left_alone() -> None:
    """Their forward code is not known, or their weights are not parameters: heads stay, with a reason."""
    model = Block().double()
    model.attention.__class__ = type("Own", (nn.MultiheadAttention,), {})
    assert replaceable(model) == {}
    assert trace_channels(model, X).groups == []
    model = Block().double()
    nn.utils.parametrizations.weight_norm(model.attention.out_proj)
    assert replaceable(model) == {}


def test_weights_that_nobody_reads_do_not_hold_heads() -> None:
    """By default attention averages its weights over heads, even if the caller drops them."""
    model = Block().double()
    assert [g.size for g in trace_channels(model, X).groups] == [4]


def test_weights_that_are_read_hold_heads() -> None:
    graph = trace_channels(Block(average_attn_weights=True).double(), X)
    assert graph.groups == []
    assert "mean is taken over it" in graph.explain()


def test_a_mask_for_each_head_holds_heads() -> None:
    graph = trace_channels(Block(attn_mask=torch.zeros(8, 5, 5, dtype=torch.float64), need_weights=False).double(), X)
    assert graph.groups == []
    assert "attention's mask does not shrink" in graph.explain()


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).double()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_paths_of_transformer_encoders_do_not_take_narrowed_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two heads left the original's own conditions for its fused kernel hold, which would misread the weights."""
    model, x = _encoder(), X
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = {"src": x, "src_key_padding_mask": padding}
    used: list[str] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: used.append("fused") or fused(*a))
    with torch.no_grad():
        model.eval()(**inputs)
        assert used
        used.clear()
        plan = plan_removal(trace_channels(model, inputs), HALF)
        assert sorted(plan.replaced) == ["layers.0.self_attn", "layers.1.self_attn"]
        masked = copy.deepcopy(model)
        compact(model, plan, inputs)
        for name, axis in plan.reads:
            leaving = sorted(set(range(plan.shapes[name][axis])) - set(plan.keep[name][axis]))
            masked.get_parameter(name).index_fill_(axis, torch.tensor(leaving), 0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = masked(**inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert not used
        assert_close(model(**inputs), expected)
        assert not used
        model.train()
        assert_close(model(**inputs), expected)


def test_decoders_lose_heads_of_both_attentions() -> None:
    model = nn.Transformer(12, 4, 1, 1, 16, batch_first=True, dropout=0.0).double()
    inputs = {"src": X, "tgt": X[:, :3], "tgt_mask": nn.Transformer.generate_square_subsequent_mask(3).double(),
              "tgt_is_causal": True}  # fmt: skip
    plan = plan_removal(trace_channels(model, inputs), HALF)
    assert sorted(plan.replaced) == [
        "decoder.layers.0.multihead_attn", "decoder.layers.0.self_attn", "encoder.layers.0.self_attn",
    ]  # fmt: skip
    assert compact(model, plan, inputs).error < 1e-12


def test_a_model_that_only_the_original_can_run_is_traced_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.channels.attention.multihead import FreeMultiheadAttention

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PruneError("takes no nested tensors")

    monkeypatch.setattr(FreeMultiheadAttention, "forward", refuse)
    graph = trace_channels(Block().double(), X)
    assert graph.replaced == {}
    assert "No attention was replaced" in graph.explain()
    assert "takes no nested tensors" in graph.explain()


def test_replacing_twice_changes_nothing() -> None:
    model = Block()
    kinds = replaceable(model)
    assert len(replace(model, kinds)) == 1
    assert replace(model, kinds) == []
    assert replaceable(model) == {}


class Written(nn.Module):
    """One fused projection, sizes from attributes; a single head is no copy, two are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (qkv[0] @ qkv[1].transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ qkv[2]
        return self.proj(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


@pytest.mark.parametrize("heads", [2, 4])
def test_whether_memory_is_copied_does_not_hold_heads(heads: int) -> None:
    """``reshape`` copies with several heads and not with one: another operation runs, and nothing is wrong."""
    model = nn.Sequential(Written(12, heads), nn.Linear(12, 3)).double()
    plan = plan_removal(trace_channels(model, X), Budget(channels=1 / heads))
    assert compact(model, plan, X).error < 1e-12
    assert model[0].num_heads == 1


def test_one_head_may_meet_what_was_shared_by_several() -> None:
    """With a single head left, its places meet those of a rotary embedding one by one: they stay, all of them."""
    model = nn.Sequential(nn.LayerNorm(12), RotaryAttention(12, 2, 6, buffer=True), nn.Linear(12, 3)).double()
    plan = plan_removal(trace_channels(model, X), HALF)
    assert compact(model, plan, X).error < 1e-12
    assert model[1].q.out_features == 12
    assert model[1].k.out_features == 6
