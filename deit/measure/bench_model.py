"""A network on the device, ready to be timed: built, cast, compiled, fed with random images."""

from __future__ import annotations

import gc
import logging
from argparse import Namespace
from collections.abc import Callable
from itertools import accumulate

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deit.measure.hardware import synchronize
from deit.measure.networks import build
from deit.models.inputs import input_channels
from deit.train.compilation import GRAPHS, compile_network
from deit.train.engine import Precision

WARM_UP = 3


class BenchModel:
    """A network and a batch of random images; `infer` and `train_step` are what is timed.

    A training step is forward, cross-entropy, backward and AdamW, without stochastic depth.

    Args:
        args: as `options.parse_args` gives them.
    """

    def __init__(self, name: str, batch: int, args: Namespace) -> None:
        self.args, device = args, args.device
        cuda = device.type == "cuda"
        self._before = torch.cuda.memory_allocated(device) if cuda else 0
        self.model, size = build(
            name, args.img_size, args.arguments, device=device, dtype=args.storage
        )
        if args.compile:
            compile_network(self.model, args.compile_mode, blocks=args.compile_blocks)
        shape = (batch, input_channels(self.model), size, size)
        self.images = torch.randn(shape, device=device, dtype=args.storage)
        outputs = getattr(self.model, "num_classes", 1000) or 1
        self.targets = torch.randint(0, outputs, (batch,), device=device)
        if args.train:
            fused = True if cuda else None  # as in training
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=fused)
        self._precision = Precision(device, args.dtype if args.amp else None)

    def warm_up(self) -> tuple[float | None, float | None]:
        """Compile, and let libraries choose their algorithms.

        Returns:
            The peaks of memory in inference and in training: MiB that this network alone needs,
            for weights, images, and all that a step holds. None where a device does not tell, and
            for training without `args.train`.
        """
        inference, training = self._peak(self.infer), None
        if self.args.train:
            self.model.train()
            training = self._peak(self.train_step)
            self.model.eval()
        return inference, training

    def infer(self) -> Tensor:
        """Logits of the batch."""
        with torch.no_grad(), self._precision.autocast():
            return self.model(self.images)

    def train_step(self) -> None:
        """One update of the weights. The network must be in training mode."""
        scaler = self._precision.scaler
        with self._precision.autocast():
            loss = F.cross_entropy(self.model(self.images).float(), self.targets)
        scaler.scale(loss).backward()
        scaler.step(self._optimizer)
        scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _peak(self, step: Callable[[], object]) -> float | None:
        device = self.args.device
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            step()
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            step()
            synchronize(device)
            return (torch.cuda.max_memory_allocated(device) - self._before) / 2**20
        if device.type != "cpu":
            return None
        # what stays allocated between steps: images, weights, moments
        held = [self.images, *self.model.parameters(), *self.model.buffers()]
        if self.args.train:
            held += tree_leaves(list(self._optimizer.state.values()))
        return (sum(tensor.nbytes for tensor in held) + _cpu_peak(step)) / 2**20


def _cpu_peak(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocator holds during a step beyond those from before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that an allocation failed, on any device."""
    known = ("can't allocate memory", "not enough memory", "out of memory")
    return any(words in str(error) for words in known)


def release() -> None:
    """Free what dropped networks held, compiled code too."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def prepare_compiler() -> None:
    """Let one process compile as many networks as a group has; report its errors alone.

    Networks of one class share their code, and torch.compile falls back to eager execution, with
    nothing but a warning, once one function has been compiled a handful of times.
    """
    torch._dynamo.config.cache_size_limit = GRAPHS
    for library in ("torch._dynamo", "torch._inductor"):
        logging.getLogger(library).setLevel(logging.ERROR)
