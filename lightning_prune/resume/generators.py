"""The state of the generators a fit draws from, as tensors, integers and lists that ``weights_only`` loading takes."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_generators(explicit: Iterable[torch.Generator] = (), device: torch.device | None = None) -> dict[str, Any]:
    """Read the global generators of torch, Python and NumPy, and some explicit ones.

    Args:
        explicit: Generators that loaders and samplers hold; told apart by their order.
        device: A CUDA device whose generator is read too, once CUDA is in use.

    Returns:
        ``torch`` (bytes), ``python`` [version, (625,), gauss or None], ``numpy`` [(624,), position, has_gauss, gauss],
        ``explicit`` (list of bytes), and ``cuda`` (bytes) where there is one. ``numpy`` is missing where the program
        has put another bit generator in the place of NumPy's default.
    """
    version, python, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(python), gauss],
        "explicit": [generator.get_state() for generator in explicit],
    }
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what data sets draw from)
    if numpy["bit_generator"] == "MT19937":
        keys, position = numpy["state"]["key"], int(numpy["state"]["pos"])
        state["numpy"] = [torch.from_numpy(keys.astype(np.int64)), position, int(numpy["has_gauss"]), numpy["gauss"]]
    if device is not None and device.type == "cuda" and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_generators(
    state: dict[str, Any], explicit: Iterable[torch.Generator] = (), device: torch.device | None = None
) -> None:
    """Undo :func:`get_generators`; explicit generators are left alone where their number differs from the saved one."""
    torch.set_rng_state(state["torch"].cpu())
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    if "numpy" in state:
        keys, position, has_gauss, gauss = state["numpy"]
        legacy = ("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss)
        np.random.set_state(legacy)  # noqa: NPY002
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    generators = list(explicit)
    if len(generators) == len(state["explicit"]):
        for generator, saved in zip(generators, state["explicit"], strict=True):
            generator.set_state(saved.cpu())


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Put the global generators back afterwards, so that what is drawn inside changes nothing that comes later."""
    before = get_generators((), device)
    try:
        yield
    finally:
        set_generators(before, (), device)


def reseed(resume_state: dict[str, Any], seed: int) -> dict[str, Any]:
    """A :class:`ResumeState`'s state with other random numbers: who resumes from it goes on with other SGD noise.

    Order and augmentation of the data differ from there on, also within the epoch that is under way: it goes on at the
    same place of another order.

    Args:
        resume_state: What :meth:`ResumeState.state_dict` gave.
        seed: At least 0. The same seed gives the same noise.
    """
    ranks = []
    for rank, own in enumerate(resume_state["ranks"]):
        fresh = {
            key: _seeded(own[key], [seed, rank, number])
            for number, key in enumerate(("iter", "first", "now"))
            if own.get(key) is not None
        }
        ranks.append({**own, **fresh})
    # samplers with a seed of their own (several processes) are to be given this one by who branches
    data, key = dict(resume_state["data"]), "seed of the sampler"
    if key in data:
        data[key] = [seed if earlier >= 0 else earlier for earlier in data[key]]
    return {**resume_state, "ranks": ranks, "data": data}


def _seeded(state: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """What :func:`get_generators` would give for the same generators, newly seeded."""
    first, *others = (int(n) for n in np.random.SeedSequence(seeds).generate_state(1 + len(state["explicit"])))
    version, python, gauss = random.Random(first).getstate()
    fresh: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(first).get_state(),
        "python": [version, torch.tensor(python), gauss],
        "explicit": [torch.Generator().manual_seed(n).get_state() for n in others],
    }
    if "numpy" in state:
        numpy: Any = np.random.RandomState(first).get_state(legacy=False)
        keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
        fresh["numpy"] = [keys, int(numpy["state"]["pos"]), int(numpy["has_gauss"]), numpy["gauss"]]
    if "cuda" in state and torch.cuda.is_available():
        fresh["cuda"] = torch.Generator("cuda").manual_seed(first).get_state()
    return fresh


def find_generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The torch generators that loaders, their samplers and batch samplers hold, each once, in order."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        for holder in (
            loader,
            getattr(loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        ):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
