"""One update, one epoch, one evaluation, with objects in place of a command line.

test_distributed.py has the same over several processes, test_resume.py how a training is stopped.
"""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit.train.distributed import DistContext
from deit.train.ema import ModelEma
from deit.train.engine import (
    NonFiniteLossError,
    Precision,
    Progress,
    RunningLoss,
    TrainingState,
    evaluate,
    lower_precision,
    train_one_epoch,
)
from deit.train.losses import TrainingLoss
from deit.train.metrics import Accuracy
from deit.train.stopping import StopAgreement

CPU = torch.device("cpu")
PROCESSES = DistContext(CPU)
PLAIN = Precision(CPU, None)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))


def make_batches(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, 2, 2, generator=generator)
    targets = torch.randint(0, 4, (count, size), generator=generator)
    return list(zip(images, targets, strict=True))


def make_state(net, epoch=0, ema=None, **options) -> TrainingState:
    """`schedule.seen` has the numbers of updates that the schedule is told."""
    plain = {"update_freq": 1, "clip_grad": None, "train_mode": True}
    return TrainingState(
        Namespace(**(plain | options)),
        PROCESSES,
        net,
        net,
        TrainingLoss(nn.CrossEntropyLoss()),
        torch.optim.SGD(net.parameters(), lr=0.1),
        SimpleNamespace(step_update=(seen := []).append, seen=seen),
        PLAIN,
        Progress(epoch=epoch),
        ema=ema,
    )


def run_epoch(state: TrainingState, batches, on_update=lambda *_: None) -> float:
    options = {"updates": len(batches), "agreement": StopAgreement(), "on_update": on_update}
    return train_one_epoch(state, iter(batches), **options)


@pytest.mark.parametrize("on_host", [False, True])
def test_epoch_by_hand(on_host):
    """Losses, updates, schedule and average against a loop written out."""
    batches = make_batches(3)
    net, twin = make_net(), make_net()
    ema = ModelEma(net, 0.9, on_host)
    state = make_state(net, ema=ema, epoch=4)
    mean = run_epoch(state, batches)

    average = {name: value.clone() for name, value in twin.state_dict().items()}
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses = []
    for images, targets in batches:
        loss = nn.functional.cross_entropy(twin(images), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in twin.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 0.1)
            else:
                average[name] = value.clone()
    assert mean == pytest.approx(sum(losses) / 3, abs=1e-6)
    assert state.schedule.seen == [13, 14, 15]
    for name, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
        torch.testing.assert_close(ema.module.state_dict()[name], average[name])


@pytest.mark.parametrize("on_host", [False, True])
def test_average_with_and_without_copies(on_host):
    """A copy is taken in once, and what the network becomes meanwhile does not matter."""
    net = nn.BatchNorm1d(2)
    ema = ModelEma(net, 0.5, on_host)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.num_batches_tracked.fill_(5)
        ema.update(net)
        net.weight.fill_(9.0 if on_host else 3.0)
    ema.flush()
    ema.flush()
    assert ema.module.weight.tolist() == [2.0, 2.0]
    assert ema.module.num_batches_tracked == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_average_in_host_memory_waits_for_nothing():
    net = make_net().cuda()
    near, far = ModelEma(net, 0.9), ModelEma(net, 0.9, on_host=True)
    far.update(net)
    far.flush()
    near.update(net)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            net[1].weight.add_(1)
        far.update(net)
        near.update(net)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    far.flush()
    for a, b in zip(near.module.parameters(), far.module.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


class NoHostSync(TorchDispatchMode):
    """Fails on the operations that read a value back from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), f"{func} waits for the device"
        assert "nonzero" not in str(func), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_an_update_waits_for_nothing():
    net = make_net()
    state = make_state(net, ema=ModelEma(net, 0.9), clip_grad=1.0)
    batches = iter(make_batches(3))
    state.update(batches, 0)
    with NoHostSync():
        state.update(batches, 1)
        with pytest.raises(AssertionError, match="waits"):
            state.running.total.item()


def test_gradients_may_be_clipped_and_training_be_in_evaluation_mode():
    net = make_net()
    before = net[1].weight.detach().clone()
    run_epoch(make_state(net, clip_grad=1e-3, train_mode=False), make_batches(1))
    assert 0 < (net[1].weight - before).norm() <= 0.1 * 1e-3 + 1e-8
    assert net[2].num_batches_tracked == 0


@pytest.mark.parametrize("broken", [0, 2])
def test_non_finite_loss_names_its_step_and_stops(broken):
    batches, done = make_batches(4), []
    batches[broken] = (batches[broken][0] * math.inf, batches[broken][1])
    with pytest.raises(NonFiniteLossError, match=f"step {broken}") as caught:
        run_epoch(make_state(make_net()), batches, on_update=lambda n, loss: done.append(n))
    assert (caught.value.update, done) == (broken, list(range(1, broken + 1)))


def test_the_first_bad_step_is_remembered_until_somebody_looks():
    running = RunningLoss(CPU)
    for number, value in enumerate([1.0, math.nan, 2.0, math.inf]):
        running.add(torch.tensor(value), 2, number)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        running.mean(PROCESSES)
    running = RunningLoss(CPU)
    running.add(torch.tensor(3.0), 2, 0)
    running.add(torch.tensor(6.0), 4, 1)
    assert running.mean(PROCESSES) == 5.0


class Pixels(nn.Module):
    """Logits that are the first of an image's pixels; remembers the batch sizes it saw."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.seen = classes, []

    def forward(self, images):
        self.seen.append(len(images))
        return images.flatten(1)[:, : self.classes]


@pytest.mark.parametrize("classes", [3, 11])
@pytest.mark.parametrize(
    ("batch_size", "pad", "seen"),
    [(1, False, [1] * 10), (4, False, [4, 4, 2]), (4, True, [4, 4, 4]), (16, False, [10])],
)
def test_evaluation_is_exact_for_any_batch_size(batch_size, pad, seen, classes):
    net, generator = Pixels(classes), torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 2, 2, generator=generator)
    targets = torch.randint(classes, (10,), generator=generator)
    loader = [*zip(images.split(batch_size), targets.split(batch_size), strict=True)]
    args = Namespace(batch_size=batch_size, input_size=2, compile=pad, dist_eval=True)
    args.flop_eval = False
    scores = evaluate(net.train(), loader, args, precision=PLAIN, processes=PROCESSES)
    assert net.seen == seen
    assert not net.training
    logits = images.flatten(1)[:, :classes]
    ranks = logits.argsort(dim=1, descending=True)
    hits = (ranks == targets[:, None]).double().mean(0) * 100
    loss = -logits.double().log_softmax(1)[torch.arange(10), targets].mean().item()
    acc1, acc5 = hits[0].item(), hits[:5].sum().item()
    assert 0 < acc1 < acc5
    assert (scores.acc1, scores.acc5, scores.loss) == pytest.approx((acc1, acc5, loss), rel=1e-6)
    assert scores.count == 10
    assert str(scores) == f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}"


def test_nan_is_never_correct_and_empty_is_an_error():
    accuracy = Accuracy()
    nan = torch.full((4, 3), float("nan"))
    accuracy.update(nan, torch.tensor([0, 1, 2, 0]), mirrored=nan)
    scores = accuracy.compute()
    assert (scores.acc1, scores.acc5, scores.mirrored, scores.same, scores.bad) == (0, 0, 0, 0, 4)
    assert math.isnan(scores.loss)
    with pytest.raises(ValueError, match="empty"):
        Accuracy().compute()


@pytest.mark.parametrize(("real", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_where_the_gpu_computes_in_it(real, dtype, monkeypatch):
    emulates = lambda including_emulation=True: real or including_emulation  # noqa: E731
    monkeypatch.setattr("torch.cuda.is_bf16_supported", emulates)
    assert lower_precision(torch.device("cuda")) == dtype
    assert lower_precision(CPU) == torch.bfloat16


def test_precision():
    assert str(Precision.choose(CPU, use_amp=True)) == "float32"
    half = Precision(CPU, torch.bfloat16)
    assert not half.scaler.is_enabled()
    assert Precision(CPU, torch.float16).scaler.is_enabled()
    with half.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with PLAIN.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
