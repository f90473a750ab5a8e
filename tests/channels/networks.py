"""Small networks, one for each rule, that can be built at any width."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.channels import Budget, RemovalPlan, compact, plan_removal, trace_channels
from lightning_prune.channels.equality import random_tensors


class Net(nn.Module):
    """A network whose forward pass is a function of itself, so that each case reads as one definition."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A network by width, its input, how wide its groups are at width 8, and the same by hand at width 4.

    Attributes:
        name: Of the case.
        build: Makes the network at a width.
        shape: Of the input.
        sizes: Sizes of the groups at width 8.
        narrow: Makes the network by hand as it should be with half of every group left; by default ``build(4)``.
    """

    name: str
    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    sizes: list[int]
    narrow: Callable[[], nn.Module] | None = None

    def by_hand(self) -> nn.Module:
        return self.narrow() if self.narrow else self.build(4)


def conv(i: int, o: int, k: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Attention(nn.Module):
    """Hand-written attention whose inner width is free of its input's."""

    def __init__(
        self, width: int, heads: int, head_dim: int, kv_heads: int | None = None, style: str = "matmul"
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.style = heads, head_dim, style
        self.num_kv_heads = kv_heads or heads
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, self.num_kv_heads * head_dim)
        self.v = nn.Linear(width, self.num_kv_heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        if self.num_kv_heads != self.num_heads:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.style == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        else:
            y = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """One projection for queries, keys and values, cut by written-out sizes that attributes hold."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class RotaryAttention(nn.Module):
    """Grouped queries with rotary embeddings, the same for every head: from a buffer, or computed in each pass."""

    def __init__(self, width: int, heads: int, head_dim: int, buffer: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.out = nn.Linear(width, 2 * heads * head_dim), nn.Linear(2 * heads * head_dim, width)
        self.k, self.v = nn.Linear(width, heads * head_dim), nn.Linear(width, heads * head_dim)
        if buffer:
            self.register_buffer("angles", self._angles(5))

    def _angles(self, tokens: int) -> Tensor:
        speeds = 100.0 ** -(torch.arange(self.head_dim // 2, dtype=torch.float64) / self.head_dim)
        return torch.outer(torch.arange(tokens, dtype=torch.float64), speeds).repeat(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        angles = (self.angles if hasattr(self, "angles") else self._angles(x.shape[2])).to(x)
        first, second = x[..., : self.head_dim // 2], x[..., self.head_dim // 2 :]
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self._rotate(q), self._rotate(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InterleavedAttention(nn.Module):
    """Queries, keys and values of each head side by side, cut into uneven parts."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv, self.out = nn.Linear(width, heads * 3 * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        qk, v = qkv.split([2 * self.head_dim, self.head_dim], dim=-1)
        q, k = qk.chunk(2, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class MaskedWindows(nn.Module):
    """Attention in two windows, each with a mask of its own that a buffer holds."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.register_buffer("mask", torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:  # (samples * windows, tokens, width)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).view(b // 2, 2, self.num_heads, t, t) + self.mask[:, None]
        y = scores.view(b, self.num_heads, t, t).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def _residual(w: int) -> nn.Module:
    return Net(
        lambda n, x: n.head((h := F.relu(n.stem(x))) + n.b(F.relu(n.a(h)))),
        stem=conv(3, w), a=conv(w, w), b=conv(w, w), head=conv(w, 5),
    )  # fmt: skip


def _option_a(first: int, second: int, pad: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(n.stem(x))
        short = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        return n.head(F.relu(n.b(F.relu(n.a(h))) + short))

    return Net(
        run, stem=conv(3, first), a=nn.Conv2d(first, first, 3, 2, 1), b=conv(first, second), head=conv(second, 5)
    )


def _shuffle(w: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(n.stem(x))
        b, c, height, width = h.shape
        h = h.view(b, 2, c // 2, height, width).transpose(1, 2).reshape(b, c, height, width)
        first, second = h.chunk(2, dim=1)
        return n.head(torch.cat((first, torch.tanh(n.a(second))), 1))

    return Net(run, stem=conv(3, w), a=conv(w // 2, w // 2), head=conv(w, 5))


def _shared(w: int) -> nn.Module:
    return Net(lambda n, x: n.head(F.relu(n.a(F.relu(n.a(n.stem(x)))))), stem=conv(3, w), a=conv(w, w), head=conv(w, 5))


def _tied(w: int) -> nn.Module:
    net = Net(lambda n, x: n.out(torch.tanh(n.dec(torch.tanh(n.enc(x))))), enc=nn.Linear(6, w, bias=False),
              dec=nn.Linear(w, w), out=nn.Linear(w, 6, bias=False))  # fmt: skip
    net.out.weight = nn.Parameter(torch.randn(6, w))
    return net


def _scaled(w: int) -> nn.Module:
    net = Net(lambda n, x: n.head(n.a(x) * n.gamma + n.shift), a=conv(3, w), head=conv(w, 5))
    net.gamma = nn.Parameter(torch.randn(w, 1, 1))
    net.register_buffer("shift", torch.randn(1, w, 1, 1))
    return net


def _tokens(w: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        t = n.patch(x).flatten(2).transpose(1, 2)
        t = torch.cat([n.token.expand(t.shape[0], -1, -1), t], dim=1) + n.position
        return n.head(t.mean(1))

    net = Net(run, patch=nn.Conv2d(3, w, 4, 4), head=nn.Linear(w, 5))
    net.token = nn.Parameter(torch.randn(1, 1, w))
    net.position = nn.Parameter(torch.randn(1, 5, w))
    return net


def _group_norm(w: int) -> nn.Module:
    return Net(lambda n, x: n.head(F.relu(n.norm(n.a(x)))), a=conv(3, w), norm=nn.GroupNorm(w // 2, w), head=conv(w, 5))


def _grouped(width_a: int, width_b: int) -> nn.Module:
    return Net(
        lambda n, x: n.head(F.relu(n.g(F.relu(n.a(x))))),
        a=conv(3, width_a), g=conv(width_a, width_b, groups=2), head=conv(width_b, 5),
    )  # fmt: skip


def _se(w: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = n.a(x)
        s = torch.sigmoid(n.up(F.relu(n.down(h.mean((2, 3), keepdim=True)))))
        return n.head(h * s)

    return Net(run, a=conv(3, w), down=nn.Conv2d(w, w // 2, 1), up=nn.Conv2d(w // 2, w, 1), head=conv(w, 5))


def _transformer(width: int, attention: nn.Module) -> nn.Module:
    return Net(lambda n, x: n.head(x + n.attention(n.norm(x))), norm=nn.LayerNorm(width), attention=attention,
               head=nn.Linear(width, 5))  # fmt: skip


def _norm_weight(w: int) -> nn.Module:
    return Net(lambda n, x: n.head(F.relu(n.a(x))), a=weight_norm(conv(3, w)), head=conv(w, 5))


class Pieces(nn.Module):
    """Cuts an axis into two uneven pieces, at places that it keeps as a list, as numbers, or as where to slice."""

    def __init__(self, first: int, second: int, own: int, style: str) -> None:
        super().__init__()
        self.style, self.dim_first, self.dim_second = style, first, second
        self.pieces = (first, second) if style == "list" else None
        if style == "list":
            self.dim_first = self.dim_second = 0
        self.a, self.b, self.head = conv(3, first + second), conv(first, own), conv(second + own, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.style == "slice":
            one, two = h[:, : self.dim_first], h[:, self.dim_first :]
        else:
            one, two = h.split(self.pieces if self.style == "list" else [self.dim_first, self.dim_second], 1)
        return self.head(torch.cat([F.relu(two), F.relu(self.b(one))], 1))


class Blur(nn.Module):
    """A fixed filter for each channel, applied by code that keeps how many there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.rand(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=self.channels)


def _selective(w: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        paths = torch.stack([n.a(x), n.b(x)], 1)
        chosen = n.choose(paths.sum(1).mean((2, 3))).unflatten(1, (2, -1)).softmax(1)
        return n.head((paths * chosen[..., None, None]).sum(1))

    return Net(run, a=conv(3, w), b=conv(3, w), choose=nn.Linear(w, 2 * w), head=conv(w, 5))


def _regions(w: int) -> nn.Module:
    def run(n: nn.Module, x: Tensor) -> Tensor:
        h = n.a(x)
        boxes = [x.new_tensor([[0.0, 0.0, 4.0, 4.0]])] * len(x)
        pooled = torch.zeros(len(boxes) + 1, h.shape[1], 2, 2, dtype=x.dtype)
        pooled[torch.tensor([2, 0])] = torchvision.ops.roi_align(h, boxes, 2)
        return n.head(pooled.flatten(1))

    return Net(run, a=conv(3, w), head=nn.Linear(w * 4, 5))


IMAGE = (2, 3, 8, 8)
CASES = [
    Case("conv", lambda w: nn.Sequential(conv(3, w), nn.ReLU(), conv(w, 5)), IMAGE, [8]),
    Case("conv 1d", lambda w: nn.Sequential(nn.Conv1d(3, w, 3), nn.ReLU(), nn.Conv1d(w, 5, 3)), (2, 3, 9), [8]),
    Case("conv 3d", lambda w: nn.Sequential(nn.Conv3d(3, w, 2), nn.ReLU(), nn.Conv3d(w, 5, 2)), (2, 3, 4, 4, 4), [8]),
    Case("dilated", lambda w: nn.Sequential(nn.Conv2d(3, w, 3, dilation=2), nn.Conv2d(w, 5, 2)), IMAGE, [8]),
    Case("linear", lambda w: nn.Sequential(nn.Linear(6, w), nn.GELU(), nn.Linear(w, 5)), (3, 6), [8]),
    Case("linear on tokens", lambda w: nn.Sequential(nn.Linear(6, w), nn.GELU(), nn.Linear(w, 5)), (2, 3, 6), [8]),
    Case("batch norm", lambda w: nn.Sequential(conv(3, w), nn.BatchNorm2d(w), nn.ReLU(), conv(w, 5)), IMAGE, [8]),
    Case("instance norm", lambda w: nn.Sequential(
        conv(3, w), nn.InstanceNorm2d(w, affine=True), conv(w, 5)), IMAGE, [8]),
    Case("instance norm, statistics", lambda w: nn.Sequential(
        conv(3, w), nn.InstanceNorm2d(w, affine=True, track_running_stats=True), conv(w, 5)), IMAGE, [8]),
    Case("instance norm, bare", lambda w: nn.Sequential(conv(3, w), nn.InstanceNorm2d(w), conv(w, 5)), IMAGE, [8]),
    Case("group norm", _group_norm, IMAGE, [4]),
    Case("prelu", lambda w: nn.Sequential(conv(3, w), nn.PReLU(w), conv(w, 5)), IMAGE, [8]),
    Case("prelu, one slope", lambda w: nn.Sequential(conv(3, w), nn.PReLU(), conv(w, 5)), IMAGE, [8]),
    Case("depthwise", lambda w: nn.Sequential(conv(3, w), conv(w, w, groups=w), conv(w, 5)), IMAGE, [8]),
    Case("depthwise, multiplier", lambda w: nn.Sequential(conv(3, w), conv(w, 2 * w, groups=w), conv(2 * w, 5)),
         IMAGE, [8]),
    Case("grouped", lambda w: _grouped(w, w), IMAGE, [4, 4, 4]),
    Case("transposed", lambda w: nn.Sequential(conv(3, w), nn.ConvTranspose2d(w, w, 2, 2), nn.ReLU(), conv(w, 5)),
         IMAGE, [8, 8]),
    Case("transposed depthwise", lambda w: nn.Sequential(
        conv(3, w), nn.ConvTranspose2d(w, w, 2, 2, groups=w), conv(w, 5)), IMAGE, [8]),
    Case("pooling", lambda w: nn.Sequential(
        conv(3, w), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 5)),
        IMAGE, [8]),
    Case("flatten", lambda w: nn.Sequential(conv(3, w), nn.Flatten(), nn.Linear(w * 64, 5)), IMAGE, [8]),
    Case("upsampling", lambda w: nn.Sequential(
        conv(3, w), nn.Upsample(scale_factor=2, mode="bilinear"), conv(w, 5)), IMAGE, [8]),
    Case("pixel shuffle", lambda w: nn.Sequential(conv(3, w), nn.PixelShuffle(2), conv(w // 4, 5)), IMAGE, [2]),
    Case("pixel unshuffle", lambda w: nn.Sequential(conv(3, w), nn.PixelUnshuffle(2), conv(4 * w, 5)), IMAGE, [8]),
    Case("residual", _residual, IMAGE, [8, 8]),
    Case("option A", lambda w: _option_a(w, 2 * w, w // 2), IMAGE, [8, 8],
         lambda: _option_a(4, 12, 4)),
    Case("concat", lambda w: Net(
        lambda n, x: n.head(torch.cat([n.a(x), F.relu(n.b(x))], 1)), a=conv(3, w), b=conv(3, 2 * w),
        head=conv(3 * w, 5)),
        IMAGE, [8, 16]),
    Case("stack and sum", lambda w: Net(
        lambda n, x: n.head(torch.stack([n.a(x), n.b(x)], 1).sum(1)), a=conv(3, w), b=conv(3, w), head=conv(w, 5)),
        IMAGE, [8]),
    Case("chunk", lambda w: Net(
        lambda n, x: n.head((h := n.a(x).chunk(2, 1))[0] * torch.sigmoid(h[1])), a=conv(3, 2 * w), head=conv(w, 5)),
        IMAGE, [8]),
    Case("glu", lambda w: nn.Sequential(conv(3, 2 * w), nn.GLU(1), conv(w, 5)), IMAGE, [8]),
    Case("shuffle and chunk", _shuffle, IMAGE, [2, 2, 2, 2, 4]),
    Case("channel shuffle", lambda w: nn.Sequential(conv(3, w), nn.ChannelShuffle(2), conv(w, 5)), IMAGE, [4, 4]),
    *[Case(f"uneven pieces, {style}", lambda w, style=style: Pieces(w // 2, 5 * w // 4, 2 * w, style), IMAGE,
           [4, 10, 16]) for style in ("list", "numbers", "slice")],
    Case("blur", lambda w: nn.Sequential(conv(3, w), Blur(w), conv(w, 5)), IMAGE, [8]),
    Case("selective kernel", _selective, IMAGE, [8]),
    Case("regions and rows", _regions, IMAGE, [8]),
    Case("squeeze and excite", _se, IMAGE, [8, 4]),
    Case("layer scale and buffer", _scaled, IMAGE, [8]),
    Case("called twice", _shared, IMAGE, [8]),
    Case("two layers", _tied, (3, 6), [8, 8]),
    Case("token and position", _tokens, IMAGE, [8]),
    Case("weight norm", _norm_weight, IMAGE, [8]),
    Case("embedding", lambda w: nn.Sequential(nn.Embedding(9, w), nn.Linear(w, 5)), (2, 4), [8]),
    Case("heads", lambda w: _transformer(6, Attention(6, w // 2, 3)), (2, 5, 6), [4]),
    Case("heads, sdpa", lambda w: _transformer(6, Attention(6, w // 2, 3, style="sdpa")), (2, 5, 6), [4]),
    Case("heads, einsum", lambda w: _transformer(6, Attention(6, w // 2, 3, style="einsum")), (2, 5, 6), [4]),
    Case("heads, grouped queries", lambda w: _transformer(6, Attention(6, w, 3, kv_heads=w // 2)), (2, 5, 6), [4]),
    Case("heads, rotary buffer", lambda w: _transformer(6, RotaryAttention(6, w // 2, 4, True)), (2, 5, 6), [4]),
    Case("heads, rotary computed", lambda w: _transformer(6, RotaryAttention(6, w // 2, 4, False)), (2, 5, 6), [4]),
    Case("heads, side by side", lambda w: _transformer(6, InterleavedAttention(6, w // 2, 3)), (2, 5, 6), [4]),
    Case("heads, masks of windows", lambda w: _transformer(6, MaskedWindows(6, w // 2, 3)), (4, 5, 6), [4]),
    Case("heads, one projection", lambda w: _transformer(6, FusedAttention(6, w // 2, 3)), (2, 5, 6), [4]),
]  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode with random weights and statistics."""
    values = random_tensors(model, torch.float64, 3)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.copy_(values[name])
    return model


def spread_weights(model: nn.Module, high: float = 0.5) -> nn.Module:
    """The model in eval mode with uniform weights and statistics under which every branch counts.

    Args:
        model: Changed in place.
        high: Weights lie from -0.5 to this; scales and variances from 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.5, high, generator=generator)
    return model.eval()


def arrays_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of parameters and buffers."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def fill_by_hand(narrow: nn.Module, original: dict[str, np.ndarray], plan: RemovalPlan) -> None:
    """Give a network that was built narrow what stays of the wide one's arrays, sliced by NumPy."""
    for name, tensor in narrow.state_dict().items():
        value = original[name]
        for axis, indices in plan.keep.get(name, {}).items():
            value = np.take(value, indices, axis=axis)
        assert value.shape == tuple(tensor.shape), name
        tensor.copy_(torch.from_numpy(value))


def check_half_equals_narrow(model: nn.Module, narrow: nn.Module, shape: tuple[int, ...]) -> None:
    """Cut half of a network's heads; it is the original code built narrow, with weights sliced by NumPy.

    Args:
        model: In float64, with random weights; loses half of its heads.
        narrow: The same code built at half the width; takes the weights that stay.
        shape: Of the input.
    """
    original = arrays_of(model)
    x = torch.rand(shape, dtype=torch.float64)
    plan = plan_removal(trace_channels(model, x), Budget(channels=0.5))
    assert compact(model, plan, x).error < 1e-12
    assert list(plan.replaced) == ["attention"]
    fill_by_hand(narrow, original, plan)
    with torch.no_grad():
        assert_close(model(x), narrow(x))
        assert float(model(x).abs().max()) > 1e-3


def assert_close(a: Tensor, b: Tensor) -> None:
    """Same shape, and equal but for rounding in float64."""
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), float((a - b).abs().max())


def example(case: Case) -> Tensor:
    """An input for a case."""
    generator = torch.Generator().manual_seed(1)
    if case.name == "embedding":
        return torch.randint(0, 9, case.shape, generator=generator)
    return torch.rand(case.shape, generator=generator)
