"""DDP and FSDP2 on every kind of network: two processes compute what one does.

Each has its half of a batch. What is sharded are blocks that are called, in the precision that
autocast computes in.
"""

import copy
import functools
import os
from collections.abc import Collection
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from timm.optim import Lamb
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training_runs import TINY_NETWORKS, run_processes

import deit.models  # noqa: F401 - registers the networks
from deit.equivariance import randomize_
from deit.errors import UserError
from deit.train.distributed import SHARDS_ON_CPU, DistContext, blocks_of, shard, wrap_ddp
from deit.train.optim import parameter_groups

# One of each kind of block.
KINDS = ("d2_deit_tiny_patch16_LS", "resmlp_equi_d2_12", "d2_convnext_tiny")
FAMILIES = (*KINDS, "hybrid_deit_tiny_patch16_LS")


NARROW = {n: k if "convnext" in n else k | {"embed_dim": 48} for n, k in TINY_NETWORKS.items()}
NARROW["d2_convnext_tiny"] = {"depths": (1, 2), "dims": (8, 16)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_heads": 2} if "deit" in name else {}
    return randomize_(timm.create_model(name, num_classes=3, **NARROW[name], **heads))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_blocks_are_modules_that_are_called():
    for name in TINY_NETWORKS:
        model = build(name)
        blocks, called = blocks_of(model), set()
        for block in blocks:
            block.register_forward_hook(lambda module, *_, called=called: called.add(module))
        model(images())
        assert called == set(blocks), name
        assert len(blocks) == sum(NARROW[name].get("depths", (2,))), name
    with pytest.raises(UserError, match="RegNet has neither 'blocks' nor 'stages'"):
        blocks_of(timm.create_model("regnety_002"))


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> dict:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    named = {n.replace("module.", ""): p.grad for n, p in model.named_parameters()}
    return {name: whole(grad) for name, grad in named.items() if grad is not None}


def compare(
    name: str,
    model: nn.Module,
    rank: int,
    tolerance: float = 1e-4,
    dtype: torch.dtype | None = None,
    only: Collection[str] = (),
) -> None:
    """Gradients of half the batch in `model`, `only` some or all, against those in one process."""
    reference = gradients(build(name), images())
    ours = gradients(model, images()[rank::2], dtype)
    assert ours.keys() == reference.keys(), name
    for key in only or reference:
        value = reference[key]
        error = (ours[key] - value).norm() / (value.norm() + 1e-4)
        assert error < tolerance, (name, key, error)
    assert any(reference[key].any() for key in only or reference)


def inner_linears(model: nn.Module) -> dict[str, nn.Module]:
    named, ends = dict(model.named_modules()).items(), ("_sym", "_asym")
    return {n: m for n, m in named if isinstance(m, nn.Linear) and n.endswith(ends)}


def ddp(name: str, processes: DistContext) -> None:
    compare(name, wrap_ddp(build(name), processes), processes.rank)
    model = build(name)
    linears = inner_linears(model)
    for inner, module in linears.items():
        model.set_submodule(inner, DistributedDataParallel(module))
    compare(name, model, processes.rank, only=[f"{inner}.weight" for inner in linears])


def fsdp_on_linear_maps(name: str, processes: DistContext) -> None:
    model = build(name)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in inner_linears(model).values():
        fully_shard(module, mesh=mesh)
    compare(name, fully_shard(model, mesh=mesh), processes.rank)


def ddp_checkpointed_and_compiled(name: str, processes: DistContext) -> None:
    model = build(name)
    model.set_grad_checkpointing()
    model.compile(backend="eager")
    compare(name, wrap_ddp(model, processes), processes.rank)


def fsdp_checkpointed_and_compiled(name: str, processes: DistContext) -> None:
    model = build(name)
    model.set_grad_checkpointing()
    for block in blocks_of(model):
        block.compile(backend="eager")
    compare(name, shard(model, processes), processes.rank)


def fsdp_state_dict(name: str, processes: DistContext) -> None:
    """Whole and sharded, they hold what a single process's holds, and go back in."""
    expected = build(name).state_dict()
    model = shard(build(name).eval(), processes)
    with torch.no_grad():
        y = model(images())
    for full in (True, False):
        options = dcp.StateDictOptions(full_state_dict=full)
        state = dcp.get_model_state_dict(model, options=options)
        assert list(state) == list(expected)
        assert all(torch.equal(whole(value), expected[key]) for key, value in state.items())
        kept = {key: value.clone() for key, value in state.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        dcp.set_model_state_dict(model, kept, options=options)
        with torch.no_grad():
            torch.testing.assert_close(model(images()), y)


def fsdp_in_bfloat16(name: str, processes: DistContext) -> None:
    """Mixed precision gathers what autocast computes in."""
    model, seen, head = build(name), set(), set()
    for module in blocks_of(model)[0].modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, _: seen.add(module.weight.dtype))
    model.head.register_forward_pre_hook(lambda module, _: head.add(module.weight.dtype))
    shard(model, processes, torch.bfloat16)
    compare(name, model, processes.rank, 0.1, torch.bfloat16)
    assert (seen, head) == ({torch.bfloat16}, {torch.float32}), name
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def lamb_steps(network: nn.Module, foreach: bool, part: slice) -> dict[str, torch.Tensor]:
    """The weights after five updates, of which some parameters decay."""
    optimizer = Lamb(parameter_groups(network, 0.1), lr=0.05, foreach=foreach)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))[part]
    for _ in range(5):
        optimizer.zero_grad()
        network(x).square().mean().mul(100).backward()
        optimizer.step()
    return {name: whole(p) for name, p in network.named_parameters()}


def fsdp_with_lamb(name: str, processes: DistContext) -> None:
    """The last layer's single row lies on one process alone, the other's shard is empty."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
    start = copy.deepcopy(network.state_dict())
    expected = lamb_steps(copy.deepcopy(network), False, slice(None))
    for foreach in (False, True):
        sharded = copy.deepcopy(network)
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        for key, value in lamb_steps(sharded, foreach, slice(processes.rank, None, 2)).items():
            assert (value - start[key]).abs().max() > 1e-2
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def joined(case, names: tuple[str, ...], meeting: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for name in names:
        case(name, DistContext(torch.device("cpu"), rank, 2))
        torch._dynamo.reset()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (ddp, FAMILIES),
        (ddp_checkpointed_and_compiled, KINDS[::2]),
        (fsdp_checkpointed_and_compiled, KINDS[::2]),
        (fsdp_on_linear_maps, FAMILIES),
        (fsdp_state_dict, FAMILIES),
        (fsdp_in_bfloat16, KINDS),
        (fsdp_with_lamb, ("three layers",)),
    ],
)
def test_two_processes_compute_what_one_does(case, names, tmp_path):
    if case.__name__.startswith("fsdp") and not SHARDS_ON_CPU:
        pytest.skip("this torch shards on GPUs only")
    body = functools.partial(joined, case, names, tmp_path / "meeting")
    for status, output in run_processes([body] * 2, (), tmp_path):
        assert status == 0, output
