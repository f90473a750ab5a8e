"""Selection over scores sharded in many ways, against the same call on the whole scores in this process."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from lightning_prune import (
    ConfigError,
    MaskMismatchError,
    MaskSet,
    PruneError,
    SelectionError,
    Ticket,
    load_ticket,
    save_ticket,
    select,
)
from lightning_prune.callbacks.company import compare_masks
from lightning_prune.scores import MagnitudeScores
from lightning_prune.sharding import Layout, reshard
from tests.distributed.fits import part, shard

SHAPES = [(7, 5), (3, 4), (16,), (1,), (9, 2, 3, 3), (2, 8), (6, 4, 3), (40, 30)]
CASES = {2: 30, 4: 60}


def check(folder: Path, world: int) -> dict[str, Any]:
    flat = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    meshes = [flat, square, square["tensor_parallel"]]  # of the last, every two processes have one of their own
    sharded = sum(check_case(seed, meshes) for seed in range(CASES[world]))
    check_layouts(square)
    check_many_ties(flat)
    check_network(folder, square)
    check_errors(flat)
    return {"sharded tensors": sharded, "errors": check_drift(flat)}


def make_scores(rng: random.Random, generator: torch.Generator) -> dict[str, Tensor]:
    kind = rng.choice(["normal", "few values", "zeros", "constant", "infinite", "integers", "doubles", "halves"])
    scores = {}
    for number in range(rng.randint(1, 5)):
        score = torch.randn(rng.choice(SHAPES), generator=generator)
        if kind in ("few values", "integers"):
            score = (score * 2).round()
        elif kind == "zeros":
            score = torch.where(score > 0, torch.tensor(0.0), torch.where(score > -1, torch.tensor(-0.0), score))
        elif kind == "constant":
            score = torch.full_like(score, -2.5)
        elif kind == "infinite":
            score = torch.where(score > 1, torch.tensor(float("inf")), score)
            score = torch.where(score < -1, torch.tensor(float("-inf")), score)
        elif kind == "doubles":
            score = score.double() * 1e-200
        elif kind == "halves":
            score = score.to(rng.choice([torch.float16, torch.bfloat16]))
        score = score.long() if kind == "integers" else score
        if score.dim() == 4 and rng.random() < 0.5:
            score = score.to(memory_format=torch.channels_last)
        scores[f"w{number}"] = score
    return scores


def spread(tensor: Tensor, rng: random.Random, meshes: list[DeviceMesh]) -> Tensor:
    """Sharded along any axes of a mesh, replicated along others, or left as it is."""
    if rng.random() < 0.15:
        return tensor
    mesh = rng.choice(meshes)
    axes = [rng.choice([Replicate(), *(Shard(axis) for axis in range(tensor.dim()))]) for _ in range(mesh.ndim)]
    if len({str(axis) for axis in axes}) < len(axes):  # one axis over both: as FSDP2 over tensor parallelism does it
        axes[-1] = Replicate()
    return distribute_tensor(tensor, mesh, axes)


def check_case(seed: int, meshes: list[DeviceMesh]) -> int:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scores = make_scores(rng, generator)
    total = sum(score.numel() for score in scores.values())
    amount: dict[str, Any] = rng.choice([{"density": 0.3}, {"fraction": 0.2}, {"fraction": 0.7}, {"density": 0.0}])
    if rng.random() < 0.3:
        amount = {"remove": rng.randint(0, total)}
    options: dict[str, Any] = {
        "scope": rng.choice(["global", "global", "layer"]) if "remove" not in amount else "global"
    }
    if len(scores) > 1 and "remove" not in amount and rng.random() < 0.3:
        options["rates"] = {"w0": rng.choice([0.0, 0.5])}
    if "fraction" in amount and rng.random() < 0.2:
        options["counting"] = "hrank"
    within = None
    if "remove" not in amount and rng.random() < 0.5:
        within = MaskSet({name: torch.rand(s.shape, generator=generator) > 0.4 for name, s in scores.items()})
    expected = select(scores, **amount, **options, within=within)
    parts = {name: spread(score, rng, meshes) for name, score in scores.items()}
    if not any(hasattr(tensor, "to_local") for tensor in parts.values()):
        return 0
    earlier = within if within is None or rng.random() < 0.5 else within.placed_like(parts)
    found = select(parts, **amount, **options, within=earlier)
    check_masks(found, expected, parts)
    if within is not None:
        assert found <= within.placed_like(parts)
        assert (found & within) == found
        assert not (within.placed_like(parts) <= found) or within.kept == found.kept
    return sum(hasattr(tensor, "to_local") for tensor in parts.values())


def check_masks(found: MaskSet, expected: MaskSet, like: dict[str, Tensor]) -> None:
    """Each process's part is that of the whole masks; counts, digest and state are the whole's."""
    assert list(found) == list(expected)
    assert found.kept_per_tensor() == expected.kept_per_tensor()
    assert found.digest() == expected.digest()
    for name, mask in expected.placed_like(like).items():
        assert torch.equal(part(found[name]), part(mask)), name
        if hasattr(mask, "to_local"):
            assert found[name].placements == mask.placements == like[name].placements
            assert torch.equal(found[name].int().full_tensor().bool(), expected[name]), name
    assert found == expected.placed_like(like)
    assert expected == found
    state = found.state_dict()
    if torch.distributed.get_rank() == 0:
        assert MaskSet.from_state_dict(state) == expected


def check_layouts(mesh: DeviceMesh) -> None:
    """What each process takes the others to hold is what they hold, uneven and empty parts too."""
    world = torch.distributed.get_world_size()
    for shape in ((7, 5), (1, 3), (4, 2, 2), (5,)):
        kinds = [Replicate(), *(Shard(axis) for axis in range(len(shape)))]
        for placements in itertools.product(kinds, repeat=2):
            tensor = distribute_tensor(torch.arange(math.prod(shape)).view(shape), mesh, list(placements))
            part = Layout.of({"w": tensor}).parts["w"]
            assert part.boxes is not None
            values: list[Any] = [None] * world
            torch.distributed.all_gather_object(values, tensor.to_local().flatten().tolist())
            whole = tensor.full_tensor()
            assert [whole[box.slices].flatten().tolist() for box in part.boxes] == values


def check_many_ties(mesh: DeviceMesh) -> None:
    """More equal scores than fit a bracket, over a tensor whose flat index needs more than sixteen bits."""
    wide = torch.zeros(1000, 300)
    wide[::7] = 1.0
    whole = {"a": torch.zeros(50, 40), "b": wide, "c": torch.zeros(11)}
    for axis in (0, 1):
        parts = {name: distribute_tensor(t, mesh, [Shard(min(axis, t.dim() - 1))]) for name, t in whole.items()}
        for count in (1, 1999, 2000, 2001, 150_123, 250_000):
            total = sum(t.numel() for t in whole.values())
            check_masks(select(parts, remove=total - count), select(whole, remove=total - count), parts)


def check_network(folder: Path, mesh: DeviceMesh) -> None:
    """Both kinds of parallelism at once; the masks applied; the ticket is that of one process, and comes back."""

    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3), nn.LayerNorm(3))

    whole, network = make(), make()
    shard(network, "data and tensor", mesh)
    weights = dict(whole.named_parameters())
    expected = select(MagnitudeScores(weights), density=0.4)
    network(torch.randn(2, 6))  # FSDP2 may hold whole parameters now
    reshard(network)
    masks = expected.placed_like(dict(network.named_parameters()))
    network(torch.randn(2, 6))
    masks.apply_(network)
    expected.apply_(whole)
    inputs = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(inputs).detach(), whole(inputs).detach())
    reshard(network)
    parameters = dict(network.named_parameters())
    found = select(MagnitudeScores(parameters), density=0.4)
    check_masks(found, select(MagnitudeScores(dict(whole.named_parameters())), density=0.4), parameters)
    path = folder / "sharded.safetensors"
    save_ticket(path, Ticket(found, parameters, {"versions": {}}))
    torch.distributed.barrier()
    ticket = load_ticket(path)
    if torch.distributed.get_rank() == 0:
        save_ticket(folder / "plain.safetensors", Ticket(expected, dict(whole.named_parameters()), {"versions": {}}))
        assert path.read_bytes() == (folder / "plain.safetensors").read_bytes()
    other = make()
    ticket.apply_(other)
    for one, two in zip(other.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, two)


def check_errors(mesh: DeviceMesh) -> None:
    """The same error on every process, whichever of them holds its cause."""
    bad = torch.randn(8, 4)
    bad[0, 0] = float("nan")
    wide = distribute_tensor(torch.randn(8, 4), mesh, [Shard(1)])
    tall = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
    masks = MaskSet({"w": distribute_tensor(torch.ones(8, 4, dtype=torch.bool), mesh, [Shard(0)])})
    partial = type(tall).from_local(torch.randn(8, 4), mesh, [Partial()])
    for run, kind, message in (
        (lambda: select({"w": distribute_tensor(bad, mesh, [Shard(0)])}, 0.5), SelectionError, "hold 1 NaN among 32"),
        (lambda: select({"w": wide}, 0.5, within=masks), SelectionError, "spread over the processes in different ways"),
        (lambda: select({"w": torch.randn(8, 4)}, 0.5, within=masks), MaskMismatchError, "within is sharded"),
        (lambda: select({"w": partial}, 0.5), SelectionError, "no process holds a box"),
        (lambda: select({"w": tall}, fraction=0.5, counting="open_lth"), ConfigError, "needs all scores in one place"),
        (lambda: select({"w": tall}, granularity="2:4"), ConfigError, "sharded between processes"),
        (lambda: select({"w": tall}, remove=33), SelectionError, "more than the 32 entries left"),
    ):
        with pytest.raises(kind, match=message):
            run()


def check_drift(mesh: DeviceMesh) -> str:
    """Processes that hold the same part and chose otherwise are told, all of them."""
    own = torch.ones(8, 4, dtype=torch.bool)
    own[0, 0] = torch.distributed.get_rank() == 0
    masks = MaskSet({"w": type(distribute_tensor(own, mesh, [Shard(0)])).from_local(own, mesh, [Replicate()])})
    compare_masks(MaskSet({"w": distribute_tensor(own, mesh, [Shard(0)])}))
    with pytest.raises(PruneError) as caught:
        compare_masks(masks)
    return str(caught.value)
