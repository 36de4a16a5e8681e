"""Our LAMB against timm's, in its corner cases, and sharded."""

import copy

import pytest
import timm.optim
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit.train.distributed import SHARDS_ON_CPU
from deit.train.lamb import Lamb

SHAPES = [(5, 7), (7,), (1, 3, 6), (4, 3, 2, 2), (1,), ()]


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    with torch.no_grad():
        params[2].zero_()  # a weight of norm zero has trust ratio 1
    return params


def groups(params):
    """Groups of three different decays, a learning rate of its own for one."""
    return [
        {"params": params[:2], "weight_decay": 0.3},
        {"params": params[2:4], "weight_decay": 0.02, "lr": 0.01},
        {"params": params[4:], "weight_decay": 0.0},
    ]


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if (i, step) == (1, 3) else grad


def train(params, optimizer, steps, scale=1.0):
    for step in steps:
        give_gradients(params, step, scale)
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scale", [3.0, 0.01], ids=["clipped", "unclipped"])
def test_same_updates_as_timm_over_20_steps(scale, capturable):
    ours, theirs = make_params(), make_params()
    train(ours, Lamb(groups(ours), lr=0.02, eps=1e-6, capturable=capturable), range(20), scale)
    train(theirs, timm.optim.Lamb(groups(theirs), lr=0.02, eps=1e-6), range(20), scale)
    for a, b, start in zip(ours, theirs, make_params(), strict=True):
        assert (a - start).abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_double_precision_agrees_more_closely():
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    train(ours, Lamb(groups(ours), lr=0.02), range(20))
    train(theirs, timm.optim.Lamb(groups(theirs), lr=0.02), range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_first_step_by_hand():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([6.0, -8.0])
    Lamb([p], lr=0.1, eps=0.0, weight_decay=0.5).step()
    # Bias-corrected, the first m / sqrt(v) is the sign of the gradient, whatever the clipping.
    update = torch.tensor([1.0, -1.0]) + 0.5 * torch.tensor([3.0, 4.0])
    expected = torch.tensor([3.0, 4.0]) - 0.1 * 5 / update.norm() * update
    torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p.grad, torch.tensor([6.0, -8.0])), "clipping must not touch the gradient"


@pytest.mark.parametrize("capturable", [False, True])
def test_resume_from_the_state_dict_is_exact(capturable):
    straight = make_params()
    train(straight, Lamb(groups(straight), lr=0.02, capturable=capturable), range(10))
    params = make_params()
    optimizer = Lamb(groups(params), lr=0.02, capturable=capturable)
    train(params, optimizer, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = Lamb(groups(params), lr=99.0, capturable=capturable)
    resumed.load_state_dict(saved)
    train(params, resumed, range(5, 10))
    for a, b in zip(straight, params, strict=True):
        assert torch.equal(a, b)


def test_takes_over_from_timm():
    """Also from apex, whose state dict differs from timm's in a plain number for the count."""
    straight = make_params()
    train(straight, timm.optim.Lamb(groups(straight), lr=0.02), range(10))
    params = make_params()
    optimizer = timm.optim.Lamb(groups(params), lr=0.02)
    train(params, optimizer, range(5))
    ours = Lamb(groups(params), lr=0.02)
    ours.load_state_dict(optimizer.state_dict())
    assert [group["step"] for group in ours.param_groups] == [5, 5, 5]
    assert all(isinstance(group["step"], int) for group in ours.param_groups)
    train(params, ours, range(5, 10))
    for a, b in zip(straight, params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_closure_and_no_gradients_at_all():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lamb([p], lr=0.1)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (p < 1).all()


def test_grad_scaler_skips_overflows():
    p = nn.Parameter(torch.ones(3))
    optimizer = Lamb([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * torch.tensor([1.0, float("inf"), 1.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, torch.ones(3))
    assert optimizer.param_groups[0]["step"] == 0
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert (p < 1).all()


class NoHostSync(TorchDispatchMode):
    """Fails on the operations that read a value back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), f"{func} waits for the device"
        assert "nonzero" not in str(func), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_never_waits_for_the_device(capturable):
    params = make_params()
    optimizer = Lamb(groups(params), lr=0.02, capturable=capturable)
    train(params, optimizer, range(2))
    with NoHostSync():
        optimizer.step()
        with pytest.raises(AssertionError, match="waits"):
            params[0].sum().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_without_waiting_and_as_a_cuda_graph():
    def on_gpu():
        return [nn.Parameter(p.detach().cuda()) for p in make_params()]

    reference, eager, captured = make_params(), on_gpu(), on_gpu()
    for params in (reference, eager, captured):
        for p, grad in zip(params, make_params(), strict=True):
            p.grad = grad.detach().to(p.device)
    optimizers = [
        Lamb(groups(reference), lr=0.02),
        Lamb(groups(eager), lr=0.02),
        Lamb(groups(captured), lr=0.02, capturable=True),
    ]
    for optimizer in optimizers:
        optimizer.step()  # makes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizers[1].step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, does not run
        optimizers[2].step()
    for _ in range(2):
        optimizers[0].step()
        graph.replay()
    optimizers[1].step()
    for a, b, c in zip(reference, eager, captured, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(c.cpu(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "lr -1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Lamb(make_params(), **settings)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Lamb(embedding.parameters()).step()


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))


def _train_network(network, rank=0, world_size=1):
    network_params = list(network.parameters())
    optimizer = Lamb(
        [
            {"params": [p for p in network_params if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in network_params if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.05,
    )
    images = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        optimizer.zero_grad()
        network(images[rank::world_size]).square().mean().mul(100).backward()
        optimizer.step()


def _sharded(rank, address, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    network = _network()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(network, mesh=mesh)
    _train_network(network, rank, 2)
    state = {name: p.full_tensor().detach() for name, p in network.named_parameters()}
    if rank == 0:
        torch.save(state, f"{folder}/state.pth")
    dist.destroy_process_group()


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")
def test_sharded_over_two_processes(tmp_path):
    """The last layer's single row lies on one process alone, the other's shard is empty."""
    mp.spawn(_sharded, args=(f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "state.pth")
    network = _network()
    start = copy.deepcopy(network.state_dict())
    _train_network(network)
    for name, value in network.state_dict().items():
        assert (value - start[name]).abs().max() > 1e-2
        torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-6)
