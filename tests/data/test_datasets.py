"""Every data set: what it reads, in which order, and how it complains."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from image_files import contents, pack
from PIL import Image
from torchvision import datasets as tv

from deit.data import build_dataset, check_same_classes
from deit.data.datasets import SAMPLE_FOLDER
from deit.errors import UserError
from experiments.make_sample import write_idx


class TestClassFolders:
    def test_reads_every_image_once_as_rgb(self, image_tree):
        train = build_dataset("train", root=image_tree)
        assert len(train) == 15
        assert train.num_classes == 3
        assert train.class_names == ("ant", "bee", "cat")
        assert sorted({train.source(i) for i in range(15)}) == sorted(
            str(path) for path in (image_tree / "train").rglob("*.*")
        )
        for i in range(len(train)):
            image, target = train[i]
            assert image.mode == "RGB"
            assert image.size == (36, 40)
            assert f"/{train.class_names[target]}/" in train.source(i)

    def test_same_as_torchvision(self, image_tree):
        ours = build_dataset("val", root=image_tree)
        theirs = tv.ImageFolder(str(image_tree / "val"))
        assert contents(ours) == [(image.tobytes(), target) for image, target in theirs]

    def test_val_alone_is_enough(self, own_image_tree):
        shutil.rmtree(own_image_tree / "train")
        assert len(build_dataset("val", root=own_image_tree)) == 12

    @pytest.mark.parametrize(
        ("root", "message"),
        [
            ("nowhere", r"does not exist: .*nowhere"),
            ("images/train", r"expects val/ .* holds ant, bee, cat"),
            ("empty", r"no class folders .* nothing"),
        ],
    )
    def test_missing_parts_are_told(self, own_image_tree, tmp_path, root, message):
        (tmp_path / "empty" / "val").mkdir(parents=True)
        with pytest.raises(UserError, match=message):
            build_dataset("val", root=tmp_path / root)

    def test_class_folder_without_images_is_named(self, own_image_tree):
        (own_image_tree / "val" / "wasp").mkdir()
        with pytest.raises(UserError, match="wasp"):
            build_dataset("val", root=own_image_tree)

    def test_missing_class_folder_is_named(self, own_image_tree):
        shutil.rmtree(own_image_tree / "val" / "bee")
        train, val = (build_dataset(split, root=own_image_tree) for split in ("train", "val"))
        with pytest.raises(UserError, match=r"validation images lack 1 .*: bee"):
            check_same_classes(train, val)
        with pytest.raises(UserError, match=r"training images lack 1 .*: bee"):
            check_same_classes(val, train)
        check_same_classes(train, train)

    @pytest.mark.parametrize("damage", [lambda content: content[:300], lambda content: b"rubbish"])
    def test_damaged_image_is_named(self, own_image_tree, damage):
        path = own_image_tree / "val" / "ant" / "ant_1.JPEG"
        path.write_bytes(damage(path.read_bytes()))
        dataset = build_dataset("val", root=own_image_tree)
        index = next(i for i in range(len(dataset)) if dataset.source(i) == str(path))
        with pytest.raises(UserError, match=re.escape(f"cannot read the image {path}: ")):
            dataset[index]
        dataset[index - 1]

    def test_odd_names(self, own_image_tree):
        odd = own_image_tree / "val" / "ant" / os.fsdecode(b"\xff \xc3\xa4.jpeg")
        Image.new("RGB", (8, 8)).save(odd)
        dataset = build_dataset("val", root=own_image_tree)
        index = next(i for i in range(len(dataset)) if dataset.source(i) == str(odd))
        assert dataset[index][0].size == (8, 8)


class TestZip:
    @pytest.fixture(params=["a zip a split", "split folder inside", "one zip", "wrapped"])
    def archives(self, request, image_tree, tmp_path) -> Path:
        if request.param == "a zip a split":
            for split in ("train", "val"):
                pack(image_tree / split, tmp_path / f"{split}.zip", method=zipfile.ZIP_DEFLATED)
        elif request.param == "split folder inside":
            for split in ("train", "val"):
                pack(image_tree / split, tmp_path / f"{split}.zip", prefix=f"{split}/")
        else:
            prefix = "imagenet/" if request.param == "wrapped" else ""
            pack(image_tree, tmp_path / "all.zip", prefix=prefix)
        return tmp_path

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_same_as_folder(self, archives, image_tree, split):
        zipped = build_dataset(split, root=archives, zip_archive=True)
        folder = build_dataset(split, root=image_tree)
        assert zipped.class_names == folder.class_names
        assert contents(zipped) == contents(folder)

    def test_the_name_imnetzip_and_the_archive_as_root(self, archives, image_tree):
        archive = next(iter(archives.glob("[av]*.zip")))
        zipped = build_dataset("val", name="IMNETZIP", root=archive)
        assert contents(zipped) == contents(build_dataset("val", root=image_tree))

    def test_a_class_with_the_name_of_the_split(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "train.zip", "w") as opened:
            for name in ("bus", "train"):
                Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
                opened.write(tmp_path / "x.png", f"{name}/x/0.png")
        dataset = build_dataset("train", root=tmp_path, zip_archive=True)
        assert dataset.class_names == ("bus", "train")

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_workers_share_nothing(self, image_tree, tmp_path, method):
        pack(image_tree / "train", tmp_path / "train.zip")
        dataset = build_dataset("train", root=tmp_path, zip_archive=True)
        expected = contents(dataset)  # opens the file in this process first
        with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
            read = list(pool.map(partial(read_item, dataset), [*range(len(dataset))] * 4))
        assert read == expected * 4

    def test_pickles_without_its_descriptor(self, image_tree, tmp_path):
        pack(image_tree / "train", tmp_path / "train.zip")
        dataset = build_dataset("train", root=tmp_path, zip_archive=True)
        expected = contents(dataset)
        copy = pickle.loads(pickle.dumps(dataset))
        del dataset
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
            (lambda path: path.write_bytes(path.read_bytes()[:3000]), r"cannot read the archive"),
            (lambda path: zipfile.ZipFile(path, "w").close(), r"no images in .*val\.zip"),
            (lambda path: path.unlink(), r"no archive .*val\.zip"),
        ],
    )
    def test_archive_without_images_in_it(self, image_tree, tmp_path, damage, message):
        pack(image_tree / "val", tmp_path / "val.zip")
        with pytest.raises(UserError, match="--zip-dataloader"):
            build_dataset("val", root=tmp_path)
        damage(tmp_path / "val.zip")
        with pytest.raises(UserError, match=message):
            build_dataset("val", root=tmp_path, zip_archive=True)


def read_item(dataset, index: int) -> tuple[bytes, int]:
    image, target = dataset[index]
    return image.tobytes(), target


class TestFashion:
    @pytest.fixture
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(1)
        images = generator.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        return images, np.arange(20, dtype=np.uint8) % 10

    def write(self, folder: Path, arrays, prefix: str, packed: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for array, part in zip(arrays, ("images-idx3", "labels-idx1"), strict=True):
            path = folder / f"{prefix}-{part}-ubyte.gz"
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
    def test_layouts(self, tmp_path, arrays, name, subfolder, packed):
        self.write(tmp_path / subfolder, arrays, "t10k", packed)
        val = build_dataset("val", name=name, root=tmp_path)  # no training files needed
        assert (len(val), val.num_classes) == (20, 10)
        image, target = val[13]
        assert target == 3
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.stack([arrays[0][13]] * 3, axis=-1))

    def test_same_as_torchvision(self, tmp_path, arrays):
        for prefix in ("train", "t10k"):
            self.write(tmp_path / "FashionMNIST" / "raw", arrays, prefix, packed=False)
        theirs = tv.FashionMNIST(str(tmp_path), train=True)
        ours = build_dataset("train", name="FASHION", root=tmp_path)
        assert contents(ours) == [(im.convert("RGB").tobytes(), label) for im, label in theirs]

    def test_missing_files(self, tmp_path):
        (tmp_path / "something.txt").touch()
        with pytest.raises(UserError, match=r"t10k-images.* holds something\.txt"):
            build_dataset("val", name="FASHION", root=tmp_path)

    @pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:3], lambda b: b"\1" + b[1:]])
    @pytest.mark.parametrize("packed", [True, False])
    def test_damaged_file_is_named(self, tmp_path, arrays, damage, packed):
        self.write(tmp_path, arrays, "t10k", packed)
        path = next(tmp_path.glob("t10k-images*"))
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match="t10k-images"):
            build_dataset("val", name="FASHION", root=tmp_path)

    def test_images_and_labels_must_agree(self, tmp_path, arrays):
        self.write(tmp_path, (arrays[0][:-1], arrays[1]), "t10k", True)
        with pytest.raises(UserError, match="N images and their N labels"):
            build_dataset("val", name="FASHION", root=tmp_path)


class TestCifar:
    @pytest.fixture
    def cifar10(self, tmp_path, monkeypatch) -> Path:
        """CIFAR-10's folder with 4 images a file; torchvision's checksums are not asked."""
        folder = tmp_path / tv.CIFAR10.base_folder
        folder.mkdir()
        generator = np.random.default_rng(2)
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 1, 9, 0]}))
        labels = {"label_names": [f"class {i}" for i in range(10)]}
        (folder / "batches.meta").write_bytes(pickle.dumps(labels))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
        return tmp_path

    def test_cifar10(self, cifar10):
        train, val = (
            build_dataset(split, name="CIFAR10", root=cifar10) for split in ("train", "val")
        )
        assert (len(train), len(val), train.num_classes) == (20, 4, 10)
        theirs = tv.CIFAR10(str(cifar10), train=False)
        pairs = [(image.tobytes(), target) for image, target in theirs]
        assert contents(val) == [(image.tobytes(), target) for image, target in val] == pairs

    @pytest.mark.parametrize("name", ["CIFAR", "CIFAR100"])
    def test_cifar_is_the_one_with_100_classes(self, cifar10, name, monkeypatch):
        asked = []
        monkeypatch.setattr(
            "deit.data.datasets.tv.CIFAR100",
            lambda root, train, download: asked.append((root, train)) or tv.CIFAR10(root, train),
        )
        build_dataset("val", name=name, root=cifar10)
        assert asked == [(str(cifar10), False)]

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="CIFAR10: Dataset not found"):
            build_dataset("val", name="CIFAR10", root=tmp_path)


class TestDownload:
    def test_into_a_new_folder(self, tmp_path, monkeypatch):
        asked = []

        class Fetched:
            classes = tv.FashionMNIST.classes

            def __init__(self, root, train, download):
                asked.append((train, download))
                for path in SAMPLE_FOLDER.glob("*.gz"):
                    shutil.copy(path, root)

        monkeypatch.setattr("deit.data.datasets.tv.FashionMNIST", Fetched)
        val = build_dataset("val", name="FASHION", root=tmp_path / "new", download=True)
        assert len(val) == 1000
        assert asked == [(False, True)]

    def test_failure_is_one_line(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise RuntimeError("Error downloading train-images")

        monkeypatch.setattr(tv.FashionMNIST, "download", refuse)
        with pytest.raises(UserError, match="FashionMNIST: Error downloading train-images"):
            build_dataset("val", name="FASHION", root=tmp_path, download=True)


class TestINaturalist:
    TAXONOMY = (
        {"id": 0, "name": "Apis mellifera", "kingdom": "Animalia", "class": "Insecta"},
        {"id": 1, "name": "Quercus robur", "kingdom": "Plantae", "class": "Magnoliopsida"},
        {"id": 2, "name": "Corvus corax", "kingdom": "Animalia", "class": "Aves"},
    )

    def write(self, root: Path, year: int, super_category: bool = True) -> Path:
        (root / "categories.json").write_text(json.dumps(self.TAXONOMY))
        for split in ("train", "val"):
            images, annotations = [], []
            for number, category in enumerate((2, 0, 1, 2)):
                stored = f"train_val{year}/Super/{category}/{split}{number}.png"
                images.append({"id": 100 + number, "file_name": stored})
                annotations.append({"image_id": 100 + number, "category_id": category})
                path = root / (stored if super_category else stored.replace("Super/", ""))
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (category, 0, 0)).save(path)
            content = {"images": images, "annotations": annotations[::-1]}
            (root / f"{split}{year}.json").write_text(json.dumps(content))
        return root

    @pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
    @pytest.mark.parametrize("super_category", [True, False])
    def test_reads_both_years_and_layouts(self, tmp_path, name, year, super_category):
        self.write(tmp_path, year, super_category)
        (tmp_path / f"train{year}.json").unlink()  # evaluation needs the validation files alone
        val = build_dataset("val", name=name, root=tmp_path)
        assert val.class_names == ("Apis mellifera", "Quercus robur", "Corvus corax")
        assert val.targets.tolist() == [2, 1, 0, 2]
        assert [val[i][0].getpixel((0, 0))[0] for i in range(4)] == [2, 1, 0, 2]

    def test_category(self, tmp_path):
        self.write(tmp_path, 2018)
        val = build_dataset("val", name="INAT", root=tmp_path, inat_category="kingdom")
        assert val.class_names == ("Animalia", "Plantae")
        assert val.targets.tolist() == [0, 1, 0, 0]

    def test_unknown_category_lists_the_known(self, tmp_path):
        self.write(tmp_path, 2018)
        with pytest.raises(UserError, match="'genus': one of class, kingdom, name"):
            build_dataset("val", name="INAT", root=tmp_path, inat_category="genus")

    def test_other_year_is_missing(self, tmp_path):
        self.write(tmp_path, 2018)
        with pytest.raises(UserError, match=r"val2019\.json"):
            build_dataset("val", name="INAT19", root=tmp_path)

    def test_foreign_json(self, tmp_path):
        (tmp_path / "val2018.json").write_text(json.dumps({"images": []}))
        with pytest.raises(
            UserError, match=r"val2018\.json .* as iNaturalist's: KeyError 'categories'"
        ):
            build_dataset("val", name="INAT", root=tmp_path)

    def test_images_missing(self, tmp_path):
        self.write(tmp_path, 2018)
        shutil.rmtree(tmp_path / "train_val2018")
        with pytest.raises(UserError, match="lists train_val2018/"):
            build_dataset("val", name="INAT", root=tmp_path)


class TestNames:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "CIFAR11"}, r"unknown data set 'CIFAR11'.*CIFAR10"),
            ({"split": "test"}, "'test': train or val"),
            *(
                ({"name": name}, "needs a data path")
                for name in ("CIFAR", "CIFAR10", "INAT", "INAT19", "IMNETZIP")
            ),
            ({"name": "SAMPLE", "root": "."}, "takes no data path"),
            ({"name": "CIFAR", "root": ".", "zip_archive": True}, "zip archives"),
        ],
    )
    def test_wrong_use(self, options, message):
        with pytest.raises(UserError, match=message):
            build_dataset(**{"split": "val", **options})

    def test_fashion_without_path_is_debians(self, tmp_path, monkeypatch):
        monkeypatch.setattr("deit.data.datasets.DEBIAN_FASHION_MNIST", tmp_path / "missing")
        with pytest.raises(UserError, match="needs a data path"):
            build_dataset("val", name="FASHION")
        monkeypatch.setattr("deit.data.datasets.DEBIAN_FASHION_MNIST", SAMPLE_FOLDER)
        assert len(build_dataset("val", name="FASHION")) == 1000
