"""Points in training time: ``"2ep"``, ``"500st"``, ``"3%"``. The only place that parses them."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from lightning_prune.errors import ConfigError

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ep|st|%)\s*", re.ASCII)
_UNITS = {"ep": "epochs", "st": "optimizer steps", "%": "percent of one training"}


@dataclass(frozen=True)
class TrainTime:
    """A point in one training, or a length of it.

    Args:
        value: How many; exact, so that "0.1%" is one thousandth. Whole for ``ep`` and ``st``; at most 100 for ``%``.
        unit: ``"ep"`` epochs, ``"st"`` optimizer steps (``trainer.global_step``), ``"%"`` percent of the length of one
            training.

    Example:
        >>> TrainTime.parse("3%").in_steps(total_steps=30000)
        900
        >>> str(TrainTime.parse("500st"))
        '500st'
    """

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: "str | TrainTime", what: str = "time") -> "TrainTime":
        """Read ``"<number><unit>"``.

        Args:
            text: The text, or a time already parsed.
            what: Name of the argument, for the message.

        Raises:
            ConfigError: Not of that form, a fraction of an epoch or step, or more than 100 %.
        """
        if isinstance(text, cls):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"{what}={text!r} is not a time: write a number with its unit, such as '2ep' (epochs), "
                "'500st' (optimizer steps) or '3%' (of one training's length)."
            )
        value, unit = Fraction(match[1]), match[2]
        if unit != "%" and value.denominator != 1:
            raise ConfigError(f"{what}={text!r}: {_UNITS[unit]} must be whole; use '500st' or '3%' for finer points.")
        if unit == "%" and value > 100:
            raise ConfigError(f"{what}={text!r} lies beyond the end of training (100%).")
        return cls(value, unit)

    def in_steps(self, total_steps: int, steps_per_epoch: int | None = None) -> int:
        """The time in steps: percentages of ``total_steps`` are rounded to the nearest step, half to even.

        Raises:
            ConfigError: An epoch has no known length.
        """
        if self.unit == "%":
            return round(self.value * total_steps / 100)
        if self.unit == "st":
            return int(self.value)
        if steps_per_epoch is None:
            raise ConfigError(f"{self}: an epoch of this data has no known length; give the time in steps ('500st').")
        return int(self.value) * steps_per_epoch

    def __str__(self) -> str:
        number = Decimal(self.value.numerator) / Decimal(self.value.denominator)  # exact: it was read from decimals
        return f"{number:f}{self.unit}"
