"""The images that come with the package."""

from __future__ import annotations

import numpy as np
import pytest

from deit.data import build_dataset
from deit.data.datasets import DEBIAN_FASHION_MNIST, SAMPLE_FOLDER, find_idx_pair, read_idx
from experiments.make_sample import IMAGES_PER_CLASS, make_sample, write_idx


@pytest.mark.parametrize("name", ["IMNET", "SAMPLE", "sample"])
@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("val", 1000)])
def test_is_the_default_and_balanced(name, split, count):
    dataset = build_dataset(split, name=name, download=True)  # there is nothing to fetch
    assert np.bincount(dataset.targets).tolist() == [count // 10] * 10
    assert (len(dataset), dataset.class_names[9]) == (count, "Ankle boot")


def test_is_small_and_says_where_it_is_from():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.iterdir()) <= 3_000_000
    assert "Zalando" in (SAMPLE_FOLDER / "LICENSE").read_text(encoding="utf-8")
    assert "Fashion-MNIST" in (SAMPLE_FOLDER / "README.md").read_text(encoding="utf-8")


def test_images_are_distinct_and_splits_disjoint():
    pairs = [find_idx_pair(SAMPLE_FOLDER, split) for split in IMAGES_PER_CLASS]
    assert len({image.tobytes() for images, _ in pairs for image in read_idx(images)}) == 6000


def test_script_takes_the_first_of_each_class(tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10, dtype=np.uint8), 520))
    numbered = np.arange(len(labels), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2)
    for split in IMAGES_PER_CLASS:
        image_file, label_file = find_idx_pair(SAMPLE_FOLDER, split)
        write_idx(tmp_path / image_file.name, numbered)
        write_idx(tmp_path / label_file.name, labels)
    make_sample(tmp_path, tmp_path / "made")
    for split, count in IMAGES_PER_CLASS.items():
        images, kept = (read_idx(path) for path in find_idx_pair(tmp_path / "made", split))
        firsts = [np.flatnonzero(labels == label)[:count] for label in range(10)]
        chosen = np.sort(np.concatenate(firsts))
        np.testing.assert_array_equal(images.reshape(-1, 4).view(np.uint32).ravel(), chosen)
        np.testing.assert_array_equal(kept, labels[chosen])


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="needs dataset-fashion-mnist")
def test_committed_files_are_what_the_script_makes(tmp_path):
    make_sample(DEBIAN_FASHION_MNIST, tmp_path)
    for path in SAMPLE_FOLDER.glob("*.gz"):
        np.testing.assert_array_equal(read_idx(path), read_idx(tmp_path / path.name))
