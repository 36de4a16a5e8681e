"""The Fashion-MNIST study: what it trains, that it resumes exactly, and what its texts rest on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import timm
import torch

from deit.data.datasets import SAMPLE_FOLDER
from deit.errors import UserError
from deit.train.stopping import Stopped, forget_stop, request_stop
from experiments.fashion_mnist import cell as cell_module
from experiments.fashion_mnist import draw, run, summary
from experiments.fashion_mnist.cell import Data, Training
from experiments.fashion_mnist.grid import FULL, QUICK, Cell, cells
from experiments.fashion_mnist.images import Images, augmented, find_data, training_batches
from experiments.fashion_mnist.networks import IMAGE_SIZE, Network, as_wide_as

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = replace(QUICK, name="tiny", depth=1, widths=(32,), legs=2, updates=3, batch_size=32, lr=1e-2)


def tiny_cell(kind: str = "equivariant", **changes) -> Cell:
    network = Network("vit", kind, 32, TINY.depth, TINY.patch, like=32)
    return replace(Cell(network, flip=True, fraction=0.5, seed=0), **changes)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data.load(SAMPLE_FOLDER, CPU)


@pytest.fixture(autouse=True)
def no_stop_left():
    yield
    forget_stop()


def test_a_stopped_training_ends_as_one_that_was_never_stopped(data, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Training(tiny_cell(), TINY, data, CPU, tmp_path / "whole").run("")
    original = training_batches

    def stopping(*args, **kwargs):
        for number, batch in enumerate(original(*args, **kwargs)):
            if number == 1:
                request_stop("test")
            yield batch

    monkeypatch.setattr(cell_module, "training_batches", stopping)
    starts = []
    for _ in range(6):
        training = Training(tiny_cell(), TINY, data, CPU, tmp_path / "parts")
        starts.append(training.start)
        try:
            result = training.run("")
            break
        except Stopped:
            forget_stop()
            # a state of another plan is not gone on from
            other = Training(tiny_cell(), replace(TINY, lr=1.0), data, CPU, tmp_path / "parts")
            assert other.start == 0
    assert starts == [0, 2, 4, 6]  # the last stop came before the last look at the test set
    for found in (whole, result, *whole["curve"], *result["curve"]):
        assert found.pop("seconds") > 0
    assert result == whole
    first, last = whole["curve"]
    assert last["train_loss"] < first["train_loss"]
    assert whole["agreement"] == 100
    assert whole["accuracy"] == whole["accuracy_mirrored"]


def test_ordinary_networks_answer_otherwise_for_mirror_images(data, tmp_path):
    plan = replace(TINY, updates=20)
    result = Training(tiny_cell("ordinary", flip=False), plan, data, CPU, tmp_path).run("")
    assert result["agreement"] < 100


@pytest.mark.slow
def test_the_grid_trains_what_is_missing_and_reports_failures(tmp_path, capfd):
    todo = [tiny_cell("invariant_early"), tiny_cell(fraction=0.001)]  # less than a batch
    settings = {"plan": TINY, "data": SAMPLE_FOLDER, "command": "python run.py"}
    settings |= {"results": tmp_path, "states": tmp_path / "states"}
    assert run.supervise(todo, ["cpu"], settings) == run.FAILED
    told = capfd.readouterr().out
    assert "[2/2]" in told
    assert "failed: the training set has" in told
    assert [run.is_done(tmp_path, cell, TINY) for cell in todo] == [True, False]
    assert not run.is_done(tmp_path, todo[0], replace(TINY, lr=1.0))
    result = json.loads((tmp_path / f"{todo[0].name}.json").read_text())
    assert result["command"] == "python run.py"
    assert result["environment"]["torch"] == torch.__version__
    assert not {"host", "folder"} & result["environment"].keys()
    assert result["agreement"] == 100
    (row,) = summary.read(tmp_path)
    assert row.network == todo[0].network


def test_batches_depend_on_their_number_alone(data):
    def batches(start: int, flip: bool = True) -> Iterator[torch.Tensor]:
        options = {"batch_size": 64, "seed": 5, "flip": flip, "shift": 2, "start": start}
        return (images for images, _ in training_batches(data.train, **options))

    per_epoch = len(data.train) // 64
    whole = list(islice(batches(0), per_epoch + 2))
    later = islice(batches(per_epoch - 1), 3)
    assert all(torch.equal(*pair) for pair in zip(later, whole[-3:], strict=True))
    assert not torch.equal(whole[0], whole[per_epoch])
    # without flips the same crops of the same images, some of them the other way round
    same = (next(batches(0, flip=False)) == whole[0]).flatten(1).all(1)
    assert 16 < same.sum() < 48


def test_augmentation_moves_and_mirrors_images():
    pixels = torch.zeros(200, 28, 28, dtype=torch.uint8)
    pixels[:, 10, 4] = 255
    out = augmented(pixels, True, 2, torch.Generator().manual_seed(0))
    assert out.shape == (200, 1, 28, 28)
    places = out.flatten(1).argmax(1)
    assert set((places // 28).tolist()) == {8, 9, 10, 11, 12}
    assert set((places % 28).tolist()) == {2, 3, 4, 5, 6} | {21, 22, 23, 24, 25}
    still = augmented(pixels, False, 0, torch.Generator())
    assert set(still.flatten(1).argmax(1).tolist()) == {10 * 28 + 4}


def test_parts_of_the_training_set():
    images = Images(torch.zeros(50, 1, 1, dtype=torch.uint8), torch.arange(50))
    part, other = images.subset(0.3, 0), images.subset(0.3, 1)
    assert len(part) == len(set(part.targets.tolist())) == 15
    assert part.targets.tolist() != other.targets.tolist()
    assert part.targets.tolist() == images.subset(0.3, 0).targets.tolist()
    assert images.subset(1, 0) is images


@pytest.mark.parametrize("plan", [QUICK, FULL], ids=lambda plan: plan.name)
def test_every_network_of_the_grids_can_be_built(plan):
    grid = cells(plan)
    assert len({cell.name for cell in grid}) == len(grid)
    for network in {replace(cell.network, depth=1) for cell in grid}:
        network.register()
        size = {} if network.family == "convnext" else {"img_size": IMAGE_SIZE}
        with torch.device("meta"):
            timm.create_model(network.name, **size)


@pytest.mark.parametrize("family", ["vit", "resmlp", "convnext"])
def test_costs_are_what_the_comparisons_say(family):
    like = FULL.widths[-1]
    ordinary = Network(family, "ordinary", like, 2, FULL.patch, like)
    flops = summary.flops(ordinary)
    half = summary.flops(replace(ordinary, kind="equivariant"))
    assert 0.5 < half / flops < 0.53
    wider = replace(ordinary, kind="equivariant", width=as_wide_as(family, like))
    assert 0.95 < summary.flops(wider) / flops < 1.06


def test_wrong_command_lines(monkeypatch, tmp_path):
    absent = tmp_path / "absent"
    monkeypatch.setattr("experiments.fashion_mnist.images.DEBIAN_FASHION_MNIST", absent)
    with pytest.raises(UserError, match="--data-path"):
        find_data("")
    assert find_data(str(SAMPLE_FOLDER)) == SAMPLE_FOLDER
    with pytest.raises(UserError, match="--devices nonsense"):
        run.find_devices(["nonsense"])


def row(kind: str, flops: float, accuracies: list[float], family: str = "vit") -> summary.Row:
    plan = {"plan": {"depth": 4}}
    results = [{"cell": {"seed": n}, "accuracy": a} | plan for n, a in enumerate(accuracies)]
    return summary.Row(Network(family, kind, 32, 4, 7, 32), True, 1.0, 1, flops, tuple(results))


def test_comparisons_are_paired_by_seed():
    small, large = row("ordinary", 1e6, [70, 72]), row("ordinary", 4e6, [74, 80])
    ours, other = row("equivariant", 2e6, [75, 75]), row("ordinary", 2e6, [0, 0], "resmlp")
    assert summary.twin(ours, [other, ours, small]) is small
    assert summary.twin(small, [ours, small]) is None
    assert small.estimate("accuracy").text() == "71.00 ± 1.00"
    assert row("ordinary", 1.0, [80]).estimate("accuracy").text() == "80.00"
    assert summary.difference(large, small, "accuracy").text(sign="+") == "+6.00 ± 2.00"
    # 72 and 76 on the lines over the logarithm of FLOPs
    assert summary.above_line(ours, [small, ours, large, other]).text(sign="+") == "+1.00 ± 2.00"
    assert summary.above_line(ours, [small, ours, other]) is None


# the committed results


@pytest.fixture(scope="module")
def committed() -> tuple[Path, list[summary.Row]]:
    folder = draw.default_results()
    return folder, summary.read(folder)


def test_committed_tables_are_those_of_the_result_files(committed, tmp_path):
    """And the figures, which fit into the repository, show something for each question."""
    folder, _ = committed
    results, figures, report = tmp_path / "results", tmp_path / "figures", tmp_path / "report.md"
    shutil.copytree(folder, results, ignore=shutil.ignore_patterns("summary.*"))
    page = (ROOT / "docs" / "results.md").read_text()
    report.write_text(re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1 old \3", page))
    words = f"--results {results} --figures {figures} --report {report}".split()
    assert draw.main(words) == 0
    assert report.read_text() == page
    for name in ("summary.csv", "summary.md"):
        assert (results / name).read_text() == (folder / name).read_text()
    sizes = {path.name: path.stat().st_size for path in figures.iterdir()}
    assert sizes.keys() == {f"fashion_mnist_{n}.png" for n in ("flops", "time", "mirror", "data")}
    assert all(10_000 < size < 200_000 for size in sizes.values()), sizes


@pytest.mark.parametrize("text", ["README.md", "docs/results.md"])
def test_numbers_in_the_texts_come_from_the_tables(committed, text):
    """Whatever has an error bar in a text stands in a table with that very error bar."""
    tables = summary.as_markdown(committed[1])
    estimate = re.compile(r"[-+]?\d+\.\d+ ± \d+\.\d+")
    known = set(estimate.findall("\n".join(tables.values())))
    assert known
    quoted = set(estimate.findall((ROOT / text).read_text().replace("−", "-")))
    assert quoted <= known, quoted - known
