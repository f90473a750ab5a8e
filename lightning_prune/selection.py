"""From scores and a number to masks: exactly the asked count, whatever the ties."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_prune.counting import RULES, Competition
from lightning_prune.errors import ConfigError, MaskMismatchError, SelectionError
from lightning_prune.masks import MaskSet
from lightning_prune.named_scores import NamedScores
from lightning_prune.patterns import keep_pattern, parse_pattern
from lightning_prune.prunable import canonical_name, close_names, matching
from lightning_prune.ranking import Pool, common_dtype
from lightning_prune.sharded_ranking import ShardedPool
from lightning_prune.sharding import Layout, Part, any_sharded


def select(
    scores: Mapping[str, Tensor],
    density: float | None = None,
    *,
    fraction: float | None = None,
    remove: int | Mapping[str, int] | None = None,
    scope: str = "global",
    within: MaskSet | None = None,
    rates: Mapping[str, float] | None = None,
    counting: str = "exact",
    granularity: str = "element",
) -> MaskSet:
    """Keep the highest scores.

    Exactly one of ``density``, ``fraction`` and ``remove`` says how many. The count is met exactly: among equal scores
    the later position leaves first (order of ``scores``, then flat index). Infinite scores are ordinary values. A pass
    reads one tensor after the other, so no copy of all scores is made, and ``scores`` may compute its values on access
    (:class:`lightning_prune.scores.MagnitudeScores`); it is read three or four times.

    Args:
        scores: Scores by parameter name, higher = kept; floats or integers of any width.
        density: Fraction to keep of the *original* total (``round(density * total)`` entries, half to even), in
            [0, 1], also with ``within``. Entries pruned earlier stay pruned: where fewer are left, nothing changes.
        fraction: Fraction to remove of what ``within`` still keeps (``round(fraction * remaining)`` entries, half to
            even), in [0, 1].
        remove: Number of entries to remove. A mapping gives it for each tensor by name (others lose nothing), whatever
            the scope; a plain number needs ``scope="global"``.
        scope: ``"global"``: scores of all tensors compete. ``"layer"``: each tensor by itself, and ``density`` and
            ``fraction`` hold for each.
        within: Earlier masks, of the same names and shapes; the result is nested in them. A fill is not carried over.
        rates: Rates of their own: name or pattern -> fraction to remove of what remains, in [0, 1]. Such tensors
            compete among themselves, those of one pattern together (each alone with ``scope="layer"``), and ``density``
            and ``fraction`` then speak of the other tensors. 0: never pruned. Where several patterns match a tensor the
            last one counts. The original lottery ticket paper prunes the output layer at half the rate of the others.
        counting: ``"exact"``, or the rule of a reference implementation by name, with its rounding, its ties and its
            float errors (:data:`lightning_prune.counting.RULES`), applied to each set of competing scores.
            ``network_slimming``, ``open_lth``, ``google_lth``, ``hrank``, ``hrankplus`` and ``deconstructing_lt`` take
            ``fraction``; ``renda`` and ``edge_popup`` take ``density``. ``open_lth`` counts the entries of tensors at
            rate 0 in, though it takes none of them.
        granularity: ``"element"``, or a pattern such as ``"2:4"``: of every 4 neighbours along axis 1 (a layer's
            inputs) the 2 of highest score stay, in every tensor, as GPUs with such units ask for. The pattern is the
            count: nothing else is given but ``within``.

    Sharded scores (``DTensor``: FSDP2, tensor parallelism) compete by their global values and are not brought together:
    counts travel, 0.3 MB two to four times (0.5 MB for 2^31 scores or more). The result is the one of the whole scores,
    ties included; the masks are sharded as the scores are. Every process must call this, with the same arguments.

    Returns:
        The masks, in the order of ``scores`` and on their devices.

    Raises:
        ConfigError: Not exactly one of the three, a number out of range, an unknown scope or counting, a pattern that
            matches nothing; for sharded scores a granularity, or a counting rule that needs all scores in one place.
        SelectionError: No scores, NaN among them, more to remove than there is.
        MaskMismatchError: ``within`` has other names or shapes.

    Example:
        >>> scores = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
        >>> masks = select(scores, density=0.5)
        >>> masks["a"], masks["b"]
        (tensor([ True, False]), tensor([ True, False]))
    """
    pattern = parse_pattern(granularity)
    if pattern is not None:
        return _select_pattern(scores, pattern, within, density, fraction, remove, rates)
    asked = _asked(density, fraction, remove, scope, counting)
    named = NamedScores(scores)
    shapes, dtypes, layout = _inspect(named)
    earlier, remaining = _earlier(within, shapes, layout)
    groups = _groups(asked, scope, list(shapes), rates or {})
    if counting != "exact":
        _check_rule(counting, groups)
    ignored = sum(remaining[name] for group in groups if group.protected for name in group.names)
    masks: dict[str, Tensor] = {}
    for group in groups:
        pool = _pool(named, group, earlier, dtypes, layout)
        field = Competition(
            ordered=pool.ordered,
            remaining=sum(remaining[name] for name in group.names),
            total=sum(shapes[name].numel() for name in group.names),
            ignored=ignored,
        )
        masks.update(pool.keep_largest(_count(group, field, counting)))
    return MaskSet({name: masks[name] for name in shapes})


def _select_pattern(
    scores: Mapping[str, Tensor], pattern: tuple[int, int], within: MaskSet | None, *counts: Any
) -> MaskSet:
    if any(count is not None for count in counts):
        n, m = pattern
        raise ConfigError(f"granularity='{n}:{m}' says how many stay; leave out density=, fraction=, remove=, rates=.")
    named = NamedScores(scores)
    shapes, _, layout = _inspect(named)
    if layout is not None:
        raise ConfigError(f"granularity='{pattern[0]}:{pattern[1]}' is not there for scores sharded between processes.")
    return MaskSet(keep_pattern(named, _earlier(within, shapes, None)[0], *pattern))


@dataclass(frozen=True)
class _Group:
    """Tensors whose scores compete, and what leaves or stays of them: a density, a fraction, or a number to remove."""

    names: list[str]
    kind: str
    amount: Fraction
    protected: bool = False  # by a rate of 0: no counting rule takes any of it


def _pool(
    scores: NamedScores,
    group: _Group,
    earlier: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    layout: Layout | None,
) -> Pool:
    dtype = common_dtype({name: dtypes[name] for name in group.names})
    if layout is None:
        return Pool(scores, group.names, earlier, dtype)
    return ShardedPool(scores.parts(), group.names, earlier, dtype, layout)


def _count(group: _Group, field: Competition, counting: str) -> int:
    """How many entries leave."""
    if counting != "exact" and not group.protected:
        return RULES[counting].count(field, float(group.amount))
    if group.kind == "fraction":
        return round(group.amount * field.remaining)
    if group.kind == "density":
        return max(0, field.remaining - round(group.amount * field.total))
    if group.amount > field.remaining:
        where = repr(group.names[0]) if len(group.names) == 1 else f"{len(group.names)} tensors"
        raise SelectionError(f"remove={group.amount} asks for more than the {field.remaining} entries left in {where}.")
    return int(group.amount)


def _asked(
    density: Any, fraction: Any, remove: Any, scope: str, counting: str
) -> tuple[str, Fraction | dict[str, Fraction]]:
    """The one of the three that was given, as its name and an exact number (or one for each tensor)."""
    given = {"density": density, "fraction": fraction, "remove": remove}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise ConfigError(f"select takes exactly one of density=, fraction= and remove=, got {found}.")
    if scope not in ("global", "layer"):
        raise ConfigError(f"scope={scope!r} is unknown; choose 'global' or 'layer'.")
    if counting != "exact" and counting not in RULES:
        raise ConfigError(f"counting={counting!r} is unknown{close_names(str(counting), ['exact', *RULES])}")
    ((kind, value),) = given.items()
    if kind != "remove":
        return kind, _portion(value, kind)
    if counting != "exact":
        raise ConfigError(f"remove= is an exact count; leave out counting={counting!r}.")
    if isinstance(value, Mapping):
        return kind, {canonical_name(name): _whole(number, f"remove[{name!r}]") for name, number in value.items()}
    if scope == "layer":
        raise ConfigError("with scope='layer', remove= takes a mapping: the number for each tensor by name.")
    return kind, _whole(value, "remove")


def _portion(value: Any, what: str) -> Fraction:
    """A number in [0, 1], exact as it was written: 0.1 is one tenth."""
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)) or not math.isfinite(value):
        raise ConfigError(f"{what} must be a number in [0, 1], got {value!r}.")
    exact = Fraction(str(value))
    if not 0 <= exact <= 1:
        raise ConfigError(f"{what}={value!r} lies outside [0, 1]; it is a fraction, not a percentage or a count.")
    return exact


def _whole(value: Any, what: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ConfigError(f"{what} must be a whole number, 0 or more, got {value!r}.")
    return Fraction(int(value))


def _groups(
    asked: tuple[str, Fraction | dict[str, Fraction]], scope: str, names: list[str], rates: Mapping[str, float]
) -> list[_Group]:
    kind, amount = asked
    owner: dict[str, str] = {}
    for pattern in rates:
        owner.update(dict.fromkeys(matching(pattern, names, "rates"), pattern))
    if isinstance(amount, dict):
        unknown = next((name for name in amount if name not in names), None)
        if unknown is not None:
            raise ConfigError(f"remove: {unknown!r} has no scores{close_names(unknown, names)}")
        if owner:
            raise ConfigError("remove= by tensor already says how much of each tensor leaves; leave out rates=.")
        return [_Group([name], kind, amount.get(name, Fraction(0))) for name in names]
    together: list[_Group] = [_Group([name for name in names if name not in owner], kind, amount)]
    for pattern, rate in rates.items():
        members = [name for name in names if owner.get(name) == pattern]
        portion = _portion(rate, f"rates[{pattern!r}]")
        together.append(_Group(members, "fraction", portion, protected=portion == 0))
    if scope == "layer":
        return [replace(group, names=[name]) for group in together for name in group.names]
    return [group for group in together if group.names]


def _check_rule(counting: str, groups: list[_Group]) -> None:
    takes = RULES[counting].takes
    for group in groups:
        if group.kind != takes and not group.protected:
            hint = "; rates of their own other than 0 are fractions." if takes == "density" else "."
            raise ConfigError(
                f"counting={counting!r} starts from {takes}=, got a {group.kind} for {group.names[0]!r}{hint}"
            )


def _inspect(
    scores: NamedScores,
) -> tuple[dict[str, torch.Size], dict[str, torch.dtype], Layout | None]:
    """Shapes and types, and where scores are sharded how."""
    shapes, dtypes, parts = {}, {}, {}
    for name in scores:
        score = scores.like(name)
        if not isinstance(score, Tensor):
            raise SelectionError(f"the scores of {name!r} must be a tensor, got {type(score).__name__}.")
        shapes[name], dtypes[name], parts[name] = score.shape, score.dtype, Part.of(score)
    sharded = any(part.spread is not None for part in parts.values())
    return shapes, dtypes, Layout(parts) if sharded else None


def _earlier(
    within: MaskSet | None, shapes: Mapping[str, torch.Size], layout: Layout | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The earlier masks of tensors that lost something, and how many entries each tensor has left."""
    remaining = {name: shape.numel() for name, shape in shapes.items()}
    if within is None:
        return {}, remaining
    if within.keys() != shapes.keys():
        odd = ", ".join(map(repr, sorted(within.keys() ^ shapes.keys())[:5]))
        raise MaskMismatchError(f"within and scores belong to different networks: only one of them has {odd}.")
    for name, shape in shapes.items():
        if within[name].shape != shape:
            raise MaskMismatchError(
                f"within[{name!r}] has shape {tuple(within[name].shape)}, its scores {tuple(shape)}."
            )
    masks: dict[str, Tensor] = dict(within)
    if layout is not None:
        masks = {name: part.cut(within[name]) for name, part in layout.parts.items()}
    elif any_sharded(masks.values()):
        raise MaskMismatchError("within is sharded between processes and the scores are not; use scores like it.")
    remaining = {name: kept for name, (kept, _) in within.kept_per_tensor().items()}
    return {name: masks[name] for name, shape in shapes.items() if remaining[name] < shape.numel()}, remaining
