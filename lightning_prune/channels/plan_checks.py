"""What a plan from a file must be before anything is done with it: a file may come from anywhere."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_prune.errors import MaskMismatchError

if TYPE_CHECKING:
    from lightning_prune.channels.plan import RemovalPlan

_MOST = 64  # axes of a tensor, outputs of a module


def check_content(plan: "RemovalPlan") -> None:
    """See that every part has its form and every index its place.

    Raises:
        ValueError: It does not; what is wrong.
    """
    for name, shape in plan.shapes.items():
        if not isinstance(name, str) or len(shape) > _MOST or not all(_is_count(n) for n in shape):
            raise ValueError(f"{name!r:.80} has shape {shape!r:.80}")
    for name, axes in plan.keep.items():
        for axis, kept in axes.items():
            if name not in plan.shapes or not 0 <= axis < len(plan.shapes[name]):
                raise ValueError(f"it keeps positions of {name!r:.80}, axis {axis}, which has no shape")
            size = plan.shapes[name][axis]
            if not all(_is_count(i) and i < size for i in kept) or len(set(kept)) < len(kept):
                raise ValueError(f"positions of {name!r:.80}, axis {axis}, are not within its {size}, or repeat")
    for module, changes in plan.attributes.items():
        for key, value in changes.items():
            if not key.isidentifier() or key.startswith("__") or not _is_size(value):
                raise ValueError(f"{module!r:.80} is to have {key!r:.80} = {value!r:.80}; expected sizes")
    for entry in plan.left:
        for name, (kind, arity) in entry["parts"].items():
            if kind not in ("identity", "zero") or not _is_count(arity) or arity > _MOST or not isinstance(name, str):
                raise ValueError(f"{kind!r:.80} with {arity!r:.80} outputs is to stand for {name!r:.80}")
        texts = (entry["block"], entry["module"])
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_addition, entry["adds"])):
            raise ValueError(f"the block that leaves is {texts!r:.160}, ended by {entry['adds']!r:.80}")
    lists = (plan.groups, plan.statistics, plan.unseen, plan.without_effect)
    if not all(isinstance(part, list) for part in lists) or not all(isinstance(g, dict) for g in plan.groups):
        raise ValueError("its lists are not lists")
    if not all(isinstance(text, str) for pair in plan.replaced.items() for text in pair):
        raise ValueError("what is replaced is not named")


def check_attributes(plan: "RemovalPlan", model: nn.Module) -> None:
    """Refuse to set anything but sizes and flags that a module has already.

    Raises:
        MaskMismatchError: The module lacks it, or it is something else there.
    """
    modules = dict(model.named_modules())
    for name, changes in plan.attributes.items():
        if name not in modules:
            raise MaskMismatchError(f"the plan changes module {name!r}, which this {type(model).__name__} lacks.")
        module = modules[name]
        for key, value in changes.items():
            missing = name in plan.replaced and not hasattr(type(module), key)  # comes with the replaced form
            found: Any = getattr(module, key, value if missing else None)
            if not _is_size(found) or isinstance(found, list | tuple) != isinstance(value, list | tuple):
                raise MaskMismatchError(
                    f"the plan sets {key!r} of {name or 'the model'} to {value!r:.60}, which is no size of this "
                    f"{type(module).__name__}; give a fresh model of the architecture that the plan was made for."
                )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_addition(value: Any) -> bool:
    """Its number in a call of the module, and which of its two operands is the branch."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)) and value[1] <= 1


def _is_size(value: Any) -> bool:
    """A number, a flag, or a few of them."""
    if isinstance(value, list | tuple):
        return all(isinstance(part, int | float) for part in value)
    return isinstance(value, int | float)
