"""The networks of the coverage table: builders, inputs and limits, with random weights and small inputs."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.reports.coverage import ZooModel
from lightning_prune.reports.zoo_timm import timm_zoo

CLASSIFICATION = "torchvision classification"
ATTENTION = ("vit_", "swin", "maxvit", "convnext")
NARROW = {"mobilenet_v3_small": 0.33, "mnasnet0_5": 0.32}
"""Networks of whose MACs a quarter belongs to depthwise, first and last layers, of which one width shrinks: half of
every width, exactly, keeps more than 30 %."""
TWINS = {"vit_h_14", "regnet_y_128gf"}
"""Networks that in float64 with momentum need more memory than machines with 24 GiB have."""


def zoo() -> list[ZooModel]:
    """Every network of the coverage table. Networks of libraries that are not installed are left out."""
    return [*_classification(), *_segmentation(), *_detection(), *_video(), *_flow(), *timm_zoo()]


def image(size: int, batch: int = 2, channels: int = 3) -> Tensor:
    """Random square images."""
    return torch.rand(batch, channels, size, size)


def _names(module: str) -> list[str]:
    import torchvision.models as models

    return list(models.list_models(module=models if not module else getattr(models, module)))


def _get(name: str, **options: Any) -> Callable[[], nn.Module]:
    import torchvision.models as models

    return partial(models.get_model, name, **{**torchvision_options(name), **options})


def torchvision_options(name: str) -> dict[str, Any]:
    """Arguments with which torchvision builds a model with random weights, without a download or minutes of drawing."""
    import torchvision.models as models

    options: dict[str, Any] = {"weights": None}
    takes = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in takes:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # draws each weight from a truncated normal distribution
        options["init_weights"] = False
    return options


def _classification() -> list[ZooModel]:
    found = []
    for name in _names(""):
        options: dict[str, Any] = {}
        size = 96
        if name == "inception_v3":
            size = 299
        if name.startswith("vit_"):
            size = 112 if name == "vit_h_14" else 64
            options["image_size"] = size
        if name.startswith("maxvit"):  # its windows divide the image in 7
            size = 224
        build, note = _get(name, **options), ""
        if name in TWINS:
            build, note = partial(twin, name, size), "a twin of reduced depth"
        entry = ZooModel(f"torchvision/{name}", CLASSIFICATION, build, partial(image, size))
        found.append(ZooModel(**{**vars(entry), "most_macs": _most_macs(name), "note": note}))
    return found


def _most_macs(name: str) -> float:
    if name.startswith(ATTENTION):
        return 0.6
    if name.startswith(("squeezenet", "shufflenet")):
        return 0.4
    return NARROW.get(name, 0.3)


def twin(name: str, size: int) -> nn.Module:
    """A network of the same blocks and widths with fewer of them: one of each stage, or two."""
    if name == "vit_h_14":
        from torchvision.models import VisionTransformer

        return VisionTransformer(size, patch_size=14, num_layers=2, num_heads=16, hidden_dim=1280, mlp_dim=5120)
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(
        depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
    )  # regnet_y_128gf's own, arXiv:2003.13678
    params.depths = [1] * len(params.depths)
    return RegNet(params)


def _segmentation() -> list[ZooModel]:
    section = "torchvision segmentation"
    found = []
    for name in _names("segmentation"):
        auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
        build = _get(name, **auxiliary)
        found.append(ZooModel(f"torchvision/{name}", section, build, partial(image, 96), most_macs=0.3))
    return found


def _video() -> list[ZooModel]:
    section = "torchvision video"
    found = []
    for name in _names("video"):
        shape = (1, 3, 16, 224, 224) if name.startswith(("mvit", "s3d")) else (2, 3, 8, 64, 64)
        most = (
            0.78 if name.startswith(("mvit", "swin3d")) else 0.3
        )  # LayerNorm, and heads that code takes from its input
        found.append(ZooModel(f"torchvision/{name}", section, _get(name), partial(torch.rand, *shape), most_macs=most))
    return found


def _flow() -> list[ZooModel]:
    # Two of the twelve updates: the update block is the same module each time.
    def inputs() -> dict[str, Any]:
        return {"image1": image(128), "image2": image(128), "num_flow_updates": 2}

    section, most, note = "torchvision optical flow", {"raft_large": 0.38, "raft_small": 0.64}, "two updates"
    return [
        ZooModel(f"torchvision/{name}", section, _get(name), inputs, None, most.get(name, 0.3), note)
        for name in _names("optical_flow")
    ]


DETECTION_SIZE = 160
BOXES = ((10.0, 10.0, 90.0, 90.0), (40.0, 50.0, 150.0, 140.0), (5.0, 100.0, 60.0, 155.0))


class RegionParts(nn.Module):
    """All of a two-stage detector that has weights, on given boxes: what chooses boxes by score has none.

    Under random weights the chosen boxes, and even their number, hang on the last bits of scores.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.detector: Any = build()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Scores and box offsets of both stages, masks and key points, for square images."""
        parts, size = self.detector.roi_heads, tuple(images.shape[-2:])
        features = self.detector.backbone(images)
        scores, offsets = self.detector.rpn.head(list(features.values()))
        boxes, sizes = [images.new_tensor(BOXES)] * len(images), [size] * len(images)
        found = [*scores, *offsets]
        found += parts.box_predictor(parts.box_head(parts.box_roi_pool(features, boxes, sizes)))
        for kind in ("mask", "keypoint"):
            if getattr(parts, f"{kind}_roi_pool", None) is not None:
                pooled = getattr(parts, f"{kind}_roi_pool")(features, boxes, sizes)
                found.append(getattr(parts, f"{kind}_predictor")(getattr(parts, f"{kind}_head")(pooled)))
        return found


def _detection() -> list[ZooModel]:
    section = "torchvision detection"
    found = []
    for name in _names("detection"):
        options: dict[str, Any] = {"num_classes": 5}
        if not name.startswith("ssd"):
            options |= {"min_size": DETECTION_SIZE, "max_size": DETECTION_SIZE}
        build, entry = _get(name, **options), f"torchvision/{name}"
        if "rcnn" in name:
            parts = partial(RegionParts, build)
            loss = partial(_detection_loss, name, "detector")
            note = "backbone, region proposal head and heads, on given boxes"
            found.append(ZooModel(entry, section, parts, partial(image, DETECTION_SIZE), loss, 0.3, note))
        else:
            inputs = partial(_detection_inputs, DETECTION_SIZE)
            found.append(ZooModel(entry, section, build, inputs, partial(_detection_loss, name, ""), 0.3))
    return found


def _detection_inputs(size: int) -> list[Tensor]:
    return [torch.rand(3, size, size)]


def _detection_loss(name: str, within: str, model: nn.Module) -> Tensor:
    """The detector's own loss, summed, on two random images with two boxes each."""
    target: dict[str, Tensor] = {"boxes": torch.tensor(BOXES[:2]), "labels": torch.tensor([1, 1])}
    if name.startswith("maskrcnn"):
        target["masks"] = torch.ones(2, DETECTION_SIZE, DETECTION_SIZE, dtype=torch.uint8)
    if name.startswith("keypointrcnn"):
        target["keypoints"] = torch.cat([torch.rand(2, 17, 2) * 80 + 10, torch.ones(2, 17, 1)], dim=2)
    images = [torch.rand(3, DETECTION_SIZE, DETECTION_SIZE) for _ in range(2)]
    losses = model.get_submodule(within)(images, [target, target])
    return torch.stack(list(losses.values())).sum()
