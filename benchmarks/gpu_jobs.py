"""What benchmarks/gpu.py measures: the parts in order, and the process that carries them out.

Jobs come to `serve` as lines of JSON on its standard input, and rows leave it as such lines. It is
run for another checkout too, and so uses nothing of `deit` that earlier versions did not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
VIT = [f"d2_deit_{size}_LS" for size in ("small_patch16", "base_patch16", "large_patch16")]
HUGE = "d2_deit_huge_patch14_LS"
OTHERS = ["d2_convnext_isotropic_base", "resmlp_equi_d2_B_24", "d2_convnext_base",
          "d2_convnext_isotropic_small", "resmlp_equi_d2_12", "hybrid_deit_base_patch16_LS",
          "d2_convnext_isotropic_large", "resmlp_equi_d2_L_24"]  # fmt: skip
FAMILIES = ["d2_deit_small_patch16_LS", "hybrid_deit_small_patch16_LS",
            "d2_inv_early_deit_small_patch16_LS", "resmlp_equi_d2_12",
            "d2_convnext_isotropic_small", "d2_convnext_tiny"]  # fmt: skip
FIRST = ["d2_convnext_isotropic_base", "resmlp_equi_d2_B_24"]
# part: share of the time, kind of job, its options, networks
PARTS: dict[str, tuple[float, str, dict[str, Any], list[str]]] = {
    "vit": (8, "timing", {"batch": 64, "mode": "default", "train": True}, [*VIT, HUGE]),
    "exactness": (2, "exactness", {"batch": 4}, FAMILIES),
    "families": (5, "timing", {"batch": 64, "mode": "default", "train": True}, OTHERS),
    "profile": (2, "profile", {"batch": 64, "mode": "default"}, VIT[1:2]),
    "latency": (2.5, "timing", {"batch": 8, "mode": "reduce-overhead"}, [*VIT[:2], *FIRST]),
    "large": (3, "timing", {"batch": 256, "mode": "max-autotune"}, [VIT[1], *FIRST]),
    "training": (2.5, "training", {"batch": 128}, VIT[:1]),
}
# a quick run's: as many networks a part, of so many blocks and pixels
QUICK_NETWORKS, QUICK_SIZE = 1, 32
QUICK_DEPTH = {"depth": 1, "depths": (1, 1, 1, 1)}


def networks(part: str, quick: bool) -> list[str]:
    """The networks of a part, in their order; of exactness, a quick run has all families too."""
    names = PARTS[part][3]
    return names[:QUICK_NETWORKS] if quick and part != "exactness" else names


def _settings(job: Row, train: bool = False) -> Any:
    import torch

    from deit.measure.subject import Settings

    quick = {"img_size": QUICK_SIZE, "arguments": QUICK_DEPTH} if job["quick"] else {}
    blocks = job["compile_blocks"] and job.get("mode") == "default"
    more = {"compile_blocks": True} if blocks else {}  # others have CUDA graphs
    if "arguments" not in Settings.__dataclass_fields__:  # of an earlier version
        quick.pop("arguments", None)
    return Settings(
        torch.device(job["device"]), torch.bfloat16, amp=True, train=train,
        compile_mode=None if job["quick"] else job.get("mode"), **quick, **more,
    )  # fmt: skip


def timing(job: Row) -> Iterator[Row]:
    """Inference, then training, of a network beside its twin. Ratios above one: ours is better."""
    train = job.get("train", False)
    try:
        yield from _timing(job, train)
    except RuntimeError as error:
        from deit.measure.subject import is_out_of_memory

        if not train or not is_out_of_memory(error):
            raise
        memory = str(error).splitlines()[0]
    else:
        return
    _release(job)  # outside of `except`, whose traceback holds the networks
    yield {"what": "training", "error": f"out of memory: {memory[:200]}"}
    yield from _timing(job, False)


def _timing(job: Row, train: bool) -> Iterator[Row]:
    from deit.measure.published import twin_of
    from deit.measure.subject import Subject
    from deit.measure.timing import alternate

    settings, batch = _settings(job, train), job["batch"]
    began = time.monotonic()
    subjects = {
        name: Subject(name, batch, settings) for name in (twin_of(job["name"]), job["name"])
    }
    for subject in subjects.values():
        subject.warm_up()
    compiling = round(time.monotonic() - began, 1)
    for what in ("inference", "training")[: 1 + train]:
        for subject in subjects.values():
            subject.model.train(what == "training")
        steps = {n: s.train_step if what == "training" else s.infer for n, s in subjects.items()}
        times = alternate(steps, settings.device, job["seconds"])
        key = "train_peak_memory" if what == "training" else "peak_memory"
        twin, ours = (
            {"images_per_s": batch / times[n].median, "spread": times[n].spread,
             "memory_mb": getattr(s, key) / 2**20}
            for n, s in subjects.items()
        )  # fmt: skip
        yield {"what": what, "batch": batch, "mode": settings.compile_mode, "twin": twin,
               "ours": ours, "speed": ours["images_per_s"] / twin["images_per_s"],
               "memory": ours["memory_mb"] / twin["memory_mb"],
               "preparing_s": compiling}  # fmt: skip


def exactness(job: Row) -> Iterator[Row]:
    """Relative errors of logits and of all gradients against float64 on the CPU."""
    import torch

    from deit.equivariance import randomize_
    from deit.measure.networks import build
    from deit.measure.published import twin_of

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    row: Row = {"what": "errors", "batch": job["batch"]}
    settings = _settings(job)
    arguments = {"arguments": settings.arguments} if getattr(settings, "arguments", None) else {}
    for role, name in (("ours", job["name"]), ("twin", twin_of(job["name"]))):
        torch.manual_seed(0)
        model, size = build(name, img_size=settings.img_size, **arguments)
        images = torch.randn(job["batch"], 3, size, size, dtype=torch.float64)
        model = randomize_(model.double())

        def run(device: str, dtype: torch.dtype, amp: bool, model=model, images=images) -> Any:
            model.to(device, dtype).zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                logits = model(images.to(device, dtype))
            logits.double().square().mean().backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            return [t.detach().double().cpu() for t in (logits, torch.cat(gradients))]

        exact = run("cpu", torch.float64, False)
        for label, amp in (("float32", False), ("bfloat16", True)):
            found = run(job["device"], torch.float32, amp)
            errors = [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
            row[f"{role} {label}"] = dict(zip(("logits", "gradients"), errors, strict=True))
    yield row


def profile(job: Row) -> Iterator[Row]:
    """Time by kernel of a step, and the bytes that Inductor counts for the compiled graphs."""
    from torch._inductor import config, metrics

    from deit.measure.profiling import _events, _kernels
    from deit.measure.published import twin_of
    from deit.measure.subject import Subject

    for name in (twin_of(job["name"]), job["name"]):
        subject = Subject(name, job["batch"], _settings(job, train=True))
        for what, step in (("inference", subject.infer), ("training", subject.train_step)):
            before = metrics.num_bytes_accessed
            with config.patch(force_disable_caches=True):  # counted where code is generated
                step() if what == "inference" else subject.warm_up()
            counted = metrics.num_bytes_accessed - before
            subject.model.train(what == "training")
            seconds = _kernels(_events(step, subject.settings.device))
            yield {"what": f"{what}, {name}", "batch": job["batch"], "kernels": len(seconds),
                   "ms": 1e3 * sum(seconds.values()), "inductor_mb": counted / 1e6 or None,
                   "by_kernel": {k: 1e3 * s for k, s in list(seconds.items())[:30]}}  # fmt: skip
        subject = step = None
        _release(job)


def training(job: Row) -> Iterator[Row]:
    """Two epochs of deit/main.py with EMA and random erasing on the bundled sample."""
    from deit.measure.published import twin_of

    root = Path(job["root"])
    for name in (job["name"], twin_of(job["name"]))[: 1 if job["quick"] else 2]:
        with tempfile.TemporaryDirectory() as out:
            words = [
                *("--model", name, "--epochs", "2", "--model-ema", "--reprob", "0.25"),
                *("--warmup-epochs", "0", "--device", job["device"], "--output-dir", out),
            ]
            if job["quick"]:
                words += ["--input-size", "32", "--num-workers", "0", "--aa", "none"]
                words += ["--batch-size", "250", "--model-kwargs", "depth=1", "embed_dim=96"]
            else:
                compiled = "--compile-blocks" if job["compile_blocks"] else "--compile"
                words += ["--batch-size", str(job["batch"]), compiled]
            command = [sys.executable, str(root / "deit" / "main.py"), *words]
            done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"deit/main.py: {done.stderr[-300:]}")
            log = (Path(out) / "log.txt").read_text(encoding="utf-8").splitlines()
        epochs = [json.loads(line) for line in log]
        yield {"what": name, "seconds": [e["time"] for e in epochs],
               "loss": [e["train_loss"] for e in epochs],
               "arguments": " ".join(words[2:])}  # fmt: skip


def conditions(job: Row) -> Iterator[Row]:
    """What the numbers of a checkout depend on."""
    import torch

    from deit.measure.hardware import describe, measure_ceilings, versions

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() or None

    query = "driver_version,clocks.sm,clocks.max.sm,power.limit,power.draw"
    device = torch.device(job["device"])
    row = {"what": "conditions", "device_name": describe(device), "versions": versions(),
           "revision": output("git", "-C", job["root"], "describe", "--always", "--dirty"),
           query: output("nvidia-smi", f"--query-gpu={query}", "--format=csv")}  # fmt: skip
    if device.type == "cuda":
        ceilings = measure_ceilings(device, torch.bfloat16)
        row["tflop_per_s"], row["gb_per_s"] = (
            ceilings.flops_per_s / 1e12,
            ceilings.bytes_per_s / 1e9,
        )
    yield row


KINDS: dict[str, Callable[[Row], Iterator[Row]]] = {
    f.__name__: f for f in (conditions, timing, exactness, profile, training)
}


def _release(job: Row) -> None:
    import torch

    from deit.measure.subject import release

    release(torch.device(job["device"]))


def serve(root: str) -> None:
    """Carry out jobs with the networks of the checkout at `root`, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    sys.path[0] = root
    import torch._dynamo

    import deit.models  # noqa: F401 - registers the networks

    torch._dynamo.config.cache_size_limit = 64  # one process compiles many networks of a class
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = True  # as in training
    for line in sys.stdin:
        job = json.loads(line)
        last: Row = {"done": True}
        try:
            for row in KINDS[job["kind"]](job):
                print(json.dumps(row), file=answers, flush=True)
        except Exception as error:  # the other jobs are worth having
            last["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            _release(job)
            torch.zeros(1, device=job["device"]).item()
        except Exception:  # the device is lost to this process
            last["lost"] = True
        print(json.dumps(last), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "deit").is_dir():
        print(f"gpu.py starts this with a checkout's folder, not {sys.argv[1:]}", file=sys.stderr)
        sys.exit(2)
    serve(sys.argv[1])
