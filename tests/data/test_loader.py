"""The loaders: the same bits from any number of workers, processes and restarts."""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils import worker as torch_worker

from deit.data import (
    DeviceLoader,
    ResumableBatchSampler,
    build_dataset,
    eval_transform,
    evaluation_batches,
    train_transform,
)
from deit.data.batches import erase
from deit.data.images import ArrayImages
from deit.data.stream import preserve_generators, sample_seeds, seed_everything
from deit.data.workers import REST
from deit.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def images(count=30, transform=None) -> ArrayImages:
    """Random images whose class is their number."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    names = [str(number) for number in range(count)]
    dataset = ArrayImages(pixels, range(count), names, "random images")
    dataset.transform = transform or train_transform(16)
    return dataset


def train_loader(dataset=None, device="cpu", **options):
    """The options are the sampler's and the loader's."""
    dataset = dataset or images()
    order = {"batch_size": 6, "epochs": 3, "seed": 5} | {
        name: options.pop(name) for name in ORDER & options.keys()
    }
    sampler = ResumableBatchSampler(len(dataset), **order)
    return DeviceLoader(dataset, sampler, device=device, **options)


def eval_loader(dataset=None, batch_size=7, num_workers=0, **place):
    dataset = dataset or images(transform=eval_transform(16))
    batches = evaluation_batches(len(dataset), batch_size, **place)
    return DeviceLoader(dataset, batches, device="cpu", num_workers=num_workers)


def erasing(probability=0.5, mode="pixel", count=2, splits=0) -> RandomErasing:
    return RandomErasing(probability, mode=mode, max_count=count, num_splits=splits, device="cpu")


ORDER = inspect.signature(ResumableBatchSampler).parameters.keys()


def assert_same(first, second) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def random_state() -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes()


ERASING = {"erasing": erasing()}


class TestTraining:
    def test_shapes_and_types(self):
        loader = train_loader()
        assert len(loader) == 15
        for batch, targets in loader:
            assert batch.shape == (6, 3, 16, 16)
            assert batch.dtype == torch.float32
            assert batch.is_contiguous()
            assert targets.shape == (6,)
            assert targets.dtype == torch.int64

    def test_normalisation(self):
        white = ArrayImages(np.full((6, 8, 8), 255, np.uint8), [0] * 6, ["a"], "white")
        white.transform = eval_transform(8)
        (batch, _), *_ = train_loader(white, epochs=1)
        mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
        torch.testing.assert_close(batch, ((1 - mean) / std)[:, None, None].expand(6, 3, 8, 8))
        (batch, _), *_ = train_loader(white, epochs=1, mean=(0.5,) * 3, std=(0.25,) * 3)
        torch.testing.assert_close(batch, torch.full((6, 3, 8, 8), 2.0))

    @pytest.mark.parametrize("num_workers", [1, 2, 3])
    def test_number_of_workers_changes_nothing(self, num_workers):
        options = {"repeats": 3, **ERASING}
        assert_same(train_loader(**options), train_loader(num_workers=num_workers, **options))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resume_in_the_middle_changes_nothing(self, num_workers):
        whole = list(train_loader(**ERASING))
        rest = train_loader(start_epoch=1, start_step=3, num_workers=num_workers, **ERASING)
        assert len(rest) == 7
        assert_same(whole[8:], rest)

    @pytest.mark.parametrize("repeats", [1, 3])
    def test_number_of_processes_changes_nothing(self, repeats):
        options = {"repeats": repeats, **ERASING}
        parts = [train_loader(batch_size=3, world_size=2, rank=r, **options) for r in range(2)]
        for whole, *halves in zip(train_loader(**options), *parts, strict=True):
            for rank, half in enumerate(halves):
                assert torch.equal(whole[0][rank::2], half[0])
                assert torch.equal(whole[1][rank::2], half[1])

    def test_seed_and_epoch_change_everything(self):
        batches = [*train_loader(), *train_loader(seed=6)]
        assert len({batch.numpy().tobytes() for batch, _ in batches}) == 30

    def test_copies_of_repeated_augmentation_differ(self):
        (batch, targets), *_ = train_loader(repeats=3)
        assert targets[0] == targets[1] == targets[2] != targets[3]
        assert not torch.equal(batch[0], batch[1])

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_global_generators_are_left_alone(self, num_workers):
        before = random_state()
        loader = train_loader(num_workers=num_workers, **ERASING)
        for step, _ in enumerate(loader):
            if step == 7:
                assert random_state() == before
        assert random_state() == before


class TestErasing:
    def erased(self, repeats=3, **options) -> torch.Tensor:
        """Which pixels (N, 16, 16) of the first epoch random erasing changed."""
        loaders = [
            train_loader(epochs=1, repeats=repeats, erasing=e) for e in (None, erasing(**options))
        ]
        clean, changed = (torch.cat([batch for batch, _ in loader]) for loader in loaders)
        return (clean != changed).any(1)

    def test_probability(self):
        assert not self.erased(probability=0).any()
        assert self.erased(probability=1).flatten(1).any(1).all()
        assert 5 < self.erased().flatten(1).any(1).sum() < 25

    @pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
    def test_is_timms_under_the_seed_of_each_sample(self, mode):
        """With parts that overlap."""
        theirs = erasing(0.7, mode, count=4)
        changed = torch.cat([batch for batch, _ in train_loader(epochs=1, erasing=theirs)])
        clean = torch.cat([batch for batch, _ in train_loader(epochs=1)])
        assert not torch.equal(changed, clean)
        for position, image in enumerate(clean):
            with preserve_generators():
                seed_everything(sample_seeds(5, 0, position).erasing)
                assert torch.equal(theirs(image), changed[position])

    def test_needs_no_synchronisation_with_a_gpu(self):
        """Under fake tensors whatever asks for a value raises."""
        with FakeTensorMode():
            images = torch.empty(4, 3, 8, 8, device="cuda")
            erased = torch.empty(9, dtype=torch.int64, device="cuda")
            erase(images, erased, torch.empty(9, 3, device="cuda"))

    @pytest.mark.parametrize(("repeats", "spared"), [(3, [True, False, False]), (1, [False])])
    def test_resplit_spares_the_first_of_several_copies(self, repeats, spared):
        erased = self.erased(repeats, probability=1, splits=repeats).flatten(1).any(1)
        assert erased.tolist() == [not spare for spare in spared] * (30 // repeats)


class TestEvaluation:
    @pytest.mark.parametrize(
        ("num_workers", "world_size", "batch_size"),
        [(0, 1, 4), (0, 3, 1), (0, 3, 2), (0, 8, 100), (2, 2, 1), (2, 8, 100)],
    )
    def test_every_image_once(self, num_workers, world_size, batch_size):
        dataset = images(7, eval_transform(16))
        seen = []
        for rank in range(world_size):
            loader = eval_loader(dataset, batch_size, num_workers, world_size=world_size, rank=rank)
            batches = list(loader)
            assert len(batches) == len(loader)
            seen += [target for _, targets in batches for target in targets.tolist()]
            assert all(len(batch) == len(targets) <= batch_size for batch, targets in batches)
        assert sorted(seen) == list(range(7))

    def test_can_be_run_again_with_the_same_workers(self):
        loader = eval_loader(num_workers=2)
        first = list(loader)
        workers = {worker.pid for worker in multiprocessing.active_children()}
        list(islice(loader, 2))  # left in the middle
        second = list(loader)
        assert_same(first, second)
        assert {worker.pid for worker in multiprocessing.active_children()} >= workers
        loader.close()
        assert not workers & {worker.pid for worker in multiprocessing.active_children()}


class TestFailures:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_damaged_image_is_one_line(self, own_image_tree, num_workers):
        path = own_image_tree / "train" / "bee" / "bee_1.JPEG"
        path.write_bytes(path.read_bytes()[:300])
        dataset = build_dataset("train", root=own_image_tree, transform=eval_transform(16))
        for build in (train_loader, eval_loader):
            with pytest.raises(UserError, match=r"^cannot read the image .*$") as error:
                list(build(dataset, batch_size=5, num_workers=num_workers))
            assert str(path) in str(error.value)
            assert "\n" not in str(error.value)

    def test_defects_keep_their_traceback(self):
        def defect(image):
            raise KeyError("a bug")

        with pytest.raises(KeyError, match=r"(?s)Traceback.*in defect"):
            list(train_loader(images(transform=defect), num_workers=1))

    @pytest.mark.parametrize("build", [train_loader, eval_loader])
    @pytest.mark.parametrize("error", [KeyError, UserError])
    def test_workers_end_with_a_pass_that_fails(self, error, build):
        """At once, not when the garbage collector finds them."""

        def defect(image):
            raise error("a bug")

        before = set(multiprocessing.active_children())
        gc.disable()
        try:
            loader = build(images(transform=defect), batch_size=6, num_workers=2)
            with pytest.raises(error, match="a bug"):
                list(loader)
            assert not set(multiprocessing.active_children()) - before
        finally:
            gc.enable()

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_threads_rest_once_before_workers_are_forked(self, num_workers, monkeypatch):
        """Among several processes only."""
        dataset = images(transform=eval_transform(16))
        naps = []
        monkeypatch.setattr("deit.data.workers.time", SimpleNamespace(sleep=naps.append))
        for distributed in (False, True):
            group = SimpleNamespace(
                is_available=lambda: True, is_initialized=lambda answer=distributed: answer
            )
            monkeypatch.setattr("deit.data.workers.dist", group)
            loader = eval_loader(dataset, num_workers=num_workers)
            for _ in range(2):
                list(loader)
            loader.close()
            needed = distributed and num_workers and sys.version_info < (3, 12)
            assert naps == ([REST] if needed else [])

    @pytest.mark.parametrize("starting", [False, True])
    def test_signals_are_left_to_the_main_process(self, starting, monkeypatch):
        """Even by workers that have not set up anything yet."""

        def strike():
            while len(workers := set(multiprocessing.active_children()) - before) < 2:
                time.sleep(0.01)
            for worker in workers:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(worker.pid, number)

        def start_late(*args):
            time.sleep(1)
            work(*args)

        expected = train_loader()
        before = set(multiprocessing.active_children())
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        batches = iter(train_loader(num_workers=2))
        if starting:
            work = torch_worker._worker_loop
            monkeypatch.setattr(torch_worker, "_worker_loop", start_late)
            striking = threading.Thread(target=strike)
            striking.start()
            got = [next(batches)]
            striking.join()
        else:
            got = [next(batches)]
            strike()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == held
        assert_same(expected, got + list(batches))

    def test_a_worker_that_hangs_is_killed(self, monkeypatch):
        """It does not hear SIGTERM."""
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
        before = set(multiprocessing.active_children())
        slow = images(transform=lambda image: time.sleep(1000))
        loader = eval_loader(slow, 1, num_workers=2)
        striking = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))

        def stop(*_):
            raise TimeoutError

        previous = signal.signal(signal.SIGUSR1, stop)
        try:
            striking.start()
            with pytest.raises(TimeoutError):
                list(loader)
        finally:
            signal.signal(signal.SIGUSR1, previous)
        assert not set(multiprocessing.active_children()) - before

    @pytest.mark.parametrize("ending", ["raise ValueError('x')", "os.kill(0, 15)"])
    def test_leaving_in_the_middle_ends_the_workers(self, ending):
        """Neither the process nor its workers linger, even when all of them get a SIGTERM."""
        script = f"""
            from test_loader import *
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
            train = train_loader(epochs=99, num_workers=2)
            val = eval_loader(images(), 2, num_workers=1)
            iterators = [iter(train), iter(val)]
            for iterator in iterators:
                next(iterator)
            print(*[worker.pid for worker in multiprocessing.active_children()])
            print(time.monotonic(), flush=True)
            {ending}
            """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"},
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=120,
        )
        assert result.returncode == (1 if "raise" in ending else 3), result.stderr
        *workers, started = result.stdout.split()
        assert time.monotonic() - float(started) < 60
        workers = [int(pid) for pid in workers]
        assert len(workers) == 3
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_stays_flat_over_100_epochs(image_tree):
    def resident() -> np.ndarray:
        """MiB of this process and of each worker."""
        pids = ["self", *(str(worker.pid) for worker in workers)]
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
        return np.array([int(re.search(r"^Rss: +(\d+) kB", r, re.M)[1]) for r in rollups]) / 1024

    dataset = build_dataset("train", root=image_tree, transform=train_transform(64))
    before = set(multiprocessing.active_children())
    loader = train_loader(dataset, batch_size=5, epochs=101, num_workers=2, repeats=3, **ERASING)
    batches = iter(loader)
    next(batches)
    workers = sorted(set(multiprocessing.active_children()) - before, key=lambda worker: worker.pid)
    assert len(workers) == 2
    for _ in islice(batches, 20 * 3):
        pass
    early = resident()
    for _ in islice(batches, 80 * 3):
        pass
    assert (resident() - early).max() < 4, (early, resident())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    def test_same_as_on_the_cpu(self):
        for on_cpu, on_gpu in zip(
            train_loader(repeats=3, **ERASING),
            train_loader(repeats=3, device="cuda", num_workers=2, **ERASING),
            strict=True,
        ):
            assert on_gpu[0].is_cuda
            assert on_gpu[1].is_cuda
            torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
            assert torch.equal(on_gpu[1].cpu(), on_cpu[1])

    def test_erasing_is_reproducible_and_leaves_generators_alone(self):
        torch.cuda.manual_seed(1)
        before = torch.cuda.get_rng_state()
        whole = list(train_loader(device="cuda", **ERASING))
        rest = list(
            train_loader(device="cuda", start_epoch=1, start_step=2, num_workers=2, **ERASING)
        )
        assert_same(whole[7:], rest)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        clean = list(train_loader(device="cuda"))
        assert not torch.equal(whole[0][0], clean[0][0])

    def test_batches_in_use_are_not_overwritten(self):
        batches = [(batch, batch.clone()) for batch, _ in train_loader(device="cuda", epochs=20)]
        torch.cuda.synchronize()
        assert all(torch.equal(batch, copy) for batch, copy in batches)
