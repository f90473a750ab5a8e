"""The errors and the warning that this library raises, in one place.

Every message says what was given, what was expected, where, and what to do.
"""


class PruneError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigError(PruneError, ValueError):
    """An argument, or a combination of callbacks, that cannot work."""


class SelectionError(PruneError, ValueError):
    """Scores or counts from which no mask can be selected."""


class MaskMismatchError(PruneError, ValueError):
    """Masks, a ticket or a plan that belong to another network."""


class FileFormatError(PruneError, ValueError):
    """A file that is damaged, foreign, or written by a later version."""


class WriteError(PruneError, OSError):
    """A file that the system could not write; the earlier one is unchanged."""


class ResumeError(PruneError, RuntimeError):
    """A checkpoint from which this run cannot go on."""


class TraceError(PruneError, RuntimeError):
    """A model whose channels cannot be followed."""


class BudgetError(PruneError, ValueError):
    """A budget that cannot be met."""


class MeasurementError(PruneError, RuntimeError):
    """A cost or a latency that cannot be measured."""


class EqualityError(PruneError, RuntimeError):
    """A compact model that does not compute what its masked parent computes."""


class ExportError(PruneError, RuntimeError):
    """A model that cannot be exported, or an exported file that computes something else."""


class NoEffectWarning(UserWarning):
    """Something was asked for and changed nothing."""


class CollapseWarning(UserWarning):
    """A layer has lost all of its weights, so that nothing of its input passes it."""
