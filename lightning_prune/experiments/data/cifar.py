"""CIFAR-10 and CIFAR-100, held as bytes: the original files, or for CIFAR-10 an archive of JPEG images."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.errors import ConfigError, FileFormatError, WriteError
from lightning_prune.experiments.data.module import Split, Splits, TensorDataModule, hold_out
from lightning_prune.experiments.data.roots import cache_folder, data_root, missing_data
from lightning_prune.experiments.data.transforms import CropFlip, Pixels
from lightning_prune.files import read_tensors, write_tensors

JPEG_NAME = "cifar10-jpeg"


class CIFAR10(TensorDataModule):
    """CIFAR-10: 50,000 training images, some of them held out for validation, and 10,000 test images.

    Reads the original files (through torchvision). Where the root holds none, but ``cifar10-jpeg.tar.gz`` or the folder
    ``cifar10-jpeg`` (``{train,test}/<class>/<image>.jpg``), those are decoded once and kept in the user's cache folder;
    accuracies on JPEG images differ from those the papers give.

    Args:
        root: Folder that holds ``cifar-10-batches-py``, or one of the two above. Default: the environment variable
            ``LIGHTNING_PRUNE_DATA``, else a folder in the user's cache.
        batch_size: Images a training batch.
        eval_batch_size: Images a batch in validation and test.
        val_size: Training images held out for validation, drawn with ``seed``.
        augment: Shift training images by up to 4 pixels and mirror half of them.
        mean: Subtracted from pixels in [0, 1], one number a channel. Default: that of the training images.
        std: Divided by, one number a channel. Default: the deviation of the training images.
        download: Fetch the original files if no data is there.
        drop_last: Leave out a last training batch that is not full.
        watch_test: Show the test data as a second validation loader.
        seed: Of the held-out images, and of the order with several processes.
        shrink: Each square of ``shrink`` by ``shrink`` pixels becomes one, their mean rounded to a byte; shifts shrink
            likewise. Divides 32. 2 makes a network about four times as cheap. Default: images as they are.

    Shape:
        images: (N, 3, 32 / shrink, 32 / shrink) float32 as loaders give them; labels: (N,) int64, classes in
        alphabetical order.

    Raises:
        ConfigError: The files are missing or damaged, ``val_size`` leaves a split empty, or ``shrink`` does not fit.
    """

    num_classes = 10
    name = "CIFAR-10"
    files = "CIFAR10"
    expected = f"cifar-10-batches-py, {JPEG_NAME}.tar.gz or {JPEG_NAME}"
    own_mean = (0.4914, 0.4822, 0.4465)
    own_std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_size: int = 5000,
        augment: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        download: bool = False,
        drop_last: bool = False,
        watch_test: bool = False,
        seed: int = 0,
        shrink: int = 1,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, drop_last, watch_test, seed)
        if isinstance(shrink, bool) or not isinstance(shrink, int) or shrink < 1 or 32 % shrink:
            raise ConfigError(f"shrink={shrink!r}: expected a whole number that divides 32 (1, 2, 4, 8, 16 or 32).")
        self.root, self.download, self.val_size, self.shrink = data_root(root), download, val_size, shrink
        self.eval_transform = Pixels(self.own_mean if mean is None else mean, self.own_std if std is None else std)
        self.train_transform = CropFlip(4 // shrink, then=self.eval_transform) if augment else self.eval_transform

    def prepare_data(self) -> None:
        """Once a machine: download what is missing, if asked to; decode JPEG images into the cache."""
        source = self._jpeg_source()
        if source is not None:
            jpeg_splits(source)
        elif self.download:
            self._read(train=True, download=True)

    def load(self) -> Splits:
        """Read the images and hold out those for validation."""
        source = self._jpeg_source()
        full, test = jpeg_splits(source) if source is not None else (self._read(train=True), self._read(train=False))
        train, val = hold_out(full, self.val_size, self.seed)
        return Splits(*(Split(_shrunk(part.images, self.shrink), part.labels) for part in (train, val, test)))

    def _jpeg_source(self) -> Path | None:
        """The JPEG images, if they are there and the original files are not."""
        if self.files != "CIFAR10" or (self.root / "cifar-10-batches-py").is_dir():
            return None
        sources = (self.root / JPEG_NAME, self.root / f"{JPEG_NAME}.tar.gz")
        return next((source for source in sources if source.exists()), None)

    def _read(self, train: bool, download: bool = False) -> Split:
        from torchvision import datasets  # slow to import

        try:
            files = getattr(datasets, self.files)(str(self.root), train=train, download=download)
        except (RuntimeError, OSError) as error:  # torchvision also checks the files' checksums
            reason = str(error).splitlines()[0] if download else ""
            raise missing_data(self.name, self.root, f"{self.expected}, complete", reason) from error
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(files.targets))


def _shrunk(images: Tensor, by: int) -> Tensor:
    """Images of bytes, (N, C, H, W), as means over squares of ``by`` by ``by`` pixels."""
    if by == 1:
        return images
    parts = (functional.avg_pool2d(part.float(), by).round_().byte() for part in images.split(5000))
    return torch.cat(list(parts))


class CIFAR100(CIFAR10):
    """CIFAR-100: as :class:`CIFAR10` with 100 classes and the original files only (``cifar-100-python``)."""

    num_classes = 100
    name = "CIFAR-100"
    files = "CIFAR100"
    expected = "cifar-100-python"
    own_mean = (0.5071, 0.4865, 0.4409)
    own_std = (0.2673, 0.2564, 0.2762)


def jpeg_splits(source: Path) -> tuple[Split, Split]:
    """Decode an archive or a folder of JPEG images, or read what an earlier call has left in the cache folder.

    Args:
        source: A ``.tar.gz``, or a folder that holds ``train`` and ``test``; below them a folder a class. All images
            have one size.

    Returns:
        Training and test data: images (N, 3, H, W) uint8 in the order of their names, labels by class name.

    Raises:
        ConfigError: Damaged, or not of that layout.
    """
    cached = cache_folder() / f"{JPEG_NAME}-{_fingerprint(source)}.safetensors"
    try:
        tensors: dict[str, Tensor] = read_tensors(cached, kind="images", version=1)[0]
    except FileFormatError:  # none yet, or a damaged one
        tensors = _decode(source)
        with suppress(WriteError, OSError):  # without a cache the images are decoded again next time
            write_tensors(cached, tensors, kind="images", version=1, header={"source": str(source)})
    train, test = (Split(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in ("train", "test"))
    return train, test


def _fingerprint(source: Path) -> str:
    """Changes when the archive, or a class folder, does."""
    paths = [source, *sorted(source.glob("*/*"))] if source.is_dir() else [source]
    facts = [f"{path.resolve()} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _decode(source: Path) -> dict[str, Tensor]:
    decoded: dict[str, dict[tuple[str, str], Tensor]] = {"train": {}, "test": {}}
    try:
        for (part, label, image), file in _jpeg_files(source):
            if part in decoded:
                decoded[part][label, image] = _pixels(file)
    except (
        OSError,
        EOFError,
        tarfile.TarError,
        zlib.error,
    ) as error:  # Pillow: OSError
        raise ConfigError(f"{source} is damaged ({error}); fetch it anew.") from error
    classes = sorted({label for label, _ in decoded["train"]})
    if not classes or classes != sorted({label for label, _ in decoded["test"]}):
        raise ConfigError(f"{source}: expected train/<class>/<image>.jpg and test/<class>/<image>.jpg, equal classes.")
    tensors: dict[str, Tensor] = {}
    for part, images in decoded.items():
        order = sorted(images)
        tensors[f"{part}.images"] = torch.stack([images[key] for key in order])
        tensors[f"{part}.labels"] = torch.tensor([classes.index(label) for label, _ in order])
    return tensors


def _jpeg_files(source: Path) -> Iterator[tuple[tuple[str, str, str], BinaryIO]]:
    """((part, class, image), opened file) of every JPEG image; an archive is read through, never unpacked."""
    if source.is_dir():
        for path in source.glob("*/*/*.jpg"):
            with path.open("rb") as file:
                yield path.parts[-3:], file  # type: ignore[misc]  # three parts, as the pattern says
        return
    with tarfile.open(source, "r|gz") as archive:
        for member in archive:
            parts: Any = Path(member.name).parts[-3:]
            if len(parts) == 3 and member.isfile() and member.name.endswith(".jpg"):
                yield parts, io.BytesIO(archive.extractfile(member).read())  # type: ignore[union-attr]


def _pixels(file: BinaryIO) -> Tensor:
    """A decoded image, (3, H, W) uint8."""
    import numpy
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)
