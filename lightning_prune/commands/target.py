"""Which network a command works on: a name of torchvision or timm, a function of the user's, or a recipe."""

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.compact_files import load_compact
from lightning_prune.errors import ConfigError, FileFormatError, MaskMismatchError
from lightning_prune.files import read_state_dict
from lightning_prune.recipes import essence, parse_yaml
from lightning_prune.reports.zoo import torchvision_options, zoo

IMAGE_SECTIONS = ("torchvision classification", "torchvision segmentation", "timm")


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which network, and with which inputs it runs."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a torchvision or timm name; package.module:function of your own that returns an nn.Module; or a recipe "
        "(.yaml) of a LightningModule",
    )
    parser.add_argument(
        "--init-args", default="{}", metavar="JSON", help="arguments for the function, such as '{\"width\": 32}'"
    )
    parser.add_argument("--weights", metavar="FILE", help="a compact file of save_compact, or a checkpoint of tensors")
    parser.add_argument("--pixels", type=int, metavar="N", help="side of one square colour image (default: 224)")
    parser.add_argument(
        "--shape", metavar="1x1x28x28", help="shape of one input tensor, for networks that take other than images"
    )


def load_target(given: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Build the network, load its weights, and make its example inputs.

    Raises:
        ConfigError: No such network, it cannot be built, or an option that does not fit.
        FileFormatError: A file of weights that cannot be read.
        MaskMismatchError: Weights of another network.
    """
    build, example = _resolve(given.model, given.init_args)
    try:
        model = build()
    except Exception as error:
        raise ConfigError(f"--model {given.model} could not be built ({type(error).__name__}: {error}).") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {given.model} gave a {type(model).__name__}; expected an nn.Module.")
    if given.weights:
        load_weights(model, Path(given.weights))
    return model, _inputs(given, model, example)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a compact file (the model shrinks) or a checkpoint of tensors (``state_dict``, or Lightning's) in place."""
    if path.suffix == ".safetensors":
        load_compact(model, path)
        return
    try:
        state = read_state_dict(path)
    except FileFormatError as error:
        raise FileFormatError(f"--weights: {error}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        first = " ".join(str(error).split())[:300]
        raise MaskMismatchError(f"--weights {path} do not fit this {type(model).__name__}: {first}") from error


def _resolve(name: str, init_args: str) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """A function that builds the network, and one that makes its example inputs where these are not one image."""
    try:
        options = json.loads(init_args)
        assert isinstance(options, dict)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"--init-args {init_args}: expected a JSON object of keyword arguments.") from error
    if name.endswith((".yaml", ".yml")):
        return _recipe(Path(name))
    bare = name.removeprefix("torchvision/").removeprefix("timm/")
    known = {entry.name: entry for entry in zoo()}
    entry = known.get(name) or known.get(f"torchvision/{bare}")
    example = entry.inputs if entry is not None and entry.section not in IMAGE_SECTIONS else None
    import torchvision.models as models

    if not name.startswith("timm/") and bare in models.list_models():
        return lambda: models.get_model(bare, **{**torchvision_options(bare), **options}), example
    timm = _timm()
    if timm is not None and not name.startswith("torchvision/") and timm.is_model(bare):
        return lambda: timm.create_model(bare, pretrained=False, **options), example
    if ":" in name or "." in name:
        function = _import(name)
        return lambda: function(**options), None
    names = [*models.list_models(), *(timm.list_models() if timm is not None else [])]
    close = difflib.get_close_matches(bare, names, 3)
    raise ConfigError(
        f"--model {name}: no network of torchvision{' or timm' if timm else ' (timm is not installed)'} has this name"
        + (f"; near it are {', '.join(close)}." if close else ".")
        + " A function of your own is given as package.module:function."
    )


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        return None
    return timm


def _import(name: str) -> Callable[..., Any]:
    module, separator, attribute = name.partition(":")
    if not separator:
        module, _, attribute = name.rpartition(".")
    sys.path.insert(0, "")  # a module beside the user, as with python -m
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # an import runs the user's code, which may raise anything
        raise ConfigError(
            f"--model {name}: cannot import {attribute!r} from {module!r} ({type(error).__name__}: {error})."
        ) from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise ConfigError(f"--model {name} is a {type(found).__name__}; expected a class or function without it.")
    return found


def _recipe(path: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The LightningModule of a recipe, and the input part of its first training batch."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule, LightningModule

    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
        parts = {key: content[key] for key in ("model", "data") if key in content}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningModule, "model")
        if "data" in parts:
            parser.add_subclass_arguments(LightningDataModule, "data")
        built = parser.instantiate_classes(parser.parse_object(parts))
    except Exception as error:  # jsonargparse and the user's own constructors raise many kinds
        reason = " ".join(essence(str(error)).split())[:400]
        raise ConfigError(f"--model {path} is no recipe with a model ({type(error).__name__}: {reason}).") from error

    def first_batch() -> Any:
        data = built.get("data")
        if data is None:
            return None
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        return batch[0] if isinstance(batch, (list, tuple)) else batch

    return lambda: built["model"], first_batch


def _inputs(given: argparse.Namespace, model: nn.Module, example: Callable[[], Any] | None) -> Any:
    if given.shape:
        try:
            sizes = [int(n) for n in given.shape.lower().split("x")]
            assert sizes
            assert min(sizes) > 0
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"--shape {given.shape}: expected positive sizes such as 1x3x224x224.") from error
        return torch.rand(sizes)
    if given.pixels is not None:
        if given.pixels < 1:
            raise ConfigError(f"--pixels {given.pixels}: expected a positive number.")
        return torch.rand(1, 3, given.pixels, given.pixels)
    own = getattr(model, "example_input_array", None)
    if own is None and example is not None:
        own = example()
    if own is not None:
        return own
    size = getattr(model, "pretrained_cfg", None) or {}
    return torch.rand(1, *size.get("input_size", (3, 224, 224)))
