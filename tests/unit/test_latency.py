"""Measured latency: how, not how much. Clocks are replaced where a number is checked; no absolute time is asserted."""

import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ConfigError, MeasurementError, compare_latency, measure_latency
from lightning_prune.costs import RunAs, timing
from lightning_prune.costs.timing import Interval, check_measurable, empty_call

CPU = torch.device("cpu")


class Clock:
    """A clock that only moves when a model works; it replaces the module ``time`` in the timing code."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    empty_call.cache_clear()
    yield clock
    empty_call.cache_clear()


class Takes(nn.Module):
    """A model whose passes take given times by the clock, the last of them for ever."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.clock, self.seconds, self.passes = clock, seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds(self.passes)
        self.passes += 1
        return x


def test_median_and_quartiles_by_hand(clock: Clock) -> None:
    def seconds(n: int) -> float:
        return 0.001 * (1 + n % 5)  # 1 to 5 ms by turns

    measured = measure_latency(Takes(clock, seconds), torch.zeros(3, 2), seconds=1.0)
    assert measured.calls == 1
    assert (measured.q1_ms, measured.median_ms, measured.q3_ms) == pytest.approx((2, 3, 4), rel=0.05)
    assert measured.samples == pytest.approx(1.0 / 0.003, rel=0.02)
    assert measured.batch_size == 3


def test_short_passes_are_timed_together(clock: Clock) -> None:
    measured = measure_latency(Takes(clock, lambda n: 1e-5), torch.zeros(1), seconds=0.1)
    assert measured.calls == pytest.approx(100, abs=1)
    assert measured.median_ms == pytest.approx(0.01)


def test_warm_up_ends_when_times_stop_falling(clock: Clock) -> None:
    slow = measure_latency(Takes(clock, lambda n: 0.004 + 0.1 * 0.8**n), torch.zeros(1), seconds=0.1)
    at_once = measure_latency(Takes(clock, lambda n: 0.004), torch.zeros(1), seconds=0.1)
    falling = measure_latency(Takes(clock, lambda n: 0.9**n + 1e-3), torch.zeros(1), seconds=0.1)
    assert at_once.warm_up < slow.warm_up
    assert slow.median_ms == pytest.approx(4, rel=0.1)
    assert at_once.median_ms == pytest.approx(4)
    assert falling.warm_up <= 20 * 5 + 3


def test_warm_up_of_slow_passes_is_short(clock: Clock) -> None:
    assert measure_latency(Takes(clock, lambda n: 2.0), torch.zeros(1), seconds=0.1).warm_up == 7


def test_ratio_of_two_models_by_hand(clock: Clock) -> None:
    first, second = Takes(clock, lambda n: 0.020), Takes(clock, lambda n: 0.005 if n % 3 else 0.006)
    found = compare_latency(first, second, torch.zeros(1), seconds=2.0)
    assert found.ratio == pytest.approx(0.25)
    assert found.speedup == pytest.approx(4)
    assert found.low == pytest.approx(0.25)
    assert found.high in (pytest.approx(0.25), pytest.approx(0.3))
    assert found.first.median_ms == pytest.approx(20)


def test_a_machine_that_slows_down_cancels_out(clock: Clock) -> None:
    """The speed of the clock halves every second of it: separate measurements would be off by the same factors."""

    def slowing(seconds: float) -> Callable[[int], float]:
        return lambda n: seconds * 2 ** min(clock.now, 6.0)

    found = compare_latency(
        Takes(clock, slowing(0.02)), Takes(clock, slowing(0.01)), torch.zeros(1), seconds=3.0, within=None
    )
    assert found.first.q3_ms > 2 * found.first.q1_ms
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(0.5, rel=0.05)


def test_pairs_stop_once_the_interval_is_narrow(clock: Clock) -> None:
    def models() -> tuple[Takes, Takes]:
        return Takes(clock, lambda n: 0.02 + 0.001 * (n % 7)), Takes(clock, lambda n: 0.02 + 0.001 * (n % 5))

    early = compare_latency(*models(), torch.zeros(1), seconds=60.0, within=0.05)
    late = compare_latency(*models(), torch.zeros(1), seconds=60.0)
    assert early.half_width <= 0.05
    assert early.first.samples < late.first.samples


def test_quick_passes_are_compared_by_medians_of_five(clock: Clock) -> None:
    """Every fourth pass of either is interrupted for ten times its length."""

    def taken(seconds: float) -> Callable[[int], float]:
        return lambda n: seconds * (10 if n % 4 == 0 else 1)

    found = compare_latency(Takes(clock, taken(2e-3)), Takes(clock, taken(1e-3)), torch.zeros(1), seconds=2.0)
    assert (found.low, found.ratio, found.high) == pytest.approx((0.5, 0.5, 0.5))


# ------------------------------------------------------------------- statistics


@pytest.mark.parametrize("count", [6, 11, 30, 101])
def test_the_interval_holds_the_median_often_enough(count: int) -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, count))
    holds = [i.low <= np.log(2) <= i.high for i in map(Interval.of, draws)]
    assert 0.94 <= np.mean(holds) <= 0.995


def test_the_interval_by_hand() -> None:
    # 11 values: fewer than 2 of them lie below the median with probability 0.0059, fewer than 3 with 0.0327
    interval = Interval.of([float(n) for n in range(1, 12)])
    assert (interval.low, interval.median, interval.high) == (2, 6, 10)
    assert interval.half_width == pytest.approx(4 / 6)


# ------------------------------------------------------------- real clocks, real models


def test_more_work_takes_longer() -> None:
    small, large = nn.Linear(64, 64), nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    found = compare_latency(large, small, torch.rand(64, 512), second_inputs=torch.rand(64, 64), seconds=0.2)
    assert found.ratio < 0.5
    assert json.loads(json.dumps(found.to_json()))["speedup"] == found.speedup


def test_what_was_measured_on_is_recorded() -> None:
    environment = measure_latency(nn.Linear(64, 64), torch.rand(8, 64), seconds=0.02).environment
    assert environment["torch"] == str(torch.__version__)
    assert environment["threads"] == torch.get_num_threads()
    assert environment["dtype"] == "float32"
    assert {"device", "platform", "load", "compiled", "channels_last"} <= environment.keys()


def test_other_batch_sizes_data_types_and_layouts_run_on_a_copy() -> None:
    seen: list[tuple[torch.Size, torch.dtype, bool, bool]] = []

    class Sees(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            last = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((x.shape, x.dtype, last, torch.is_inference_mode_enabled()))
            return super().forward(x)

    model = Sees(3, 16, 3).train()
    inputs = torch.rand(2, 3, 12, 12)
    state = torch.get_rng_state()
    measured = measure_latency(
        model, inputs, seconds=0.01, batch_size=5, dtype=torch.bfloat16, channels_last=True, device="cpu"
    )
    assert set(seen) == {((5, 3, 12, 12), torch.bfloat16, True, True)}
    assert measured.batch_size == 5
    assert measured.environment["dtype"] == "bfloat16"
    assert model.training
    assert model.weight.dtype == torch.float32
    assert model.weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), state)


def test_only_inputs_that_are_batches_change_their_length() -> None:
    inputs = RunAs(batch_size=5).inputs({"x": torch.arange(6.0).view(2, 3), "scale": torch.ones(1), "n": 7})
    assert torch.equal(inputs["x"][:, 0], torch.tensor([0.0, 3, 0, 3, 0]))
    assert inputs["scale"].shape == (1,)
    assert inputs["n"] == 7


def test_a_copy_leaves_the_trainer_behind() -> None:
    class Attached(nn.Linear):
        pass

    model = Attached(4, 4)
    model._trainer = trainer = Trainer()
    copied = RunAs(device="cpu").model(model)
    assert copied is not model
    assert copied._trainer is None
    assert model._trainer is trainer


class Trainer:
    """What must not be copied."""

    def __deepcopy__(self, memo: dict) -> "Trainer":
        raise AssertionError("the trainer was copied")


@pytest.mark.slow
def test_compiled_models_are_measured() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert measure_latency(net, torch.rand(8, 64), seconds=0.05, compiled=True).environment["compiled"]
    assert measure_latency(torch.compile(net), torch.rand(8, 64), seconds=0.05).environment["compiled"]


@pytest.mark.gpu
def test_events_and_clock_agree_on_a_gpu() -> None:
    model, x = nn.Linear(4096, 4096, device="cuda"), torch.rand(4096, 4096, device="cuda")
    measured = measure_latency(model, x, seconds=0.2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        model(x)
    torch.cuda.synchronize()
    assert measured.median_ms == pytest.approx((time.perf_counter() - start) / 50 * 1e3, rel=0.3)


# --------------------------------------------------------------------- bad input


def test_a_pass_too_short_to_time_is_refused() -> None:
    floor = empty_call(CPU)
    with pytest.raises(MeasurementError, match="too small to time"):
        check_measurable([1.5 * floor] * 11, CPU, "Identity")
    check_measurable([10 * floor] * 11, CPU, "Linear")
    with pytest.raises(MeasurementError, match="too small to time"):
        measure_latency(nn.Identity(), torch.zeros(1), seconds=0.01)


def test_a_model_that_needs_other_inputs() -> None:
    with pytest.raises(MeasurementError, match="Linear cannot be run with these example inputs"):
        measure_latency(nn.Linear(4, 2), torch.rand(3, 5))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device='cuda:77' is not there"):
        measure_latency(nn.Linear(4, 2), torch.rand(3, 4), device="cuda:77")


@pytest.mark.parametrize(
    ("options", "match"), [({"seconds": 0}, "seconds=0"), ({"batch_size": 0}, "batch_size=0: expected at least 1")]
)
def test_numbers_out_of_range(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        measure_latency(nn.Linear(4, 2), torch.rand(3, 4), **options)
