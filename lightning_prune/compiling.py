"""Whether loops can be compiled here: by Numba, which is optional (``pip install numba``)."""

import functools
from importlib.util import find_spec


@functools.cache
def can_compile() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None  # looks through folders, at every call if it were not remembered
