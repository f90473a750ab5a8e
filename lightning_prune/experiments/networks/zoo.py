"""Any classification network of torchvision, by its name."""

import difflib
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.networks.init import check_classes


def torchvision_model(name: str, num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """Build a classification network of torchvision.

    The network is torchvision's own, so its parameter names are too; it gains ``reset_parameters()``, which draws what
    torchvision would draw for a new one. Auxiliary outputs (GoogLeNet, Inception) are left out.

    Args:
        name: As ``torchvision.models.list_models()`` spells it, such as ``"resnet50"``.
        num_classes: Outputs. With ``weights`` of another class count, the last layer is new.
        weights: Name of pretrained weights (``"DEFAULT"``, ``"IMAGENET1K_V2"``), downloaded by torchvision into its
            cache; or nothing: random.

    Returns:
        The network: images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ConfigError: Unknown network or weights (close names are given), or weights that cannot be fetched.

    Example:
        >>> sum(p.numel() for p in torchvision_model("resnet18").parameters())
        11689512
    """
    from torchvision import models  # slow to import

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no classification network named {name!r}.{_suggest(name, known)}")
    check_classes(num_classes)
    if weights is None:
        network = _fresh(name, num_classes)
    else:
        names = [*models.get_model_weights(name).__members__, "DEFAULT"]
        if weights not in names:
            raise ConfigError(f"torchvision's {name} has no weights named {weights!r}; it has {', '.join(names)}.")
        try:
            network = models.get_model(name, weights=weights, **_options(name, pretrained=True))
        except OSError as error:
            raise ConfigError(
                f"the weights {weights} of {name} could not be fetched ({error}); check the connection, or leave out "
                "weights to start from random ones."
            ) from error
        _fit_head(network, num_classes)
    # A partial, not a bound method: copies and pickles of the network then reset themselves, not the original.
    object.__setattr__(network, "reset_parameters", partial(_draw_anew, network, name, num_classes))
    return network


def _options(name: str, pretrained: bool) -> dict[str, Any]:
    if name not in ("googlenet", "inception_v3"):
        return {}
    return {"aux_logits": False} if pretrained else {"aux_logits": False, "init_weights": True}


def _fresh(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=num_classes, **_options(name, pretrained=False))


def _draw_anew(network: nn.Module, name: str, num_classes: int) -> None:
    network.load_state_dict(_fresh(name, num_classes).state_dict())


def _fit_head(network: nn.Module, num_classes: int) -> None:
    """Replace the last linear layer (or, where there is none, convolution) if it gives another number of classes."""
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    linear = [(path, layer) for path, layer in layers if isinstance(layer, nn.Linear)]
    path, head = (linear or layers)[-1]
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        unchanged = head.out_features == num_classes
    else:
        new = nn.Conv2d(head.in_channels, num_classes, 1)
        unchanged = head.out_channels == num_classes
    if not unchanged:
        parent, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(parent), attribute, new)


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=4, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else " torchvision.models.list_models() lists them."
