"""What each of two processes does in `test_distributed_tools`: every case on every family.

The batch is split over them, and gradients must be those of the whole batch on one process.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from networks import CLASSES, create, images, inner_linears
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from deit.train.distributed import SHARDS_ON_CPU, DistContext, blocks_of, shard, wrap_ddp

# one of each kind of block, and a bridge
FAMILIES = ["vit", "hybrid", "resmlp", "hierarchical convnext"]
BATCH = 4


def run(rank: int, folder: str) -> None:
    """All cases; rank 0 and rank 1 write what went wrong to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    processes = DistContext(torch.device("cpu"), rank, 2)
    results = {}
    for network in FAMILIES:
        for name, case in CASES.items():
            try:
                case(network, processes)
                results[f"{network}, {name}"] = ""
            except Exception:
                results[f"{network}, {name}"] = traceback.format_exc()
            torch._dynamo.reset()
    path = Path(folder) / f"rank{rank}.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def loss_of(model: nn.Module, part: slice) -> Tensor:
    y = torch.arange(BATCH) % CLASSES
    return nn.functional.cross_entropy(model(images(BATCH)[part]), y[part])


def compare(
    network: str,
    model: nn.Module,
    rank: int,
    names: Callable[[str], bool] = lambda name: True,
) -> None:
    """Gradients of `model` on this process's half of the batch, against a whole one's."""
    single = create(network).train()
    loss_of(single, slice(None)).backward()
    expected = {n: p.grad for n, p in single.named_parameters()}
    loss_of(model, slice(rank * 2, rank * 2 + 2)).backward()
    compared = 0
    for name, parameter in model.named_parameters():
        # DDP and compiled wrappers put their own name before
        name = name.replace("module.", "").replace("_orig_mod.", "")
        if names(name):
            gradient = parameter.grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)
            compared += gradient.any().item()
    assert compared > 0


def ddp(network: str, processes: DistContext) -> None:
    compare(network, wrap_ddp(create(network).train(), processes), processes.rank)


def ddp_checkpointed_and_compiled(network: str, processes: DistContext) -> None:
    model = create(network).train()
    model.set_grad_checkpointing()
    model.compile(backend="eager")
    compare(network, wrap_ddp(model, processes), processes.rank)


def ddp_on_linear_maps(network: str, processes: DistContext) -> None:
    model = create(network).train()
    names = list(inner_linears(model))
    for name in names:
        model.set_submodule(name, DistributedDataParallel(model.get_submodule(name)))
    compare(network, model, processes.rank, lambda n: n.rpartition(".")[0] in names)


def fsdp(network: str, processes: DistContext) -> None:
    compare(network, shard(create(network).train(), processes), processes.rank)


def fsdp_checkpointed_and_compiled(network: str, processes: DistContext) -> None:
    model = create(network).train()
    model.set_grad_checkpointing()
    for block in blocks_of(model):
        block.compile(backend="eager")
    compare(network, shard(model, processes), processes.rank)


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (2,))


def fsdp_on_linear_maps(network: str, processes: DistContext) -> None:
    model = create(network).train()
    for module in inner_linears(model).values():
        fully_shard(module, mesh=mesh())
    compare(network, fully_shard(model, mesh=mesh()), processes.rank)


def fsdp_state_dict(network: str, processes: DistContext) -> None:
    """Whole and sharded, they hold what a single process's holds, and go back in."""
    single = create(network)
    expected = single.state_dict()
    model = shard(create(network), processes)
    with torch.no_grad():
        y = model(images(2))
    for full in (True, False):
        options = dcp.StateDictOptions(full_state_dict=full)
        state = dcp.get_model_state_dict(model, options=options)
        assert list(state) == list(expected)
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
        for key, value in whole.items():
            assert torch.equal(value, expected[key]), key
        if full:
            create(network).load_state_dict(whole)
        kept = {k: v.clone() for k, v in state.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        dcp.set_model_state_dict(model, kept, options=options)
        with torch.no_grad():
            torch.testing.assert_close(model(images(2)), y)


CASES: dict[str, Callable[[str, DistContext], None]] = {
    "DDP": ddp,
    "DDP, checkpointed and compiled": ddp_checkpointed_and_compiled,
    "DDP on linear maps": ddp_on_linear_maps,
}
if SHARDS_ON_CPU:
    CASES |= {
        "FSDP2": fsdp,
        "FSDP2, checkpointed and compiled": fsdp_checkpointed_and_compiled,
        "FSDP2 on linear maps": fsdp_on_linear_maps,
        "state dicts of FSDP2": fsdp_state_dict,
    }

if __name__ == "__main__":
    run(int(os.environ["RANK"]), os.environ["FOLDER"])
