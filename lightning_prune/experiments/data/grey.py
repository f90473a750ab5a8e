"""Small grey images: scikit-learn's digits (8x8, nothing to download) and MNIST (28x28)."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.data.module import Split, Splits, TensorDataModule, hold_out
from lightning_prune.experiments.data.roots import data_root, missing_data
from lightning_prune.experiments.data.transforms import Pixels

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Digits(TensorDataModule):
    """The 1,797 handwritten digits that ship with scikit-learn: real data, nothing is downloaded.

    The split is stratified (the same share of every class) and always the same for one ``seed``.

    Args:
        batch_size: Images a training batch.
        eval_batch_size: Images a batch in validation and test.
        val_fraction: Share of the images held out for validation, in (0, 1).
        test_fraction: Share of the images held out for test, in (0, 1).
        drop_last: Leave out a last training batch that is not full.
        watch_test: Show the test data as a second validation loader.
        seed: Of the split, and of the order with several processes.

    Shape:
        images: (N, 1, 8, 8) float32 in [0, 1]; labels: (N,) int64 in 0...9.

    Raises:
        ConfigError: The fractions leave a split empty.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        drop_last: bool = False,
        watch_test: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, watch_test, seed)
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ConfigError(
                f"val_fraction={val_fraction!r}, test_fraction={test_fraction!r}: both must be above 0 and their sum "
                "below 1, so that all three splits hold images."
            )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def load(self) -> Splits:
        """Read scikit-learn's digits and split them class by class."""
        from sklearn.datasets import load_digits  # heavy, and only needed here

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
        full = Split(images, torch.from_numpy(digits.target).long())
        generator = torch.Generator().manual_seed(self.seed)
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for label in range(self.num_classes):
            members = (full.labels == label).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            val, test = (max(1, round(len(members) * share)) for share in (self.val_fraction, self.test_fraction))
            for part, chosen in zip(parts, members.split([len(members) - val - test, val, test]), strict=True):
                part.append(chosen)
        train, val_part, test_part = (full.take(torch.cat(part).sort().values) for part in parts)
        return Splits(train, val_part, test_part)


class MNIST(TensorDataModule):
    """MNIST: 60,000 training images, some of them held out for validation, and 10,000 test images.

    Read through torchvision, held as bytes (55 MB), made float32 batch by batch.

    Args:
        root: Folder that holds ``MNIST/raw``. Default: the environment variable ``LIGHTNING_PRUNE_DATA``, else a folder
            in the user's cache.
        batch_size: Images a training batch (default 60, as the lottery ticket hypothesis).
        eval_batch_size: Images a batch in validation and test.
        val_size: Training images held out for validation, drawn with ``seed`` (default 5000, same source).
        normalize: Shift and scale to mean 0, deviation 1 (0.1307, 0.3081); else pixels in [0, 1].
        download: Fetch the files if they are missing.
        drop_last: Leave out a last training batch that is not full.
        watch_test: Show the test data as a second validation loader.
        seed: Of the held-out images, and of the order with several processes.

    Shape:
        images: (N, 1, 28, 28) float32 as loaders give them; labels: (N,) int64 in 0...9.

    Raises:
        ConfigError: The files are missing or damaged, or ``val_size`` leaves a split empty.
    """

    num_classes = 10

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 60,
        eval_batch_size: int = 1000,
        val_size: int = 5000,
        normalize: bool = False,
        download: bool = False,
        drop_last: bool = False,
        watch_test: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, watch_test, seed)
        self.root, self.download = data_root(root), download
        self.val_size = val_size
        self.train_transform = self.eval_transform = Pixels([0.1307], [0.3081]) if normalize else Pixels()

    def prepare_data(self) -> None:
        """Download what is missing, once a machine, if asked to."""
        if self.download:
            self._read(train=True, download=True)
            self._read(train=False, download=True)

    def load(self) -> Splits:
        """Read both files and hold out the validation images."""
        train, val = hold_out(self._read(train=True), self.val_size, self.seed)
        return Splits(train, val, self._read(train=False))

    def _read(self, train: bool, download: bool = False) -> Split:
        from torchvision.datasets import MNIST as Files  # noqa: N811  (slow to import, and only needed here)

        folder = self.root / "MNIST" / "raw"
        try:
            files = Files(str(self.root), train=train, download=download)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if all((folder / name).is_file() for name in _FILES):
                raise ConfigError(f"{folder} is damaged ({reason}); delete it and fetch the files anew.") from error
            expected = f"MNIST/raw with the four files {', '.join(_FILES)}"
            raise missing_data("MNIST", self.root, expected, reason if download else "") from error
        return Split(files.data.unsqueeze(1), files.targets.long())
