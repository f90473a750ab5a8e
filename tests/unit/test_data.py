"""Data of the experiments: splits, the loader over tensors, augmentation, files that are missing or damaged."""

import io
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lightning_prune.errors import ConfigError
from lightning_prune.experiments import CIFAR10, CIFAR100, MNIST, Digits, ImageFolders, TensorLoader
from lightning_prune.experiments.data import CropFlip, Pixels, cifar

IMAGES, LABELS = torch.arange(23.0).view(23, 1, 1, 1), torch.arange(23)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_PRUNE_DATA", raising=False)


def labels_of(loader: TensorLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


# The loader over tensors


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_holds_every_image_once(shuffle: bool, drop_last: bool) -> None:
    loader = TensorLoader(IMAGES, LABELS, 5, shuffle=shuffle, drop_last=drop_last)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5] + ([] if drop_last else [3])
    assert len(loader) == len(batches)
    seen = labels_of(loader)
    assert len(set(seen)) == len(seen) == (20 if drop_last else 23)
    assert (seen == sorted(seen)) is not shuffle
    assert all(torch.equal(images.flatten().long(), labels) for images, labels in batches)


def test_the_order_is_torchs_own_for_the_same_generator() -> None:
    dataset = torch.utils.data.TensorDataset(LABELS)
    torch.manual_seed(5)
    expected = list(torch.utils.data.RandomSampler(dataset))
    torch.manual_seed(5)
    assert labels_of(TensorLoader(IMAGES, LABELS, 5, shuffle=True)) == expected


def test_every_epoch_has_a_new_order() -> None:
    loader = TensorLoader(IMAGES, LABELS, 5, shuffle=True)
    assert labels_of(loader) != labels_of(loader)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_epoch_resumes_in_its_middle_by_replay(done: int) -> None:
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8)
    loader = TensorLoader(images, LABELS, 5, shuffle=True, transform=CropFlip(2, then=Pixels()))
    torch.rand(7)  # somewhere in the generator's stream
    start = torch.get_rng_state()
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    torch.rand(2)  # a model that draws, too
    now = torch.get_rng_state()
    expected = list(iterator)

    torch.manual_seed(99)
    torch.set_rng_state(start)
    replayed = iter(loader)
    for _ in range(done):
        next(replayed)
    torch.set_rng_state(now)
    assert same(list(replayed), expected)
    assert len(expected) == 5 - done


def test_the_order_is_drawn_by_iter_and_not_by_the_first_batch() -> None:
    loader = TensorLoader(IMAGES, LABELS, 5, shuffle=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    iterator = iter(loader)
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    next(iterator)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_the_images(shuffle: bool) -> None:
    loaders = [TensorLoader(IMAGES, LABELS, 4, shuffle=shuffle, replicas=2, rank=rank, seed=1) for rank in (0, 1)]
    first = [labels_of(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [3, 3]
    assert [len(part) for part in first] == [12, 12]
    assert set(first[0]) | set(first[1]) == set(range(23))
    torch.rand(3)  # the order must not hang on this process's generator
    assert [labels_of(loader) for loader in loaders] == first
    for loader in loaders:
        _set_sampler_epoch(loader, 1)  # as Lightning does at the start of an epoch
    assert ([labels_of(loader) for loader in loaders] != first) is shuffle


def test_data_modules_take_their_share_from_the_trainer() -> None:
    seen = []
    for rank in (0, 1):
        data = Digits(batch_size=32)
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank}, overfit_batches=0)  # type: ignore[assignment]
        seen.append(torch.cat([images.flatten(1) for images, _ in data.train_dataloader()]))
    assert len(seen[0]) == len(seen[1]) == -(-len(data.splits.train.labels) // 2)
    assert not {tuple(row) for row in seen[0].tolist()} & {tuple(row) for row in seen[1].tolist()[:-1]}


def test_overfitting_some_batches_repeats_them() -> None:
    data = Digits(batch_size=32)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, overfit_batches=2)  # type: ignore[assignment]
    assert same(list(data.train_dataloader()), list(data.train_dataloader()))
    data.trainer = None
    assert not same(list(data.train_dataloader()), list(data.train_dataloader()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS[:3]}, "23 images and 3 labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "0 images"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, r"batch_size=2\.0"),
        ({"batch_size": 24, "drop_last": True}, "no batch: 23 images"),
        ({"batch_size": 12, "drop_last": True, "replicas": 2}, None),
        ({"batch_size": 13, "drop_last": True, "replicas": 2}, "over 2 process"),
    ],
)
def test_loader_arguments(arguments: dict[str, Any], message: str | None) -> None:
    arguments = {"images": IMAGES, "labels": LABELS, "batch_size": 5} | arguments
    if message is None:
        assert len(TensorLoader(**arguments)) == 1
    else:
        with pytest.raises(ConfigError, match=message):
            TensorLoader(**arguments)


# What happens to a batch


def test_crop_and_flip_equal_torchvision_image_by_image() -> None:
    images = torch.randint(256, (64, 3, 12, 10), dtype=torch.uint8)
    torch.manual_seed(2)
    found = CropFlip(4)(images)
    torch.manual_seed(2)
    top, left = torch.randint(9, (2, 64, 1)).squeeze(2).tolist()
    mirrored = torch.randint(2, (64, 1), dtype=torch.bool).squeeze(1).tolist()
    for i, image in enumerate(images):
        expected = V.crop(V.pad(image, [4, 4]), top[i], left[i], 12, 10)
        assert torch.equal(found[i], V.horizontal_flip(expected) if mirrored[i] else expected)
    assert 16 < sum(mirrored) < 48
    assert set(top) | set(left) == set(range(9))


def test_pixels_equal_torchvision() -> None:
    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    scaled = V.to_dtype(images, torch.float32, scale=True)
    torch.testing.assert_close(Pixels()(images), scaled)
    torch.testing.assert_close(Pixels(mean, std)(images), V.normalize(scaled, mean, std), rtol=1e-5, atol=1e-5)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("arguments", [([0.1], None), ([0.1], [0.1, 0.2]), ([0.1], [0.0])])
def test_pixels_arguments(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="one number a channel"):
        Pixels(*arguments)


# Digits


def test_digits_are_split_the_same_way_every_time_and_class_by_class() -> None:
    from sklearn.datasets import load_digits

    splits = Digits().splits
    assert all(
        torch.equal(a, b) for s, t in zip(splits, Digits().splits, strict=True) for a, b in zip(s, t, strict=True)
    )
    assert not torch.equal(splits.val.images[:50], Digits(seed=1).splits.val.images[:50])
    rows = torch.cat([split.images for split in splits]).flatten(1) * 16
    expected = load_digits().data
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    for split, share in zip(splits, (0.65, 0.15, 0.2), strict=True):
        assert split.images.shape[1:] == (1, 8, 8)
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        total = torch.from_numpy(load_digits().target).bincount()
        assert (split.labels.bincount() - share * total).abs().max() <= 1


@pytest.mark.parametrize("fractions", [(0, 0.2), (0.5, 0.5), (0.2, -0.1)])
def test_digits_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        Digits(val_fraction=fractions[0], test_fraction=fractions[1])


def test_the_watched_test_data_is_a_second_validation_loader() -> None:
    data = Digits(watch_test=True)
    loaders = data.val_dataloader()
    assert isinstance(loaders, list)
    assert torch.equal(loaders[0].images, data.splits.val.images)
    assert torch.equal(loaders[1].images, data.splits.test.images)
    assert isinstance(Digits().val_dataloader(), TensorLoader)


def test_scikit_learn_is_imported_only_for_its_digits() -> None:
    code = "import sys, lightning_prune.experiments as e; assert 'sklearn' not in sys.modules; e.Digits().splits; "
    code += "assert 'sklearn' in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# MNIST


def write_idx(folder: Path, count: int = 40) -> Tensor:
    """The four files of MNIST, tiny, each pixel known."""
    folder.mkdir(parents=True)
    images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        digits = bytes(i % 10 for i in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + digits)
    return images


def test_mnist_reads_the_files_and_holds_out_validation_images(tmp_path: Path) -> None:
    images = write_idx(tmp_path / "MNIST" / "raw")
    data = MNIST(root=tmp_path, batch_size=8, val_size=10)
    train, val, test = data.splits
    assert (len(train.labels), len(val.labels), len(test.labels)) == (30, 10, 40)
    found = torch.cat([train.images, val.images]).flatten(1).tolist()
    assert sorted(found) == sorted(images.flatten(1).tolist())
    batch, labels = next(iter(data.test_dataloader()))
    torch.testing.assert_close(batch, images.unsqueeze(1).float() / 255)
    assert labels.tolist() == [i % 10 for i in range(40)]
    normalized = next(iter(MNIST(root=tmp_path, val_size=10, normalize=True).test_dataloader()))[0]
    torch.testing.assert_close(normalized, (images.unsqueeze(1).float() / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-5)
    assert torch.equal(MNIST(root=tmp_path, val_size=10).splits.val.images, val.images)
    assert not torch.equal(MNIST(root=tmp_path, val_size=10, seed=1).splits.val.images, val.images)


def test_the_root_comes_from_the_environment_else_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert MNIST().root == tmp_path / "cache" / "lightning_prune" / "data"
    monkeypatch.setenv("LIGHTNING_PRUNE_DATA", str(tmp_path / "there"))
    assert MNIST().root == CIFAR10().root == ImageFolders().root == tmp_path / "there"
    assert MNIST(root="~/here").root == Path.home() / "here"


@pytest.mark.parametrize(
    ("build", "expected"),
    [(MNIST, "MNIST/raw"), (CIFAR10, "cifar-10-batches-py, cifar10-jpeg"), (CIFAR100, "cifar-100-python")],
)
def test_missing_data_says_where_it_looked_and_what_to_set(build: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build(root=tmp_path / "nowhere").setup("fit")
    for part in (str(tmp_path / "nowhere"), "--data.root", "LIGHTNING_PRUNE_DATA", "--data.download=true"):
        assert part in str(caught.value)


@pytest.mark.parametrize("build", [MNIST, CIFAR10, CIFAR100])
def test_a_download_that_fails_says_why(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    with pytest.raises(ConfigError, match="Downloading it failed: "):
        build(root=tmp_path / "nowhere", download=True).prepare_data()


def test_damaged_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw")
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        file = tmp_path / "MNIST" / "raw" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-100] if "images" in name else b"\0\0\0\0" + whole)
        with pytest.raises(ConfigError, match=r"MNIST/raw is damaged \(.+\)"):
            MNIST(root=tmp_path, val_size=10).setup("fit")
        file.write_bytes(whole)


@pytest.mark.parametrize("val_size", [0, 40, -3])
def test_validation_must_take_some_and_leave_some(val_size: int, tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw")
    with pytest.raises(ConfigError, match=f"val_size={val_size}"):
        MNIST(root=tmp_path, val_size=val_size).setup("fit")


def test_mnist_itself(data_root: Path) -> None:
    if not (data_root / "MNIST").is_dir():
        pytest.skip(f"needs MNIST in {data_root}")
    train, val, test = MNIST(root=data_root).splits
    assert (len(train.labels), len(val.labels), len(test.labels)) == (55_000, 5_000, 10_000)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    whole = torch.cat([train.images, val.images]).float() / 255
    assert (whole.mean().item(), whole.std().item()) == pytest.approx((0.1307, 0.3081), abs=1e-4)


# CIFAR


def write_jpegs(root: Path, per_class: int = 3) -> Path:
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "ant")):
            folder = root / "cifar10-jpeg" / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = np.full(
                    (32, 32, 3), 20 + 40 * i + 100 * number + (10 if part == "test" else 0), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg", quality=95)
    return root


def pack(root: Path) -> Path:
    (root / "packed").mkdir()
    with tarfile.open(root / "packed" / "cifar10-jpeg.tar.gz", "w:gz") as archive:
        archive.add(root / "cifar10-jpeg", "cifar10-jpeg")
    return root / "packed"


def test_jpeg_images_from_the_folder_and_from_the_archive_are_the_same(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    root = write_jpegs(tmp_path)
    folder, archive = (CIFAR10(root=r, val_size=2).splits for r in (root, pack(root)))
    assert all(torch.equal(a, b) for s, t in zip(folder, archive, strict=True) for a, b in zip(s, t, strict=True))
    reference = ImageFolder(str(root / "cifar10-jpeg" / "test"), PILToTensor())
    assert torch.equal(folder.test.images, torch.stack([image for image, _ in reference]))
    assert folder.test.labels.tolist() == [label for _, label in reference] == [0, 0, 0, 1, 1, 1]
    assert len(folder.train.labels) == 4
    assert len(folder.val.labels) == 2


def test_jpeg_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_jpegs(tmp_path)
    CIFAR10(root=root, val_size=2).prepare_data()
    caches = list((tmp_path / "cache" / "lightning_prune").iterdir())
    assert len(caches) == 1
    calls: list[Path] = []
    decode = cifar._decode
    monkeypatch.setattr(cifar, "_decode", lambda source: (calls.append(source), decode(source))[1])
    expected = CIFAR10(root=root, val_size=2).splits
    assert calls == []
    caches[0].write_bytes(caches[0].read_bytes()[:500])  # a damaged cache is made anew
    again = CIFAR10(root=root, val_size=2).splits
    assert len(calls) == 1
    assert torch.equal(again.train.images, expected.train.images)
    (root / "cifar10-jpeg" / "train" / "cat" / "0009.jpg").write_bytes(
        (root / "cifar10-jpeg" / "train" / "cat" / "0000.jpg").read_bytes()
    )
    assert len(CIFAR10(root=root, val_size=2).splits.train.labels) == 5  # new data is not the cached one
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(CIFAR10(root=write_jpegs(tmp_path), val_size=2).splits.train.labels) == 4


def test_damaged_and_foreign_jpeg_archives(tmp_path: Path) -> None:
    archive = pack(write_jpegs(tmp_path)) / "cifar10-jpeg.tar.gz"
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", whole[:200] + b"\xff" * 40 + whole[240:]):
        archive.write_bytes(damaged)
        with pytest.raises(ConfigError, match="damaged"):
            CIFAR10(root=archive.parent, val_size=2).setup("fit")
    with tarfile.open(archive, "w:gz") as other:
        info = tarfile.TarInfo("cifar10-jpeg/readme.txt")
        other.addfile(info, io.BytesIO(b""))
    with pytest.raises(ConfigError, match=r"expected train/<class>/<image>\.jpg"):
        CIFAR10(root=archive.parent, val_size=2).setup("fit")
    assert not (tmp_path / "cache").exists()  # nothing of it was kept


def test_cifar_batches_are_normalised_and_only_training_is_augmented(tmp_path: Path) -> None:
    data = CIFAR10(root=write_jpegs(tmp_path), val_size=2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    images = next(iter(data.test_dataloader()))[0]
    torch.testing.assert_close(images, (data.splits.test.images.float() / 255 - 0.5) / 0.25)
    assert not same(list(data.train_dataloader()), list(data.train_dataloader()))
    first, second = (next(iter(CIFAR10(root=tmp_path, val_size=2, augment=flag).train_dataloader())) for flag in (0, 1))
    corner = (0 - 0.4914) / 0.2470  # black comes in from outside, before normalisation
    assert not torch.isclose(first[0][:, 0], torch.tensor(corner), atol=1e-3).any()
    assert torch.isclose(second[0][:, 0], torch.tensor(corner), atol=1e-3).any()


def test_cifar_images_shrink_to_means_of_squares(tmp_path: Path) -> None:
    root = write_jpegs(tmp_path)
    torch.manual_seed(0)
    images = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    for file in sorted(root.rglob("0000.jpg")):
        Image.fromarray(images.permute(1, 2, 0).numpy()).save(file, quality=95)
    whole, small = (CIFAR10(root=root, val_size=2, shrink=by, augment=True) for by in (1, 2))
    for full, shrunk in zip(whole.splits, small.splits, strict=True):
        means = full.images.numpy().reshape(len(full.labels), 3, 16, 2, 16, 2).mean((3, 5))
        np.testing.assert_array_equal(shrunk.images.numpy(), np.rint(means).astype(np.uint8))
        assert torch.equal(shrunk.labels, full.labels)
    assert next(iter(small.train_dataloader()))[0].shape == (4, 3, 16, 16)
    for shrink in (0, 3, True, 2.0):
        with pytest.raises(ConfigError, match=f"shrink={shrink!r}"):
            CIFAR10(root=root, shrink=shrink)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_published_network_is_as_good_on_our_cifar_as_measured_elsewhere(data_root: Path) -> None:
    from safetensors.torch import load_file

    from lightning_prune.experiments import ResNet20

    file = data_root / "resnet20-cifar10.safetensors"
    if not file.is_file() or not (data_root / "cifar10-jpeg.tar.gz").is_file():
        pytest.skip(f"needs {file} and cifar10-jpeg.tar.gz")
    data = CIFAR10(root=data_root, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    network = ResNet20().eval()
    network.load_state_dict(load_file(file))
    with torch.no_grad():
        correct = sum((network(images).argmax(1) == labels).sum().item() for images, labels in data.test_dataloader())
    assert correct / 100 == pytest.approx(81.03, abs=0.02)


# Folders of images


def write_folders(root: Path, *parts: str, classes: tuple[str, ...] = ("b", "a"), count: int = 4) -> Path:
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((40, 50, 3), 30 + 60 * i, dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return root


def folders(root: Path, **options: Any) -> ImageFolders:
    data = ImageFolders(root, **{"batch_size": 2, "image_size": 32, "num_workers": 0, **options})
    data.setup("fit")
    return data


def test_image_folders(tmp_path: Path) -> None:
    data = folders(write_folders(tmp_path, "train", "val", "test"), watch_test=True)
    assert data.num_classes == 2
    assert [len(loader.dataset) for loader in (data.train_dataloader(), *data.val_dataloader())] == [8, 8, 8]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert labels.tolist() == [0] * 4 + [1] * 4
    expected = (90 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[1].mean((1, 2)), expected, rtol=1e-3, atol=1e-3)
    large = folders(tmp_path, image_size=96)
    assert next(iter(large.train_dataloader()))[0].shape == (2, 3, 96, 96)
    assert next(iter(large.val_dataloader()))[0].shape == (8, 3, 96, 96)


def test_image_folders_without_validation_hold_some_out(tmp_path: Path) -> None:
    data = folders(write_folders(tmp_path, "train", "test"), val_fraction=0.25)
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert sorted(train.indices + val.indices) == list(range(8))
    assert len(val) == 2
    assert all(torch.equal(val[0][0], val[0][0]) for _ in range(5))  # not augmented
    assert val.indices == folders(tmp_path, val_fraction=0.25).val_dataloader().dataset.indices


def test_image_folders_without_test_data_test_on_validation_data(tmp_path: Path) -> None:
    data = folders(write_folders(tmp_path, "train", "val"))
    assert data.test_dataloader().dataset is data.val_dataloader().dataset


def test_bad_image_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*nowhere/train.*--data.root"):
        folders(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither val nor test"):
        folders(write_folders(tmp_path / "1", "train"))
    root = write_folders(write_folders(tmp_path / "2", "train"), "val", classes=("a", "c"))
    with pytest.raises(ConfigError, match="train and val differ in their classes: b, c"):
        folders(root)
    (tmp_path / "3" / "train" / "a").mkdir(parents=True)
    (tmp_path / "3" / "val" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"3/train.*class"):
        folders(tmp_path / "3")
    with pytest.raises(ConfigError, match=r"val_fraction=0\.01 of 8 images"):
        folders(write_folders(tmp_path / "4", "train", "test"), val_fraction=0.01)
    with pytest.raises(ConfigError, match="val_fraction=1"):
        ImageFolders(tmp_path, val_fraction=1)
    with pytest.raises(ConfigError, match="batch_size=0"):
        ImageFolders(tmp_path, batch_size=0)
