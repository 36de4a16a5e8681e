"""Every data set: what it reads, in which order, and how it complains."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import contents, pack
from PIL import Image
from torchvision import datasets as tv

from deit.data import build_dataset, check_same_classes
from deit.data.datasets import SAMPLE_FOLDER
from deit.errors import UserError
from experiments.make_sample import write_idx

HERE = Path(__file__).parent


class TestClassFolders:
    def test_same_as_torchvision_without_training_images(self, own_image_tree):
        shutil.rmtree(own_image_tree / "train")
        folder = own_image_tree / "val"
        Image.new("RGB", (8, 8)).save(folder / "ant" / os.fsdecode(b"\xff \xc3\xa4.jpeg"))
        theirs = tv.ImageFolder(str(folder))
        for ours in (
            build_dataset("val", root=own_image_tree),
            build_dataset("val", name="image_folder", root=folder),
        ):
            assert [ours.source(i) for i in range(len(ours))] == [path for path, _ in theirs.imgs]
            assert contents(ours) == [(image.tobytes(), target) for image, target in theirs]
            assert ours.class_names == ("ant", "bee", "cat")

    def test_missing_class_folder_is_named(self, own_image_tree):
        shutil.rmtree(own_image_tree / "val" / "bee")
        train, val = (build_dataset(split, root=own_image_tree) for split in ("train", "val"))
        with pytest.raises(UserError, match=r"validation images lack 1 .*: bee"):
            check_same_classes(train, val)
        with pytest.raises(UserError, match=r"training images lack 1 .*: bee"):
            check_same_classes(val, train)
        check_same_classes(train, train)


class TestZip:
    @pytest.mark.parametrize("prefix", [None, "", "imagenet/"])
    def test_same_as_folder(self, prefix, image_tree, tmp_path):
        """An archive a split, or one with both."""
        if prefix is None:
            for split in ("train", "val"):
                pack(image_tree / split, tmp_path / f"{split}.zip", method=zipfile.ZIP_DEFLATED)
        else:
            pack(image_tree, tmp_path / "all.zip", prefix)
        for split in ("train", "val"):
            zipped = build_dataset(split, root=tmp_path, zip_archive=True)
            folder = build_dataset(split, root=image_tree)
            assert zipped.class_names == folder.class_names
            assert contents(zipped) == contents(folder)
        (archive,) = {*tmp_path.glob("all.zip"), *tmp_path.glob("val.zip")}
        named = build_dataset("val", name="IMNETZIP", root=archive)
        assert contents(named) == contents(zipped)

    def test_a_class_with_the_name_of_the_split(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "train.zip", "w") as opened:
            for name in ("bus", "train"):
                Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
                opened.write(tmp_path / "x.png", f"{name}/x/0.png")
        dataset = build_dataset("train", root=tmp_path, zip_archive=True)
        assert dataset.class_names == ("bus", "train")

    def test_processes_share_no_position_in_the_file(self, image_tree, tmp_path):
        """Workers that are forked inherit the descriptor, those that are spawned open their own."""

        def positions() -> list[int]:
            opened = [int(path.name) for path in Path("/proc/self/fd").iterdir()
                      if os.path.realpath(path) == str(tmp_path / "train.zip")]  # fmt: skip
            return [os.lseek(descriptor, 0, os.SEEK_CUR) for descriptor in opened]

        pack(image_tree / "train", tmp_path / "train.zip")
        dataset = build_dataset("train", root=tmp_path, zip_archive=True)
        expected = contents(dataset)
        assert positions() == [0]
        copy = pickle.loads(pickle.dumps(dataset))
        assert contents(copy) == expected
        assert positions() == [0, 0]
        del dataset
        assert positions() == [0]
        assert contents(copy) == expected

    def test_damaged_member_is_named(self, image_tree, tmp_path):
        pack(image_tree / "val", tmp_path / "val.zip")
        with zipfile.ZipFile(tmp_path / "val.zip") as opened:
            member = opened.getinfo("ant/ant_0.JPEG")
        content = bytearray((tmp_path / "val.zip").read_bytes())
        content[member.header_offset + 500] ^= 0xFF
        (tmp_path / "val.zip").write_bytes(content)
        dataset = build_dataset("val", root=tmp_path, zip_archive=True)
        with pytest.raises(UserError, match=r"val\.zip/ant/ant_0\.JPEG: .*checksum"):
            dataset[0]
        dataset[1]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path, _: path.write_bytes(path.read_bytes()[:3000]), "cannot read the archive"),
            (lambda path, _: zipfile.ZipFile(path, "w").close(), r"no images in .*val\.zip"),
            (lambda path, _: path.unlink(), r"no archive .*val\.zip"),
            (
                lambda path, tree: pack(tree, path, method=zipfile.ZIP_BZIP2),
                r"ant_0\.JPEG is .* neither stored nor deflated",
            ),
        ],
        ids=["cut", "empty", "absent", "bzip2"],
    )
    def test_what_cannot_be_read_in_place(self, image_tree, tmp_path, damage, message):
        pack(image_tree / "val", tmp_path / "val.zip")
        with pytest.raises(UserError, match="--zip-dataloader"):
            build_dataset("val", root=tmp_path)
        with pytest.raises(UserError, match=r"no images in .*val\.zip .*there is no .*train\.zip"):
            build_dataset("train", root=tmp_path, zip_archive=True)
        damage(tmp_path / "val.zip", image_tree / "val")
        with pytest.raises(UserError, match=message):
            build_dataset("val", root=tmp_path, zip_archive=True)


class TestFashion:
    IMAGES = np.random.default_rng(1).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    LABELS = np.arange(20, dtype=np.uint8) % 10

    def write(self, folder: Path, images=IMAGES, labels=LABELS, packed=True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for array, part in ((images, "images-idx3"), (labels, "labels-idx1")):
            path = folder / f"t10k-{part}-ubyte.gz"
            write_idx(path, array)
            if not packed:
                path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()

    @pytest.mark.parametrize(
        ("name", "subfolder", "packed"),
        [
            ("FASHION", "", True),
            ("FashionMNIST", "raw", False),
            ("fashion-mnist", "FashionMNIST/raw", True),
        ],
    )
    def test_layouts(self, tmp_path, name, subfolder, packed):
        self.write(tmp_path / subfolder, packed=packed)
        val = build_dataset("val", name=name, root=tmp_path)  # no training files needed
        assert val.class_names == tuple(tv.FashionMNIST.classes)
        pixels = np.repeat(self.IMAGES[..., None], 3, axis=-1)
        expected = zip(pixels, self.LABELS.tolist(), strict=True)
        assert contents(val) == [(image.tobytes(), label) for image, label in expected]

    @pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:3], lambda b: b"\1" + b[1:]])
    @pytest.mark.parametrize("packed", [True, False])
    def test_damaged_file_is_named(self, tmp_path, damage, packed):
        self.write(tmp_path, packed=packed)
        path = next(tmp_path.glob("t10k-images*"))
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match=r"t10k-images.* must be a whole idx file"):
            build_dataset("val", name="FASHION", root=tmp_path)

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (IMAGES[:-1], LABELS, "N images and their N labels"),
            (IMAGES[:, :0], LABELS, "N images and their N labels"),
            (IMAGES, LABELS + 1, "label 10, but Fashion-MNIST has ten classes"),
        ],
    )
    def test_images_and_labels_must_agree(self, tmp_path, images, labels, message):
        self.write(tmp_path, images, labels)
        with pytest.raises(UserError, match=message):
            build_dataset("val", name="FASHION", root=tmp_path)

    def test_without_path_it_is_debians(self, tmp_path, monkeypatch):
        monkeypatch.setattr("deit.data.datasets.DEBIAN_FASHION_MNIST", tmp_path / "missing")
        with pytest.raises(UserError, match="needs a data path"):
            build_dataset("val", name="FASHION")
        monkeypatch.setattr("deit.data.datasets.DEBIAN_FASHION_MNIST", SAMPLE_FOLDER)
        assert len(build_dataset("val", name="FASHION")) == 1000

    def test_download_into_a_new_folder(self, tmp_path, monkeypatch):
        asked = []

        def fetch(root, train, download):
            asked.append((train, download))
            for path in SAMPLE_FOLDER.glob("*.gz"):
                shutil.copy(path, root)

        fetch.classes = tv.FashionMNIST.classes
        monkeypatch.setattr("deit.data.datasets.tv.FashionMNIST", fetch)
        val = build_dataset("val", name="FASHION", root=tmp_path / "new", download=True)
        assert (len(val), asked) == (1000, [(False, True)])

    def test_a_download_that_fails_is_one_line(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise RuntimeError("Error downloading train-images")

        monkeypatch.setattr(tv.FashionMNIST, "download", refuse)
        with pytest.raises(UserError, match="FashionMNIST: Error downloading train-images"):
            build_dataset("val", name="FASHION", root=tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "kind"), [("CIFAR10", "CIFAR10"), ("CIFAR", "CIFAR100"), ("cifar-100", "CIFAR100")]
)
def test_cifar_is_torchvisions(name, kind, tmp_path, monkeypatch):
    """With 4 images a file, and CIFAR-10's in the place of CIFAR-100's."""
    folder, generator = tmp_path / tv.CIFAR10.base_folder, np.random.default_rng(2)
    folder.mkdir()
    for file in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": data, "labels": [3, 1, 9, 0]}))
    labels = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(labels))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    theirs = tv.CIFAR10(str(tmp_path), train=False)
    sources = {"CIFAR10": None, "CIFAR100": None, kind: tv.CIFAR10}
    monkeypatch.setattr("deit.data.datasets.tv", SimpleNamespace(**sources))
    assert len(build_dataset("train", name=name, root=tmp_path)) == 20
    val = build_dataset("val", name=name, root=tmp_path)
    assert val.class_names == tuple(labels["label_names"])
    assert contents(val) == [(image.tobytes(), target) for image, target in theirs]
    assert [target for _, target in val] == theirs.targets  # an iteration ends


class TestINaturalist:
    TAXONOMY = (
        {"id": 0, "name": "Apis mellifera", "kingdom": "Animalia", "class": "Insecta"},
        {"id": 1, "name": "Quercus robur", "kingdom": "Plantae", "class": "Magnoliopsida"},
        {"id": 2, "name": "Corvus corax", "kingdom": "Animalia", "class": "Aves"},
    )

    def write(self, root: Path, year: int = 2018, super_category: bool = True) -> None:
        (root / "categories.json").write_text(json.dumps(self.TAXONOMY))
        images, annotations = [], []
        for number, category in enumerate((2, 0, 1, 2)):
            stored = f"train_val{year}/Super/{category}/val{number}.png"
            images.append({"id": 100 + number, "file_name": stored})
            annotations.append({"image_id": 100 + number, "category_id": category})
            path = root / (stored if super_category else stored.replace("Super/", ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (category, 0, 0)).save(path)
        content = {"images": images, "annotations": annotations[::-1]}
        (root / f"val{year}.json").write_text(json.dumps(content))

    @pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
    @pytest.mark.parametrize("super_category", [True, False])
    def test_reads_both_years_and_layouts(self, tmp_path, name, year, super_category):
        self.write(tmp_path, year, super_category)
        val = build_dataset("val", name=name, root=tmp_path)  # no training files needed
        assert val.class_names == ("Apis mellifera", "Quercus robur", "Corvus corax")
        assert val.targets.tolist() == [2, 1, 0, 2]
        assert [val[i][0].getpixel((0, 0))[0] for i in range(4)] == [2, 1, 0, 2]
        val = build_dataset("val", name=name, root=tmp_path, inat_category="kingdom")
        assert val.class_names == ("Animalia", "Plantae")
        assert val.targets.tolist() == [0, 1, 0, 0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inat_category": "genus"}, "'genus': one of class, kingdom, name"),
            ({"name": "INAT19"}, r"val2019\.json"),
            ({"split": "train"}, r"train2018\.json .* as iNaturalist's: KeyError 'annotations'"),
            ({"split": "train", "name": "INAT19"}, r"train2019\.json .*: TypeError expected str"),
            ({}, "lists train_val2018/"),
        ],
    )
    def test_what_cannot_be_read(self, tmp_path, options, message):
        self.write(tmp_path)
        shutil.rmtree(tmp_path / "train_val2018")
        (tmp_path / "train2018.json").write_text(json.dumps({"images": []}))
        nameless = {"images": [{"id": 0, "file_name": None}], "annotations": []}
        (tmp_path / "train2019.json").write_text(json.dumps(nameless))
        with pytest.raises(UserError, match=message):
            build_dataset(**{"split": "val", "name": "INAT", "root": tmp_path} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "CIFAR11"}, r"unknown data set 'CIFAR11'.*CIFAR10"),
        ({"split": "test"}, "'test': train or val"),
        ({"name": "INAT19"}, "INAT19 needs a data path"),
        ({"name": "IMNETZIP"}, "IMNETZIP needs a data path"),
        ({"name": "SAMPLE", "root": "."}, "takes no data path"),
        ({"name": "CIFAR", "root": ".", "zip_archive": True}, "zip archives"),
        ({"name": "CIFAR10", "root": HERE}, "CIFAR10: Dataset not found"),
        ({"name": "FASHION", "root": HERE}, r"t10k-images.* holds .*conftest\.py"),
        ({"root": HERE / "nowhere"}, r"does not exist: .*nowhere"),
        ({"name": "CIFAR", "root": __file__, "download": True}, "cannot download to .*File exists"),
        ({"root": HERE}, r"expects val/ .* holds .*conftest\.py"),
        ({"root": "."}, "expects val/ .* holds nothing"),
        ({"root": SAMPLE_FOLDER, "name": "IMAGEFOLDER"}, "no class folders in .* holds .*LICENSE"),
    ],
)
def test_wrong_use(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        build_dataset(**{"split": "val", **options})
