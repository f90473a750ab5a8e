"""Put attention modules of known types into a form whose inner width is free, and back."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from lightning_prune.channels.attention.base import FreeWidth
from lightning_prune.errors import MaskMismatchError

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan

# Exact type of the original -> where its replacement is. A name from a plan's file is looked up here and nowhere else.
KINDS = {
    "torch.nn.modules.activation.MultiheadAttention": ("multihead", "FreeMultiheadAttention"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("windowed", "FreeShiftedWindowAttention"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("windowed", "FreeShiftedWindowAttentionV2"),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (
        "windowed", "FreeRelativePositionalMultiHeadAttention"
    ),
    "timm.models.beit.Attention": ("timm_models", "FreeBeitAttention"),
    "timm.models.eva.EvaAttention": ("timm_models", "FreeEvaAttention"),
    "timm.models.swin_transformer_v2.WindowAttention": ("timm_models", "FreeWindowAttentionV2"),
}  # fmt: skip


def kind_of(module: nn.Module) -> str | None:
    """The kind of an attention module, replaced or not; None if it is none, or a subclass with code of its own."""
    cls = type(module)
    if isinstance(module, FreeWidth):
        cls = next(c for c in cls.__mro__[1:] if not issubclass(c, FreeWidth) and issubclass(c, nn.Module))
    kind = f"{cls.__module__}.{cls.__qualname__}"
    return kind if kind in KINDS else None


def free_class(kind: str) -> type:
    """The replacement of a kind."""
    file, name = KINDS[kind]
    return cast(type, getattr(import_module(f"lightning_prune.channels.attention.{file}"), name))


def replaceable(model: nn.Module) -> dict[str, str]:
    """Attention modules that can be replaced, by name; not those whose weights are computed anew in each pass."""
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or isinstance(module, FreeWidth):
            continue
        wanted = cast(type[FreeWidth], free_class(kind)).weights
        if all(_is_parameter(module, path) for path in wanted):
            found[name] = kind
    return found


def _is_parameter(module: nn.Module, path: str) -> bool:
    *owners, leaf = path.split(".")
    for owner in owners:
        child = module._modules.get(owner)
        if child is None:  # the module is one of several forms, without this part
            return True
        module = child
    return leaf in module._parameters


def replaced_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are in their replaced form now, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(cast(Any, module), FreeWidth)}


def check_kinds(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Refuse a model whose modules are not of the kinds that a plan replaces.

    Raises:
        MaskMismatchError: A module is missing, or of another type.
    """
    modules = dict(model.named_modules())
    for name, kind in kinds.items():
        found = modules.get(name)
        if found is None or kind_of(found) != kind:
            raise MaskMismatchError(
                f"the plan replaces module {name!r}, a {kind}; this {type(model).__name__} has "
                f"{'none of that name' if found is None else f'a {type(found).__module__}.{type(found).__qualname__}'}"
                ". Give a fresh model of the architecture that the plan was made for, and a version of lightning-prune "
                "that knows this attention."
            )


def replace(model: nn.Module, kinds: Mapping[str, str]) -> list[tuple[nn.Module, type]]:
    """Replace modules in place; return what their classes were."""
    modules = dict(model.named_modules())
    before = []
    for name, kind in kinds.items():
        module = modules[name]
        if not isinstance(module, FreeWidth):
            before.append((module, type(module)))
            cast(Any, module).__class__ = free_class(kind)
    return before


@contextmanager
def replaced(model: nn.Module, kinds: Mapping[str, str]) -> Iterator[None]:
    """Replace modules for a while."""
    before = replace(model, kinds)
    try:
        yield
    finally:
        for module, original in before:
            cast(Any, module).__class__ = original


def narrowed(
    model: nn.Module, plan: "RemovalPlan", thinned: Collection[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What a plan does to modules that are in their replaced form now.

    Args:
        model: The model.
        plan: What leaves.
        thinned: Modules whose heads lose places, instead of heads that leave whole.

    Returns:
        Names of those whose own weights shrink, and their new size attributes. With an ``nn.TransformerEncoder`` around
        them, its conversion to nested tensors is turned off, which only the original's fused kernel can read.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    names: list[str] = []
    attributes: dict[str, dict[str, Any]] = {}

    def size(parameter: Tensor, axis: int) -> int:
        kept = plan.keep.get(first[id(parameter)], {}).get(axis)
        return parameter.shape[axis] if kept is None else len(kept)

    for name, module in replaced_modules(model).items():
        own = (p for path, p in module.named_parameters() if path in cast(FreeWidth, module).weights)
        if not any(first[id(p)] in plan.keep for p in own):
            continue
        names.append(name)
        new = cast(FreeWidth, module).true_sizes(size, name in thinned)
        attributes[name] = {key: value for key, value in new.items() if getattr(module, key) != value}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        is_encoder = isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
        if is_encoder and any(n.startswith(prefix) for n in names):
            attributes[name] = {"use_nested_tensor": False}
    return names, attributes
