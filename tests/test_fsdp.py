"""What is sharded: blocks that are called, in the precision that autocast computes in."""

import copy
import functools
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import Lamb
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_runs import TINY_NETWORKS, run_processes

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError
from deit.train.distributed import SHARDS_ON_CPU, DistContext, blocks_of, shard

shards_on_cpu = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **TINY_NETWORKS[name])


def test_blocks_are_modules_that_are_called():
    for name in TINY_NETWORKS:
        model = build(name)
        blocks, called = blocks_of(model), set()
        for block in blocks:
            block.register_forward_hook(lambda module, *_, called=called: called.add(module))
        model(torch.zeros(1, 3, 32, 32))
        assert called == set(blocks), name
        assert len(blocks) == sum(TINY_NETWORKS[name].get("depths", (2,))), name
    with pytest.raises(UserError, match="RegNet has neither 'blocks' nor 'stages'"):
        blocks_of(timm.create_model("regnety_002"))


def images(rank: int) -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))[rank::2]


def gradients(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> dict:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    named = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters()}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in named.items()
        if grad is not None
    }


def close(ours: dict, reference: dict, tolerance: float, name: str) -> None:
    assert ours.keys() == reference.keys(), name
    for key, value in reference.items():
        error = (ours[key] - value).norm() / (value.norm() + 1e-4)
        assert error < tolerance, (name, key, error)


def in_two_processes(body, folder: Path) -> None:
    def_body = functools.partial(joined, body, str(folder / "rendezvous"))
    for status, output in run_processes([def_body] * 2, (), folder):
        assert status == 0, output


def joined(body, rendezvous: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    body(rank, DistContext(torch.device("cpu"), rank, 2))
    dist.destroy_process_group()


def note_dtype(seen: set, module: nn.Module, inputs: tuple) -> None:
    seen.add(module.weight.dtype)


def shard_in_bfloat16(rank: int, processes: DistContext) -> None:
    """Mixed precision gathers what autocast computes in."""
    for name in ("d2_deit_tiny_patch16_LS", "d2_convnext_tiny", "resmlp_equi_d2_12"):
        model = build(name)
        whole = torch.cat([images(0), images(1)])
        reference = gradients(copy.deepcopy(model), whole)
        seen = set()
        note = functools.partial(note_dtype, seen)
        for module in blocks_of(model)[0].modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(note)
        model.head.register_forward_pre_hook(functools.partial(note_dtype, head := set()))
        shard(model, processes, torch.bfloat16)
        close(gradients(model, images(rank), torch.bfloat16), reference, 0.1, name)
        assert (seen, head) == ({torch.bfloat16}, {torch.float32}), name
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def lamb_steps(network: nn.Module, foreach: bool, part: slice) -> dict[str, torch.Tensor]:
    """The weights after five updates, of which some parameters decay."""
    params = list(network.parameters())
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=0.05, foreach=foreach)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))[part]
    for _ in range(5):
        optimizer.zero_grad()
        network(x).square().mean().mul(100).backward()
        optimizer.step()
    named = network.named_parameters()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}


def shard_with_lamb(rank: int, processes: DistContext) -> None:
    """The last layer's single row lies on one process alone, the other's shard is empty."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
    start = copy.deepcopy(network.state_dict())
    whole = lamb_steps(copy.deepcopy(network), False, slice(None))
    for foreach in (False, True):
        sharded = copy.deepcopy(network)
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        for name, value in lamb_steps(sharded, foreach, slice(rank, None, 2)).items():
            assert (value - start[name]).abs().max() > 1e-2
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@shards_on_cpu
@pytest.mark.parametrize("body", [shard_in_bfloat16, shard_with_lamb])
def test_two_processes(body, tmp_path):
    in_two_processes(body, tmp_path)
