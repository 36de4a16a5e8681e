"""The loader: the same bits from any number of workers, processes and restarts."""

from __future__ import annotations

import gc
import inspect
import json
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
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data._utils import worker as torch_worker

from benchmarks import loader as loader_benchmark
from deit.data import (
    DeviceLoader,
    ResumableBatchSampler,
    build_dataset,
    eval_transform,
    evaluation_batches,
    train_transform,
)
from deit.data.images import ArrayImages
from deit.data.loader import erase
from deit.data.stream import preserve_generators, sample_seeds, seed_everything
from deit.data.workers import REST, worker_death
from deit.errors import UserError
from tests.training_runs import make_images, train

REPOSITORY = Path(__file__).resolve().parents[2]
ORDER = inspect.signature(ResumableBatchSampler).parameters.keys()


def images(transform=None) -> ArrayImages:
    """Random images whose class is their number."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3), dtype=np.uint8)
    dataset = ArrayImages(pixels, range(30), [str(n) for n in range(30)], "random images")
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


def eval_loader(dataset=None, batch_size=7, **options):
    dataset = dataset or images(transform=eval_transform(16))
    batches = evaluation_batches(len(dataset), batch_size)
    return DeviceLoader(dataset, batches, device="cpu", **options)


def erasing(probability=0.5, mode="pixel", parts=2, splits=0) -> RandomErasing:
    return RandomErasing(probability, mode=mode, max_count=parts, num_splits=splits, device="cpu")


def assert_same(first, second) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def random_state() -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes()


@pytest.fixture
def workers():
    """The workers that this test has started and that live."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


ERASING = {"erasing": erasing(), "repeats": 3}


class TestTraining:
    def test_normalised_batches(self):
        white = ArrayImages(np.full((7, 8, 8), 255, np.uint8), range(7), "abcdefg", "white")
        white.transform = eval_transform(8)
        mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
        expected = ((1 - mean) / std)[:, None, None].expand(6, 3, 8, 8)
        for batch, targets in train_loader(white):
            torch.testing.assert_close(batch, expected)
            assert batch.is_contiguous()
            assert len(set(targets.tolist())) == 6
            assert targets.dtype == torch.int64
        batch, _ = next(iter(train_loader(white, mean=(0.5,) * 3, std=(0.25,) * 3)))
        torch.testing.assert_close(batch, torch.full((6, 3, 8, 8), 2.0))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_workers_and_restarts_change_nothing(self, num_workers):
        """Nor is a generator of the process used, or changed."""
        whole = list(train_loader(**ERASING))
        before = random_state()
        again = train_loader(num_workers=num_workers, **ERASING)
        for step, batch in enumerate(again):
            assert random_state() == before
            assert_same([batch], [whole[step]])
        assert len(again) == step + 1 == len(whole)
        rest = train_loader(start_epoch=1, start_step=3, num_workers=num_workers, **ERASING)
        assert len(rest) == 7
        assert_same(whole[8:], rest)

    @pytest.mark.parametrize("repeats", [1, 3])
    @pytest.mark.parametrize("size", [2, 3])
    def test_number_of_processes_changes_nothing(self, size, repeats):
        options = dict(erasing=erasing(), repeats=repeats)
        whole = list(train_loader(**options))
        for rank in range(size):
            share = train_loader(batch_size=6 // size, world_size=size, rank=rank, **options)
            assert_same([[part[rank::size] for part in batch] for batch in whole], share)

    def test_seed_epoch_and_position_change_everything(self):
        batches = [*train_loader(), *train_loader(seed=6)]
        assert len({batch.numpy().tobytes() for batch, _ in batches}) == 30
        batch, targets = next(iter(train_loader(repeats=3)))
        assert targets[0] == targets[1] == targets[2] != targets[3]
        assert not torch.equal(batch[0], batch[1])


class TestErasing:
    @pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
    def test_is_timms_under_the_seed_of_each_sample(self, mode):
        """With parts that overlap."""
        theirs = erasing(0.7, mode, parts=4)
        changed = torch.cat([batch for batch, _ in train_loader(epochs=1, erasing=theirs)])
        clean = torch.cat([batch for batch, _ in train_loader(epochs=1)])
        assert not torch.equal(changed, clean)
        for position, image in enumerate(clean):
            with preserve_generators():
                seed_everything(sample_seeds(5, 0, position).erasing)
                assert torch.equal(theirs(image), changed[position])

    @pytest.mark.skipif(
        not (hasattr(torch.compiler, "is_exporting") or torch.cuda.is_available()),
        reason="torch 2.6 asks for a device",
    )
    def test_needs_no_synchronisation_with_a_gpu(self):
        """Under fake tensors whatever asks for a value raises."""
        with FakeTensorMode():
            images = torch.empty(4, 3, 8, 8, device="cuda")
            erased = torch.empty(9, dtype=torch.int64, device="cuda")
            erase(images, erased, torch.empty(9, 3, device="cuda"))

    @pytest.mark.parametrize(("repeats", "spared"), [(3, [True, False, False]), (1, [False])])
    def test_the_first_of_several_copies_is_spared(self, repeats, spared):
        always = erasing(probability=1, splits=repeats)
        clean, changed = (
            torch.cat([batch for batch, _ in train_loader(epochs=1, repeats=repeats, erasing=each)])
            for each in (None, always)
        )
        same = [torch.equal(*pair) for pair in zip(clean, changed, strict=True)]
        assert same == spared * (30 // repeats)


class TestEvaluation:
    @pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 1), (3, 2), (8, 100)])
    def test_every_image_once(self, world_size, batch_size):
        for rank in range(world_size):
            batches = evaluation_batches(7, batch_size, world_size=world_size, rank=rank)
            assert all(0 < len(batch) <= batch_size for batch in batches)
            own = [index for batch in batches for index in batch]
            assert own == list(range(rank, 7, world_size))

    def test_can_be_run_again_with_the_same_workers(self, workers):
        loader = eval_loader(num_workers=2)
        first = list(loader)
        assert [len(targets) for _, targets in first] == [7, 7, 7, 7, 2]
        assert torch.cat([targets for _, targets in first]).tolist() == list(range(30))
        started = workers()
        list(islice(loader, 2))  # left in the middle
        assert_same(first, loader)
        assert workers() == started
        assert_same(first, eval_loader())
        loader.close()
        assert not workers()

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_of_no_images_at_all(self, num_workers):
        assert list(DeviceLoader(images(), [], device="cpu", num_workers=num_workers)) == []


class TestFailures:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("build", [train_loader, eval_loader])
    def test_damaged_image_is_one_line(self, own_image_tree, build, num_workers):
        path = own_image_tree / "train" / "bee" / "bee_1.JPEG"
        path.write_bytes(path.read_bytes()[:300])
        dataset = build_dataset("train", root=own_image_tree, transform=eval_transform(16))
        with pytest.raises(UserError, match=r"^cannot read the image .*$") as error:
            list(build(dataset, batch_size=5, num_workers=num_workers))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("error", [KeyError, UserError])
    def test_workers_end_with_a_pass_that_fails(self, error, workers):
        """At once, not when the garbage collector finds them. Defects keep their traceback."""

        def defect(image):
            raise error("a bug")

        gc.disable()
        try:
            loader = train_loader(images(transform=defect), num_workers=2)
            with pytest.raises(error, match="a bug") as caught:
                list(loader)
            assert ("in defect" in str(caught.value)) == (error is KeyError)
            assert not workers()
        finally:
            gc.enable()

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("distributed", [False, True])
    def test_threads_rest_once_before_workers_are_forked(
        self, num_workers, distributed, monkeypatch
    ):
        """Among several processes only."""
        naps = []
        group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: distributed)
        monkeypatch.setattr("deit.data.workers.time", SimpleNamespace(sleep=naps.append))
        monkeypatch.setattr("deit.data.workers.dist", group)
        loader = eval_loader(num_workers=num_workers)
        for _ in range(2):
            list(loader)
        loader.close()
        needed = distributed and num_workers and sys.version_info < (3, 12)
        assert naps == ([REST] if needed else [])

    def test_signals_are_left_to_the_main_process(self, workers, monkeypatch):
        """Even by workers that have not set up anything yet."""

        def strike():
            while len(workers()) < 2:
                time.sleep(0.01)
            for worker in workers():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(worker.pid, number)

        def start_late(*args):
            time.sleep(0.5)
            work(*args)

        work = torch_worker._worker_loop
        monkeypatch.setattr(torch_worker, "_worker_loop", start_late)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        striking = threading.Thread(target=strike)
        batches = iter(train_loader(num_workers=2))
        striking.start()
        got = [next(batches)]
        striking.join()
        strike()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == held
        assert_same(train_loader(), got + list(batches))

    def test_a_worker_that_hangs_is_killed(self, workers, monkeypatch):
        """It does not hear SIGTERM."""

        def hang_later(image):
            if next(calls) == 7:
                hangs.set()
                time.sleep(1000)
            return small(image)

        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
        calls, small, hangs = count(), eval_transform(16), multiprocessing.Event()
        loader = eval_loader(images(transform=hang_later), batch_size=7, num_workers=2)
        next(iter(loader))
        assert hangs.wait(60)
        loader.close()
        assert not workers()

    def test_a_killed_worker_ends_a_training_with_one_line(
        self, workers, tmp_path, monkeypatch, capsys
    ):
        def strike(self, batch):
            for worker in workers():
                os.kill(worker.pid, signal.SIGKILL)
            return finish(self, batch)

        finish = DeviceLoader._finish
        monkeypatch.setattr(DeviceLoader, "_finish", strike)
        # torch sets its handler of SIGCHLD once a process
        monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
        before = signal.getsignal(signal.SIGCHLD)
        try:
            assert train("--num-workers", "1", data=make_images(tmp_path)) == 2
        finally:
            signal.signal(signal.SIGCHLD, before)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: DataLoader worker (pid")
        assert not workers()

    def test_a_connection_that_a_worker_closed_counts_as_its_death(self):
        here, there = multiprocessing.Pipe()
        there.close()
        with pytest.raises(EOFError) as closed:
            here.recv()
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            assert worker_death(ConnectionResetError("of some other connection")) is None
            assert worker_death(RuntimeError("of some other kind")) is None
            assert str(worker_death(closed.value)).startswith("DataLoader worker (pid unknown)")
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        finally:
            signal.signal(signal.SIGCHLD, before)

    def test_leaving_in_the_middle_ends_the_workers(self):
        """Neither the process nor its workers linger, even when all of them get a SIGTERM."""
        script = """
            from test_loader import *
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
            loaders = [train_loader(epochs=99, num_workers=2), eval_loader(num_workers=1)]
            iterators = [iter(loader) for loader in loaders]
            for iterator in iterators:
                next(iterator)
            print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
            os.kill(0, signal.SIGTERM)
            """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{Path(__file__).parent}"},
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=60,
        )
        assert result.returncode == 3, result.stderr
        pids = result.stdout.split()
        assert len(pids) == 3
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_stays_flat_over_100_epochs(image_tree, workers):
    def resident() -> np.ndarray:
        """MiB of this process and of each worker."""
        pids = ["self", *sorted(str(worker.pid) for worker in workers())]
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
        return np.array([int(re.search(r"^Rss: +(\d+) kB", r, re.M)[1]) for r in rollups]) / 1024

    dataset = build_dataset("train", root=image_tree, transform=train_transform(64))
    batches = iter(train_loader(dataset, batch_size=5, epochs=101, num_workers=2, **ERASING))
    for _ in islice(batches, 1 + 20 * 3):
        pass
    early = resident()
    for _ in islice(batches, 80 * 3):
        pass
    assert len(early) == 3
    assert (resident() - early).max() < 4, (early, resident())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_benchmark_reports_both_loaders(tmp_path, num_workers, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(loader_benchmark.time, "sleep", lambda seconds: None)
    words = f"--images 12 --size 32 --batch-size 4 --rounds 2 --workers {num_workers}".split()
    assert loader_benchmark.main([*words, "--output", str(tmp_path / "result.json")]) == 0
    report = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    rates, costs = report["images_per_second_per_core"], report["cpu_ms_per_image"]
    assert set(rates) == set(costs) == {"ours", "timm"}
    assert all(rate > 0 for rate in rates.values())
    assert all(cost >= 0 for cost in costs.values())
    assert report["settings"]["workers"] == str(num_workers)
    assert f"ours / timm: {report['ratio']:.3f}" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    def test_same_as_on_the_cpu(self):
        for on_cpu, on_gpu in zip(
            train_loader(**ERASING),
            train_loader(device="cuda", num_workers=2, **ERASING),
            strict=True,
        ):
            assert on_gpu[0].is_cuda
            assert on_gpu[1].is_cuda
            torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
            assert torch.equal(on_gpu[1].cpu(), on_cpu[1])

    def test_is_reproducible_and_leaves_generators_alone(self):
        torch.cuda.manual_seed(1)
        before = torch.cuda.get_rng_state()
        whole = list(train_loader(device="cuda", **ERASING))
        rest = train_loader(device="cuda", start_epoch=1, start_step=2, num_workers=2, **ERASING)
        assert_same(whole[7:], rest)
        assert torch.equal(torch.cuda.get_rng_state(), before)

    def test_batches_in_use_are_not_overwritten(self):
        batches = [(batch, batch.clone()) for batch, _ in train_loader(device="cuda", epochs=20)]
        torch.cuda.synchronize()
        assert all(torch.equal(batch, copy) for batch, copy in batches)
