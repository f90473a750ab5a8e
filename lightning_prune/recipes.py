"""Recipes come from anywhere: what they may name, how large they may be, and what is said of wrong ones.

A recipe names classes, and reading it imports them. Two rules stand before that, for every file and every option that
``lightning-prune`` reads:

- **Names.** What is imported is defined in :data:`ALLOWED`, or in a package that the user has named with ``--trust``.
- **Size.** A YAML text has bounds on length, depth and what its aliases add up to.

This is no sandbox: trusted classes do what they do, with the arguments that the recipe gives them. A recipe chooses
which files are read, where files are written, and what torchvision downloads.
"""

import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse._common import parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.errors import ConfigError, FileFormatError

ALLOWED = (
    "lightning_prune",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torchmetrics",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
)
"""What a recipe may name unasked; of torch itself only what networks, optimizers and loaders are made of."""

DENIED = (
    "lightning.fabric.cli",
    "lightning.fabric.strategies.launchers",
    "lightning.fabric.utilities",
    "lightning.pytorch.cli",
    "lightning.pytorch.serve",
    "lightning.pytorch.strategies.launchers",
    "lightning.pytorch.utilities",
    "lightning_prune.__main__",
    "lightning_prune.cli",
    "lightning_prune.commands",
    "lightning_prune.sweep",
    "torch.utils.data.datapipes",
    "torchvision.datasets.utils",
)
"""Parts of these that start programs, download, unpack archives or read commands."""

MAX_BYTES, MAX_DEPTH, MAX_NODES = 2**20, 64, 20_000

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


def trusted() -> tuple[str, ...]:
    """Packages that the user has named with ``--trust`` for this command."""
    return _trusted.get()


def split_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--trust NAME[,NAME]`` out of a command's words, wherever it stands; a recipe cannot give this option.

    Returns:
        The names, and the other words.

    Raises:
        ConfigError: No name, or something that is no name of a package or module.
    """
    names, rest = [], []
    left = iter(words)
    for word in left:
        if word != "--trust" and not word.startswith("--trust="):
            rest.append(word)
            continue
        given = word.partition("=")[2] if "=" in word else next(left, "")
        for name in given.split(","):
            if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
                raise ConfigError(f"--trust {given}: expected names of packages or modules, such as my_package.")
            names.append(name)
    return names, rest


@contextmanager
def reading(names: Iterable[str] = ()) -> Iterator[None]:
    """Hold recipes to the two rules while a command runs.

    A module of this name that is not installed but lies in the working directory can then be imported from there, after
    everything that is installed.

    Args:
        names: Packages and modules that a recipe may name beside :data:`ALLOWED`.
    """
    names = tuple(names)
    before = dict(parsing_settings)
    loader, path = jsonargparse.get_loader("yaml"), list(sys.path)

    def load(text: str) -> Any:
        try:
            return loader(_checked(text))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a date that is none
            raise yaml.YAMLError(str(error)) from error

    token = _trusted.set(names)
    try:
        jsonargparse.set_parsing_settings(
            import_path_denylist=["*", *(name for name in DENIED if name not in names)],
            import_path_allowlist=[*ALLOWED, *names],
        )
        jsonargparse.set_loader("yaml", load, (yaml.YAMLError,))
        if any(_missing(name.split(".")[0]) for name in names):
            sys.path.append(os.getcwd())
        yield
    finally:
        _trusted.reset(token)
        jsonargparse.set_loader("yaml", loader, (yaml.YAMLError,))
        parsing_settings.update(before)
        sys.path[:] = path


def _missing(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is None


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        FileFormatError: No YAML, too large, too deep, or with aliases that multiply it.
    """
    try:
        return yaml.safe_load(_checked(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileFormatError(f"this is no YAML of plain values: {' '.join(str(error).split())[:300]}") from error


class _TooMuch(yaml.YAMLError):
    """A text that would take more memory or time than any recipe does."""


def _checked(text: str) -> str:
    """Walk over the events of a YAML text, which takes no memory, before anything is built from it."""
    if len(text) > MAX_BYTES:
        raise _TooMuch(f"it has {len(text)} characters, more than the {MAX_BYTES} of any recipe")
    sizes: dict[str, int] = {}  # by anchor: nodes that an alias to it stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor of each open node, and nodes counted when it began
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise _TooMuch(f"the alias *{event.anchor} stands within what it repeats")
            nodes += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, begun = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - begun
        if len(open_nodes) > MAX_DEPTH:
            raise _TooMuch(f"it is nested deeper than {MAX_DEPTH} levels")
        if nodes > MAX_NODES:
            raise _TooMuch(f"it stands for more than {MAX_NODES} values")
    return text


class RecipeParser(LightningArgumentParser):
    """Says what is wrong with a recipe in a line or two, without all options and all types that did not fit either."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one message and leave with exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"lightning-prune: {essence(message)}", file=sys.stderr)
        sys.exit(2)


def essence(message: str) -> str:
    """The part of a parser's message that names the wrong value, with the option it stands under.

    A recipe's classes are tried as every type that an option takes, and the parser lists why each did not fit. The
    innermost class that was named is the one that was meant.
    """
    denied = re.search(r"Importing '([^']+)' is not allowed", message)
    if denied:
        return _not_trusted(denied[1])
    lines = message.splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip(" -").startswith("Problem with given class_path")]
    if not starts:
        return message
    start = starts[-1]
    depth = len(lines[start]) - len(lines[start].lstrip())
    block = itertools.takewhile(lambda line: len(line) - len(line.lstrip()) > depth, lines[start + 1 :])
    said = [lines[start].lstrip(" -"), *(line.strip() for line in block)]
    return " ".join([lines[0].strip(), *said])


def _not_trusted(name: str) -> str:
    known = any(name == entry or name.startswith(f"{entry}.") for entry in DENIED)
    why = "is among what no recipe may name" if known else "is not among what a recipe may name unasked"
    return (
        f"{name} {why}: nothing of it was imported. Recipes may name classes of {', '.join(ALLOWED)}. "
        f"If you know this one, and what it does is what you want, add --trust {name.rpartition('.')[0] or name}."
    )


class RecipeCLI(LightningCLI):
    """LightningCLI with messages of our own."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make LightningCLI's parser."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = RecipeParser  # which class it makes cannot be told to every Lightning
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without ``--trust``, which is no option of the parser: other processes need it in ``sys.argv``."""
        before = sys.argv
        if args is None:
            sys.argv = [before[0], *split_trust(before[1:])[1]]
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise FileFormatError(
                f"a recipe is a text in UTF-8, and one of the files given is none: {error}"
            ) from error
        finally:
            sys.argv = before
