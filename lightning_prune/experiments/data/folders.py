"""Images in folders, one folder a class: ImageNet, or any collection of images."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_prune.errors import ConfigError
from lightning_prune.experiments.data.roots import data_root

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of ImageNet


class ImageFolders(LightningDataModule):
    """Images under ``root``: ``train/<class>/``, ``val/<class>/``, and where there is one ``test/<class>/``.

    Without ``val`` (but with ``test``), a share of the training images is held out for validation; without ``test``,
    ``val`` is also what ``trainer.test`` measures. Images up to 64 pixels are augmented as CIFAR is (shift by an
    eighth, mirror), larger ones as ImageNet is (random crop and scale, mirror; evaluation resizes to an eighth more and
    cuts out the centre).

    Args:
        root: The folder. Default: the environment variable ``LIGHTNING_PRUNE_DATA``, else a folder in the user's cache.
        batch_size: Images a training batch, of one process.
        eval_batch_size: Images a batch in validation and test.
        image_size: Height and width given to the network, pixels.
        val_fraction: Share of the training images held out where there is no ``val``, in (0, 1); drawn with ``seed``.
        num_workers: Processes that decode images.
        drop_last: Leave out a last training batch that is not full.
        watch_test: Show the test data as a second validation loader.
        seed: Of the held-out images.

    Shape:
        images: (N, 3, image_size, image_size) float32, normalised as torchvision's networks expect; labels: (N,) int64,
        by the alphabetical order of the classes.

    Raises:
        ConfigError: No such folder, no images, or parts that differ in their classes.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        image_size: int = 224,
        val_fraction: float = 0.1,
        num_workers: int = 4,
        drop_last: bool = False,
        watch_test: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ConfigError(f"val_fraction={val_fraction!r} must lie in (0, 1).")
        if image_size < 1 or batch_size < 1 or eval_batch_size < 1:
            raise ConfigError(
                f"image_size={image_size!r}, batch_size={batch_size!r}, eval_batch_size={eval_batch_size!r}: "
                "each must be at least 1."
            )
        self.root, self.image_size, self.val_fraction = data_root(root), image_size, val_fraction
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.drop_last, self.watch_test, self.seed = drop_last, watch_test, seed
        self._parts: dict[str, Dataset[Any]] = {}

    @property
    def num_classes(self) -> int:
        """Classes: folders in ``train``."""
        return len(self._classes("train"))

    def setup(self, stage: str) -> None:
        """List the images of all parts."""
        if self._parts:
            return
        train, evaluate = self._transforms()
        self._parts = {"train": self._folder("train", train)}
        for part in ("val", "test"):
            if (self.root / part).is_dir():
                self._parts[part] = self._folder(part, evaluate)
        if "val" not in self._parts and "test" not in self._parts:
            raise ConfigError(f"{self.root} holds train but neither val nor test: rounds could not be judged.")
        if "val" not in self._parts:
            self._hold_out(self._folder("train", evaluate))
        self._parts.setdefault("test", self._parts["val"])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented."""
        return DataLoader(
            self._parts["train"],
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=self.drop_last,
            **self._worker_options(),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation data; with ``watch_test`` the test data as a second loader."""
        validation = self._evaluation("val")
        return [validation, self._evaluation("test")] if self.watch_test else validation

    def test_dataloader(self) -> DataLoader[Any]:
        """Test data."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test data, with its labels."""
        return self._evaluation("test")

    def _evaluation(self, part: str) -> DataLoader[Any]:
        return DataLoader(self._parts[part], batch_size=self.eval_batch_size, **self._worker_options())

    def _worker_options(self) -> dict[str, Any]:
        # Workers that live on from epoch to epoch keep random state of their own, which no checkpoint can hold.
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), "persistent_workers": False}

    def _hold_out(self, unaugmented: Dataset[Any]) -> None:
        total = len(unaugmented)  # type: ignore[arg-type]
        count = round(self.val_fraction * total)
        if not 0 < count < total:
            raise ConfigError(
                f"val_fraction={self.val_fraction!r} of {total} images leaves one of train and val empty."
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = order[:count].sort().values.tolist(), order[count:].sort().values.tolist()
        self._parts["train"] = Subset(self._parts["train"], rest)
        self._parts["val"] = Subset(unaugmented, held_out)

    def _classes(self, part: str) -> list[str]:
        folder = self.root / part
        if not folder.is_dir():
            raise ConfigError(
                f"no folder {folder}: expected {self.root}/train/<class>/<image> and val/<class>/<image>; "
                "set --data.root."
            )
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())

    def _folder(self, part: str, transform: Any) -> Dataset[tuple[Tensor, int]]:
        from torchvision.datasets import ImageFolder

        classes, expected = self._classes(part), self._classes("train")
        if classes != expected:
            odd = sorted(set(classes) ^ set(expected))
            raise ConfigError(f"{self.root}: train and {part} differ in their classes: {', '.join(odd[:5])}.")
        try:
            return ImageFolder(str(self.root / part), transform)
        except FileNotFoundError as error:  # a class without images, or no class
            raise ConfigError(f"{self.root / part}: {error}") from error

    def _transforms(self) -> tuple[Any, Any]:
        """For training and for evaluation."""
        from torchvision.transforms import v2

        size = self.image_size
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
        whole = [v2.Resize((size, size))]
        if size <= 64:
            train = [*whole, v2.RandomCrop(size, padding=max(1, size // 8)), v2.RandomHorizontalFlip()]
            evaluate = whole
        else:
            train = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            evaluate = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
        return v2.Compose([*train, *finish]), v2.Compose([*evaluate, *finish])
