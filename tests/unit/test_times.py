from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.errors import ConfigError
from lightning_prune.times import TrainTime


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0st", 0),
        ("500st", 500),
        ("2ep", 14),
        (" 2 ep ", 14),
        ("3%", 30),
        ("0.1%", 1),
        ("100%", 1000),
        ("0.25%", 2),  # 2.5 steps: half to even
        ("0.35%", 4),  # 3.5 steps: half to even
        ("07st", 7),
    ],
)
def test_in_steps(text: str, steps: int) -> None:
    assert TrainTime.parse(text).in_steps(total_steps=1000, steps_per_epoch=7) == steps


@given(st.integers(0, 1000), st.integers(1, 10**7))
def test_percentages_are_exact(tenths: int, total: int) -> None:
    time = TrainTime.parse(f"{tenths // 10}.{tenths % 10}%")
    exact = Fraction(tenths, 1000) * total
    steps = time.in_steps(total)
    assert abs(steps - exact) <= Fraction(1, 2)
    assert 0 <= steps <= total


@given(st.integers(0, 10**6), st.sampled_from(["ep", "st"]))
def test_text_round_trip(number: int, unit: str) -> None:
    time = TrainTime.parse(f"{number}{unit}")
    assert TrainTime.parse(str(time)) == time
    assert str(time) == f"{number}{unit}"


@pytest.mark.parametrize("text", ["3%", "0.5%", "12.25%", "33.3333333%", "0.00000001%"])
def test_percentage_round_trip(text: str) -> None:
    assert str(TrainTime.parse(text)) == text
    assert TrainTime.parse(str(TrainTime.parse(text))) == TrainTime.parse(text)


def test_a_time_passes_through() -> None:
    time = TrainTime.parse("3%")
    assert TrainTime.parse(time) is time


@pytest.mark.parametrize(
    "text", ["", "3", "%", "-1st", "1e3st", "3 %%", "2eps", "٣%", "nan%", "3%\n4", None, 3, 0.5, b"3%"]
)
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"to=.* is not a time: .*'2ep'.*'500st'.*'3%'"):
        TrainTime.parse(text, "to")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1.5ep", "0.5st"])
def test_parts_of_steps_and_epochs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"to='{text}': .* must be whole; use '500st' or '3%'"):
        TrainTime.parse(text, "to")


def test_beyond_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"to='100.1%' lies beyond the end of training"):
        TrainTime.parse("100.1%", "to")


def test_an_epoch_of_unknown_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2ep: an epoch .* no known length; give the time in steps"):
        TrainTime.parse("2ep").in_steps(total_steps=100)
