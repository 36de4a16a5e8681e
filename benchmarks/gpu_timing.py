"""Equivariant networks beside their ordinary twins on a GPU: what is timed, how, and the goals.

Used by gpu_report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import deit.models  # noqa: F401 - registers the networks
from deit import kernels
from deit.complexity import profiling
from deit.complexity.hardware import synchronize
from deit.complexity.published import twin_of
from deit.complexity.subject import release
from deit.complexity.timing import Timing, alternate
from deit.equivariance import randomize_
from deit.errors import one_line

__all__ = [
    "HEADING",
    "NETWORKS",
    "Network",
    "Options",
    "Profile",
    "Row",
    "Scale",
    "measure",
    "paired_ratio",
    "profile",
]

MEMORY_GOAL = 0.8
PROFILED = 8  # kernels that are printed
WARM_UP = 3


@dataclass(frozen=True)
class Network:
    """A network, and the goals for its throughput over that of its twin."""

    name: str
    inference: float
    training: float


# what tells most comes first
NETWORKS = (
    Network("d2_deit_base_patch16_LS", 1.45, 1.4),
    Network("d2_convnext_isotropic_base", 1.5, 1.4),
    Network("resmlp_equi_d2_B_24", 1.6, 1.5),
    Network("d2_deit_small_patch16_LS", 1.25, 1.2),
    Network("d2_deit_large_patch16_LS", 1.55, 1.5),
    Network("d2_deit_huge_patch14_LS", 1.65, 1.55),
    Network("d2_convnext_isotropic_small", 1.3, 1.25),
    Network("resmlp_equi_d2_24", 1.4, 1.35),
    Network("d2_convnext_isotropic_large", 1.6, 1.5),
    Network("resmlp_equi_d2_L_24", 1.75, 1.6),
    Network("resmlp_equi_d2_12", 1.3, 1.2),
)
CHECKED = (
    "d2_deit_small_patch16_LS",
    "d2_convnext_isotropic_small",
    "resmlp_equi_d2_12",
    "d2_deit_base_patch16_LS",
    "d2_convnext_isotropic_base",
    "resmlp_equi_d2_B_24",
    "d2_convnext_tiny",
)
# of a rehearsal: as few as have blocks of each kind
TINY = {
    "d2_deit_base_patch16_LS": dict(embed_dim=32, depth=2, num_heads=2, img_size=32),
    "d2_convnext_isotropic_base": dict(embed_dim=32, depth=2, img_size=32),
    "resmlp_equi_d2_B_24": dict(embed_dim=32, depth=2, img_size=32),
}


@dataclass(frozen=True)
class Scale:
    """What a rehearsal has less of."""

    device: torch.device
    batch: int = 64
    large_batch: int = 256
    backend: str = "inductor"
    networks: tuple[Network, ...] = NETWORKS
    checked: tuple[str, ...] = CHECKED
    kwargs: Callable[[str], dict[str, Any]] = lambda name: {}

    @classmethod
    def rehearsal(cls) -> Scale:
        return cls(
            torch.device("cpu"),
            batch=2,
            large_batch=3,
            backend="aot_eager",
            networks=tuple(n for n in NETWORKS if n.name in TINY),
            checked=tuple(TINY),
            kwargs=lambda name: TINY[name if name in TINY else _ours(name)],
        )


@dataclass(frozen=True)
class Options:
    """How networks are run: `compile` blocks, whole or none; at least `seconds` for each.

    Inference has bfloat16 weights, or with `autocast` float32 ones, as training has.
    """

    compile: str = "blocks"
    seconds: float = 1.0
    autocast: bool = False


def _ours(twin: str) -> str:
    return next(network.name for network in NETWORKS if twin_of(network.name) == twin)


@dataclass
class Row:
    """Throughputs of twins in images a second, and ratios above one where ours is better.

    Errors are of `Runner.errors`.
    """

    part: str
    model: str
    batch: int
    ordinary: float
    equivariant: float
    ratio: float
    spread: float
    goal: float
    graph_ratio: float | None = None
    memory_ratio: float | None = None
    error: float | None = None
    plain_error: float | None = None
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether logits, if they were looked at, round about as those of plain formulas do."""
        return self.error is None or self.error <= 1.5 * self.plain_error + 1e-3

    def __str__(self) -> str:
        verdict = "met" if self.ratio >= self.goal else "missed"
        text = (
            f"{self.part:9} {self.model:28} {self.batch:4} {self.ordinary:8.0f} "
            f"{self.equivariant:8.0f}  {self.ratio:5.3f} ±{self.spread:5.3f}  "
            f"goal {self.goal:4.2f} {verdict}"
        )
        if self.graph_ratio is not None:
            text += f"  graphs {self.graph_ratio:5.3f}"
        if self.memory_ratio is not None:
            verdict = "met" if self.memory_ratio <= MEMORY_GOAL else "missed"
            text += f"  memory {self.memory_ratio:5.3f} goal {MEMORY_GOAL} {verdict}"
        if self.error is not None:
            text += f"  error {self.error:.0e} (plain {self.plain_error:.0e})"
        return text + ("" if self.right else " WRONG") + self.note


@dataclass
class Profile:
    """Milliseconds of a step: by the clock, and by kernel (of operators, on a CPU)."""

    model: str
    training: bool
    step: float
    kernels: dict[str, float]

    def __str__(self) -> str:
        busy = sum(self.kernels.values())
        what = "training" if self.training else "inference"
        lines = [f"{self.model} {what}: {self.step:.2f} ms a step, {busy:.2f} ms of it in kernels"]
        for name, ms in list(self.kernels.items())[:PROFILED]:
            lines.append(f"  {ms:8.3f} ms {100 * ms / busy:5.1f}%  {name[:78]}")
        return "\n".join(lines)


HEADING = f"{'part':9} {'network':28} batch ordinary     ours  ratio"


class Runner:
    """A network and a batch of random images; `infer` and `train` are what is timed."""

    def __init__(
        self, name: str, batch: int, scale: Scale, options: Options, training: bool
    ) -> None:
        device = scale.device
        self._before = _allocated(device)
        self.device = device
        kwargs = scale.kwargs(name)
        with torch.device(device):
            model = timm.create_model(name, **kwargs)
        for module in model.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = True
        self.autocast = options.autocast or training
        storage = torch.float32 if self.autocast else torch.bfloat16
        self.model = model.to(storage).train(training)
        self.forward: Callable[[Tensor], Tensor] = self.model
        settings = dict(backend=scale.backend, dynamic=False)
        if options.compile == "blocks":
            for block in self.model.blocks:
                block.compile(**settings)
        elif options.compile == "whole":
            self.forward = torch.compile(self.model, **settings)
        size = kwargs.get("img_size") or 224
        self.images = torch.randn(batch, 3, size, size, device=device, dtype=storage)
        self.targets = torch.randint(0, 1000, (batch,), device=device)
        if training:
            fused = device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=fused)

    def infer(self) -> Tensor:
        """Logits of the batch."""
        with torch.no_grad(), self._cast():
            return self.forward(self.images)

    def train(self) -> None:
        """One update of the weights."""
        with self._cast():
            loss = F.cross_entropy(self.forward(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def errors(self) -> tuple[float, float]:
        """How far the logits are from plain formulas in float32: as they are timed, and by plain
        formulas without compilation. The weights are random from now on."""
        randomize_(self.model)
        timed = self.infer()
        with torch.no_grad(), kernels.plain(), torch.compiler.set_stance("force_eager"):
            with self._cast():
                plain = self.model(self.images)
            exact = self.model.float()(self.images.float())
        return tuple(float((y.float() - exact).norm() / exact.norm()) for y in (timed, plain))

    def warm_up(self, step: Callable[[], object]) -> int | None:
        """Compile and choose implementations; the peak of memory in bytes, on a GPU."""
        for _ in range(WARM_UP):
            step()
        if self.device.type != "cuda":
            return None
        _allocated(self.device)  # the workspaces are needed again, and so counted
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._before


def _allocated(device: torch.device) -> int:
    """Bytes that are in use, without the workspaces of cuBLAS: the network that is measured first
    would pay for those that the next one uses too."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    return torch.cuda.memory_allocated(device)


def as_graph(step: Callable[[], object]) -> Callable[[], None]:
    """The same as one CUDA graph, which costs the processor a single launch."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def paired_ratio(ordinary: Timing, ours: Timing) -> tuple[float, float]:
    """Median of the ratios of neighbouring samples, and half the range of the middle half."""
    ratios = [o / e for o, e in zip(ordinary.samples, ours.samples, strict=True)]
    return median(ratios), Timing(tuple(ratios)).spread * median(ratios)


def measure(part: str, network: Network, scale: Scale, options: Options) -> Row:
    """Time a network beside its twin."""
    training = part == "training"
    batch = scale.large_batch if part == "large" else scale.batch
    names = {"ordinary": twin_of(network.name), "ours": network.name}
    try:
        steps, peaks = {}, {}
        for key, name in names.items():
            runner = Runner(name, batch, scale, options, training)
            steps[key] = runner.train if training else runner.infer
            peaks[key] = runner.warm_up(steps[key])
        times = alternate(steps, scale.device, options.seconds)
        ratio, spread = paired_ratio(times["ordinary"], times["ours"])
        row = Row(
            part,
            network.name,
            batch,
            batch / times["ordinary"].median,
            batch / times["ours"].median,
            ratio,
            spread,
            network.training if training else network.inference,
        )
        if training and peaks["ours"] is not None:
            row.memory_ratio = peaks["ours"] / peaks["ordinary"]
        if not training and scale.device.type == "cuda":
            try:
                row.graph_ratio = _graph_ratio(steps, scale, options)
            except Exception as error:  # the row is worth having without
                row.note = f"  no graphs: {one_line(error)[:100]}"
        if part == "inference":
            try:
                row.error, row.plain_error = runner.errors()
            except Exception as error:
                row.note += f"  not compared: {one_line(error)[:100]}"
        return row
    finally:
        steps = runner = None  # what holds memory
        release(scale.device)


def profile(network: Network, scale: Scale, options: Options, training: bool) -> list[Profile]:
    """Where the time of a network and of its twin goes, the twin first."""
    found = []
    for name in (twin_of(network.name), network.name):
        runner = None
        try:
            runner = Runner(name, scale.batch, scale, options, training)
            step = runner.train if training else runner.infer
            runner.warm_up(step)
            times = alternate({name: step}, scale.device, options.seconds / 4)
            seconds = profiling._kernels(profiling._events(step, scale.device))
            milliseconds = {kernel: 1000 * value for kernel, value in seconds.items()}
            found.append(Profile(name, training, 1000 * times[name].median, milliseconds))
        finally:
            step = runner = None  # what holds memory
            release(scale.device)
    return found


def _graph_ratio(steps: dict[str, Callable[[], object]], scale: Scale, options: Options) -> float:
    graphs = {key: as_graph(step) for key, step in steps.items()}
    times = alternate(graphs, scale.device, options.seconds / 2)
    return paired_ratio(times["ordinary"], times["ours"])[0]
