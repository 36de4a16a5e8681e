"""Where the time of a network goes, in torch's own tables."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd.profiler_util import EventList
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import record_function

from deit.measure.bench_model import BenchModel
from deit.measure.hardware import synchronize

STEPS = 3


def profile(name: str, batch: int, args: Namespace) -> Iterator[tuple[str, str]]:
    """Titles and tables: the longest kernels (on a CPU operators), and what layers they are in.

    Kernels are those of the network as it is timed, of inference and with `args.train` of
    training. Types of layers are told apart in eager inference, as a compiler joins layers. A
    layer's time contains that of the layers in it.
    """
    from torch._inductor import compile_fx, config, metrics  # takes seconds, and may warn

    def events(step: Callable[[], object]) -> EventList:
        for _ in range(2):
            step()
        with torch.profiler.profile() as profiler:  # of all that this PyTorch can see
            for _ in range(STEPS):
                step()
            synchronize(args.device)
        return profiler.key_averages()

    time = f"{'cuda' if args.device.type == 'cuda' else 'cpu'}_time_total"
    network = BenchModel(name, batch, args)
    steps = {"inference": network.infer} | ({"training": network.train_step} if args.train else {})
    for what, step in steps.items():
        network.model.train(what == "training")
        before = metrics.num_bytes_accessed
        with (  # bytes are counted where code is generated, by new versions only for their log
            config.patch(force_disable_caches=True),
            mock.patch.object(compile_fx, "inductor_metrics_log", create=True),
        ):
            found = events(step)
        title = f"{name}, batch {batch}, {STEPS} steps of {what}"
        if counted := metrics.num_bytes_accessed - before:
            title += f", of which each moves {counted / 1e6:,.0f} MB by Inductor's count"
        yield title, found.table(sort_by=f"self_{time}", row_limit=12)
    network.model.eval()
    ranges: list[record_function] = []  # of the layers that are being run

    def enter(layer: nn.Module, _: Any) -> None:
        ranges.append(record_function(f"layer: {type(layer).__name__}"))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    with (
        torch.compiler.set_stance("force_eager"),
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ):
        found = events(network.infer)
    title = f"{name}, batch {batch}, {STEPS} steps of inference by layer, eager"
    yield title, found.table(sort_by=time, row_limit=30)
