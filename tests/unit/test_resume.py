"""Generators, positions, and calls out of turn; real fits are in tests/integration."""

import io
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from lightning_prune.errors import ConfigError, ResumeError
from lightning_prune.resume import ResumeState
from lightning_prune.resume.generators import find_generators, get_generators, set_generators
from lightning_prune.resume.limits import (
    BATCH_END,
    BETWEEN_EPOCHS,
    INSIDE_BATCH,
    INSIDE_VALIDATION,
    VALIDATION_END,
    find_position,
)


def draw(explicit: torch.Generator) -> list[float]:
    return [
        torch.rand(1).item(),
        torch.randn(3).sum().item(),
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),  # noqa: NPY002
        float(np.random.standard_normal()),  # noqa: NPY002
        torch.rand(1, generator=explicit).item(),
    ]


def test_generators_go_on_after_a_trip_through_weights_only_loading() -> None:
    explicit = torch.Generator().manual_seed(4)
    draw(explicit)  # leaves Python's and NumPy's second normal number in store
    file = io.BytesIO()
    torch.save(get_generators([explicit]), file)
    expected = [draw(explicit), draw(explicit)]
    assert expected[0] != expected[1]
    file.seek(0)
    set_generators(torch.load(file, weights_only=True), [explicit])
    assert [draw(explicit), draw(explicit)] == expected


def test_reading_generators_draws_nothing() -> None:
    explicit = torch.Generator().manual_seed(4)
    state = get_generators([explicit])
    once = draw(explicit)
    set_generators(state, [explicit])
    for _ in range(3):
        get_generators([explicit])
    assert draw(explicit) == once


def test_a_saved_state_does_not_follow_the_generator() -> None:
    state = get_generators()
    before = {"torch": state["torch"].clone(), "python": state["python"][1].clone(), "numpy": state["numpy"][0].clone()}
    draw(torch.Generator())
    np.random.random(700)  # noqa: NPY002  (fills NumPy's table anew)
    assert torch.equal(state["torch"], before["torch"])
    assert torch.equal(state["python"][1], before["python"])
    assert torch.equal(state["numpy"][0], before["numpy"])


def test_explicit_generators_are_left_alone_where_their_number_differs() -> None:
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    state = get_generators([one])
    set_generators(state, [one, other])
    assert torch.equal(other.get_state(), torch.Generator().manual_seed(2).get_state())


def test_another_bit_generator_of_numpy_is_left_out() -> None:
    original = np.random.mtrand._rand._bit_generator  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = get_generators()
        assert "numpy" not in state
        set_generators(state)
    finally:
        np.random.set_bit_generator(original)
    assert "numpy" in get_generators()


def test_generators_of_loaders_and_samplers_are_found_once() -> None:
    shared, own = torch.Generator(), torch.Generator()
    data = range(8)
    plain = DataLoader(data, 2, shuffle=True, generator=shared)  # type: ignore[arg-type]
    sampler = RandomSampler(data, generator=own)
    batches = DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))  # type: ignore[arg-type]
    without = DataLoader(data, sampler=SequentialSampler(data))  # type: ignore[arg-type]
    assert [id(g) for g in find_generators([plain, plain, batches, without, object()])] == [id(shared), id(own)]


def counts(ready: int, started: int, processed: int, completed: int) -> SimpleNamespace:
    current = SimpleNamespace(ready=ready, started=started, processed=processed, completed=completed)
    return SimpleNamespace(current=current)


@pytest.mark.parametrize(
    ("epoch", "batch", "hook", "position"),
    [
        ((0, 0, 0, 0), (0, 0, 0, 0), "on_train_start", BETWEEN_EPOCHS),
        ((2, 1, 1, 1), (6, 6, 6, 6), "on_train_epoch_start", BETWEEN_EPOCHS),
        ((1, 1, 1, 0), (6, 6, 6, 6), "on_train_epoch_end", BETWEEN_EPOCHS),
        ((1, 1, 1, 1), (6, 6, 6, 6), None, BETWEEN_EPOCHS),
        ((1, 1, 0, 0), (3, 2, 2, 2), "on_train_batch_start", INSIDE_BATCH),
        ((1, 1, 0, 0), (3, 3, 2, 2), "optimizer_step", INSIDE_BATCH),
        ((1, 1, 0, 0), (3, 3, 3, 2), "on_train_batch_end", BATCH_END),
        ((1, 1, 0, 0), (3, 3, 3, 3), "on_validation_end", VALIDATION_END),
        ((1, 1, 0, 0), (3, 3, 3, 3), "on_validation_batch_end", INSIDE_VALIDATION),
        ((1, 1, 0, 0), (3, 3, 3, 3), None, INSIDE_VALIDATION),
    ],
)
def test_positions(epoch: Any, batch: Any, hook: str | None, position: str) -> None:
    epoch_loop = SimpleNamespace(batch_progress=counts(*batch))
    fit_loop = SimpleNamespace(epoch_progress=counts(*epoch), epoch_loop=epoch_loop)
    trainer: Any = SimpleNamespace(fit_loop=fit_loop, lightning_module=SimpleNamespace(_current_fx_name=hook))
    assert find_position(trainer) == position


def test_out_of_turn() -> None:
    state = ResumeState()
    assert state.state_dict() == {}
    state.load_state_dict({})
    state.detach()


@pytest.mark.parametrize("version", [99, None, "1"])
def test_a_foreign_state_is_refused(version: Any) -> None:
    with pytest.raises(ResumeError, match=r"resume state has version .*, this library reads up to 1; upgrade"):
        ResumeState().load_state_dict({"version": version})


@pytest.mark.parametrize("batches", [-1, 1.5, True, "3"])
def test_fast_forward_takes_a_count(batches: Any) -> None:
    with pytest.raises(ConfigError, match="give the number of batches to leave out, an integer >= 0"):
        ResumeState().fast_forward_next_epoch(batches)


def test_attach_and_detach_leave_no_trace() -> None:
    import lightning.pytorch as pl

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    before = [set(vars(loop)) for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop)]
    first, second = ResumeState(), ResumeState()
    for state in (first, first, second):
        state.attach(trainer)
    assert "run" in vars(trainer.fit_loop)
    wrapped = trainer.fit_loop.run
    for state in (second, first):
        state.detach()
        state.detach()
    assert [set(vars(loop)) for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop)] == before
    assert trainer.fit_loop.run != wrapped
