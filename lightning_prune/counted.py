"""Density and sparsity, from the two counts that they are made of: one place for masks, events and records."""

from typing import TYPE_CHECKING


class Counted:
    """What knows how many weights or channels it keeps (``kept``) of how many (``total``)."""

    if TYPE_CHECKING:

        @property
        def kept(self) -> int:
            """Weights or channels that are left."""

        @property
        def total(self) -> int:
            """Those of the dense network."""

    @property
    def density(self) -> float:
        """``kept / total``, in [0, 1]; 1 where there is nothing to keep."""
        total = self.total
        return self.kept / total if total else 1.0

    @property
    def sparsity(self) -> float:
        """``(total - kept) / total``, in [0, 1]; 0 where there is nothing to keep."""
        total = self.total
        return (total - self.kept) / total if total else 0.0
