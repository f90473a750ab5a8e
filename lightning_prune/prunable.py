"""Which parameters of a module may be pruned, and how they are named."""

import difflib
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from lightning_prune.errors import ConfigError, NoEffectWarning

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PRUNABLE = (_ConvNd, nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_NEVER = (nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm)


def canonical_name(name: str) -> str:
    """The name of a parameter without the parts that ``torch.compile`` and other wrappers put into it.

    Example:
        >>> canonical_name("model._orig_mod.conv.weight")
        'model.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def close_names(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'a', 'b'?"`` with the names closest to ``name``, for an error message; or what there is."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + ", ".join(map(repr, close)) + "?"
    shown = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
    return f"; there are: {shown}." if names else "; there are none."


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The ``names`` that ``pattern`` means: an exact name, a module's name, or a pattern (``*``, ``?``) for either.

    Args:
        pattern: ``"fc.weight"``, ``"layer1.0"`` (everything in that module) or ``"*.downsample"``.
        names: Names of parameters, canonical (:func:`canonical_name`).
        what: Name of the argument that ``pattern`` came from, for the message.

    Raises:
        ConfigError: ``pattern`` is no string or matches nothing.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"{what} takes names or patterns (strings), got {pattern!r}.")
    names = list(names)
    plain = canonical_name(pattern)
    found = [name for name in names if _means(plain, name)]
    if not found:
        modules = {part for name in names for part in _ancestry(name)}
        raise ConfigError(f"{what}: {pattern!r} matches no parameter and no module{close_names(plain, modules)}")
    return found


def prunable_parameters(
    module: nn.Module, exclude: str | Sequence[str] = (), include: str | Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that pruning may touch, by canonical name, in the order of ``named_parameters``.

    By default: the weights (two dimensions or more) of convolutions of every rank, transposed ones too, of ``Linear``
    and its subclasses, the projections of ``MultiheadAttention`` and the weights of recurrent layers and cells. Never
    biases, normalisation and embeddings. A parameter that several modules share counts once, under its first name; one
    that an embedding or a normalisation shares is left out (a language model's tied output layer, for example).

    Weights that are computed anew in each forward (``torch.nn.utils.parametrize``, weight and spectral normalisation,
    ``torch.nn.utils.prune``) cannot be held at zero and are left out, with a warning that names them.

    Args:
        module: Any module. Lazy layers must have seen a batch.
        exclude: Names or patterns of what to leave out, as :func:`matching` reads them. Wins over ``include``.
        include: Names or patterns of parameters to take in beyond the default. A module's name takes in that module's
            parameters of two dimensions or more; an exact name or a pattern takes in whatever it matches.

    Raises:
        ConfigError: An entry of ``exclude`` or ``include`` matches nothing, a lazy layer has no weights yet, or nothing
            is left to prune.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> list(prunable_parameters(net, exclude="2"))
        ['0.weight']
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    include = (include,) if isinstance(include, str) else tuple(include)
    parameters = {canonical_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
    default, never, computed = _default_set(module)
    excluded = {name for pattern in exclude for name in matching(pattern, [*parameters, *computed], "exclude")}
    included = {name for pattern in include for name in _included(pattern, parameters)}
    left_out = sorted(set(computed) - excluded)
    if left_out:
        warnings.warn(
            f"not pruned: {', '.join(left_out)}. Each is computed anew in every forward (a parametrisation, weight or "
            "spectral normalisation, torch.nn.utils.prune), so a mask would not hold. Remove that, or exclude these "
            "names to silence this warning.",
            NoEffectWarning,
            stacklevel=2,
        )
    excluded_ids = {id(parameters[name]) for name in excluded & parameters.keys()}
    wanted_ids = (default - never | {id(parameters[name]) for name in included}) - excluded_ids
    found: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in wanted_ids:
            continue
        wanted_ids.remove(id(parameter))
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(f"{name} has no weights yet (a lazy layer): run the module on one batch first.")
        if parameter.is_floating_point():
            found[name] = parameter
    if not found:
        raise ConfigError(
            f"nothing to prune in {type(module).__name__}: it has no convolution, linear, attention or recurrent weight"
            + (f" besides what exclude={list(exclude)} leaves out" if exclude else "")
            + "; name parameters to prune with include=[...]."
        )
    return found


def untouched_parameters(
    module: nn.Module, prunable: Iterable[str], exclude: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The parameters that pruning does not touch, each with the reason, as JSON content.

    Args:
        module: The module.
        prunable: Names of the parameters that it touches, as of :func:`prunable_parameters`.
        exclude: The names or patterns with which they were chosen.

    Returns:
        ``name``, ``axis`` (None: the whole tensor), ``size``, ``reason`` and ``where`` of each.
    """
    usual = "biases, normalisation, embeddings and parameters of other kinds of layers are not pruned by default"
    touched, found = set(prunable), []
    for given_name, parameter in module.named_parameters():
        name = canonical_name(given_name)
        if name in touched or isinstance(parameter, UninitializedParameter):
            continue
        pattern = next((pattern for pattern in exclude if _means(canonical_name(pattern), name)), None)
        reason = usual if pattern is None else f"excluded by {pattern!r}"
        found.append({"name": name, "axis": None, "size": parameter.numel(), "reason": reason, "where": ""})
    return found


def _default_set(module: nn.Module) -> tuple[set[int], set[int], list[str]]:
    """Ids of the weights prunable by their module's kind, ids of those that never are, names of the recomputed."""
    default: set[int] = set()
    never: set[int] = set()
    computed: list[str] = []
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, _NEVER):
            never.update(id(p) for p in child.parameters(recurse=False))
        if not isinstance(child, _PRUNABLE):
            continue
        for key in _weight_keys(child):
            parameter = child._parameters.get(key)
            if parameter is not None:
                default.add(id(parameter))
            elif key not in child._parameters:
                computed.append(canonical_name(f"{path}.{key}" if path else key))
    return default, never, computed


def _weight_keys(module: nn.Module) -> list[str]:
    """Attribute names of the weights of a module of a prunable kind."""
    if isinstance(module, nn.RNNBase):
        return [key for key in module._flat_weights_names if key.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return ["weight"]


def _included(pattern: str, parameters: dict[str, nn.Parameter]) -> list[str]:
    found = matching(pattern, parameters, "include")
    is_module = not any(sign in pattern for sign in "*?[") and canonical_name(pattern) not in parameters
    return [name for name in found if not is_module or parameters[name].dim() >= 2]


def _means(plain: str, name: str) -> bool:
    """Whether a canonical name or pattern means a parameter, by its own name or by a module that holds it."""
    return any(part == plain or fnmatchcase(part, plain) for part in _ancestry(name))


def _ancestry(name: str) -> list[str]:
    """A parameter's name and the names of the modules that hold it: ``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
