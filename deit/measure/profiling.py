"""Where the time of a forward pass goes: by kernel and by type of layer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from deit.measure.subject import Settings, Subject

__all__ = ["Profile", "print_profile", "profile"]

STEPS = 3
LAYER = "layer: "
OUTSIDE = "(the network itself)"


@dataclass(frozen=True)
class Profile:
    """Seconds of one forward pass by kernel (on a CPU: by operator) and by type of layer.

    Time by kernel is that of the network as it was timed. Types of layer are told apart in eager
    execution, also of a network that was timed compiled: a compiler joins layers.
    """

    by_kernel: Mapping[str, float]
    by_layer: Mapping[str, float]


def profile(name: str, batch: int, settings: Settings) -> Profile:
    """Build the network and profile its inference."""
    subject = Subject(name, batch, settings)
    by_kernel = _kernels(_events(subject.infer, settings.device))
    with torch.compiler.set_stance("force_eager"), _named_layers(subject.model):
        by_layer = _layers(_events(subject.infer, settings.device), settings.device)
    return Profile(by_kernel, by_layer)


def _events(step: Callable[[], object], device: torch.device) -> list[Any]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return list(profiler.events())


def _kernels(events: list[Any]) -> dict[str, float]:
    """Seconds a step of each kernel on the device, or of each operator's own on a CPU."""
    on_device = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.name.startswith(LAYER)
    ]
    seconds: Counter[str] = Counter()
    for event in on_device or events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        seconds[event.name] += own / 1e6 / STEPS
    return dict(seconds.most_common())


@contextlib.contextmanager
def _named_layers(model: nn.Module) -> Iterator[None]:
    """Within it every module marks its execution in a profile with its type."""
    ranges: list[record_function] = []

    def enter(module: nn.Module, _: Any) -> None:
        ranges.append(record_function(LAYER + type(module).__name__))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(events: list[Any], device: torch.device) -> dict[str, float]:
    """Seconds a step by the innermost layer that an operator or kernel was called in."""
    seconds: Counter[str] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.name.startswith(LAYER):
            continue  # kernels are counted with the operators that launched them
        if device.type == "cuda":
            own = sum(kernel.duration for kernel in event.kernels)
        else:
            own = event.self_cpu_time_total
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(LAYER):
            parent = parent.cpu_parent
        layer = OUTSIDE if parent is None else parent.name.removeprefix(LAYER)
        seconds[layer] += own / 1e6 / STEPS
    return dict(seconds.most_common())


def print_profile(name: str, batch: int, found: Profile, console: Console, rows: int = 12) -> None:
    """Two tables, the longest times first."""
    for what, times in (("kernel", found.by_kernel), ("layer, eager", found.by_layer)):
        total = sum(times.values())
        title = f"\n{name}, batch {batch}: {1e3 * total:,.2f} ms by {what}"
        console.print(title, style="bold", highlight=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
        table.add_column(what, no_wrap=True, overflow="ellipsis")
        for label, seconds in list(times.items())[:rows]:
            share = f"{100 * seconds / total:.1f}%" if total else "-"
            table.add_row(f"{1e3 * seconds:,.2f}", share, label)
        if len(times) > rows:
            rest = sum(list(times.values())[rows:])
            table.add_row(f"{1e3 * rest:,.2f}", f"{100 * rest / total:.1f}%", "(the others)")
        console.print(table)
