"""`build_dataset`: every data set of `--data-set`, by name.

    IMNET     <root>/{train,val}/<class>/**/<image>; the same in {train,val}.zip or in one zip
    image_folder  <root>/<class>/**/<image>, whatever the split
    CIFAR10, CIFAR100 (or CIFAR)  torchvision's folder
    INAT, INAT19  iNaturalist 2018 and 2019: {train,val}20xx.json, categories.json, the images
    FASHION   a folder with Fashion-MNIST's idx files, compressed or not (Debian's, torchvision's)
    SAMPLE    the subset of Fashion-MNIST that comes with this package

Classes are numbered in a way that does not depend on the split, and `val` is built without a look
at the training images: evaluation needs the validation files alone.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as tv

from deit.data.images import ArrayImages, ImageDataset, ZipImages
from deit.data.tree import class_tree, is_hidden, list_folder, sort_out
from deit.errors import UserError, some, suggest

SAMPLE_FOLDER = Path(__file__).resolve().parent / "sample"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
UNSIGNED_BYTE = 8  # the type of all idx files of images
IDX_PREFIX = {"train": "train", "val": "t10k"}
IDX_SUBFOLDERS = ("", "raw", "FashionMNIST/raw")  # as downloaded; inside and around torchvision's

DATA_SETS = ("IMNET", "IMNETZIP", "CIFAR", "CIFAR10", "CIFAR100", "INAT", "INAT18", "INAT19",
             "FASHION", "FASHIONMNIST", "SAMPLE", "IMAGEFOLDER")  # fmt: skip


def build_dataset(
    split: str,
    *,
    name: str = "IMNET",
    root: str | Path | None = None,
    transform: Callable | None = None,
    inat_category: str = "name",
    zip_archive: bool = False,
    download: bool = False,
) -> ImageDataset:
    """The images of one split: `dataset[i]` is `(transform(RGB PIL image), class index)`.

    `split` is train or val, `name` one of DATA_SETS in any case. Without `root`, IMNET (the
    default) is the bundled sample and FASHION is Debian's package if it is installed. `zip_archive`
    reads IMNET from archives, `download` lets torchvision fetch CIFAR and FASHION into `root`.

    Raises UserError for an unknown name and for missing, empty or damaged data.
    """
    kind = name.upper().replace("-", "").replace("_", "")
    zipped = zip_archive or kind == "IMNETZIP"
    if split not in IDX_PREFIX:
        raise UserError(f"unknown split {split!r}: train or val")
    if kind not in DATA_SETS:
        raise UserError(
            f"unknown data set {name!r}{suggest(kind, DATA_SETS)} (known: {', '.join(DATA_SETS)})"
        )
    if zipped and not kind.startswith("IMNET"):
        raise UserError(f"zip archives are read for the data set IMNET, not for {name}")
    if kind == "SAMPLE" and root is not None:
        raise UserError(f"the data set SAMPLE is bundled: it takes no data path, got {root}")
    if root is None and (kind == "SAMPLE" or (kind == "IMNET" and not zipped)):
        kind, root, download = "FASHION", SAMPLE_FOLDER, False
    elif root is None and kind.startswith("FASHION") and DEBIAN_FASHION_MNIST.is_dir():
        root = DEBIAN_FASHION_MNIST
    elif root is None:
        raise UserError(f"the data set {name} needs a data path (--data-path)")
    folder = Path(root).expanduser()
    if download:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot download to {folder}: {error}") from error
    if not folder.exists():
        raise UserError(f"the data path does not exist: {folder}")
    if zipped:
        images = _zipped_classes(folder, split)
    elif kind == "IMAGEFOLDER":
        images = _class_folders(folder.parent, folder.name)
    elif kind == "IMNET":
        images = _class_folders(folder, split)
    elif kind.startswith("CIFAR"):
        source = tv.CIFAR10 if kind == "CIFAR10" else tv.CIFAR100
        data = _torchvision(source, folder, split, download)
        images = ArrayImages(data.data, data.targets, data.classes, f"{source.__name__} {split}")
    elif kind.startswith("INAT"):
        images = _inaturalist(folder, split, 2019 if kind == "INAT19" else 2018, inat_category)
    else:
        if download:
            _torchvision(tv.FashionMNIST, folder, split, download)
        images = _fashion(folder, split)
    images.transform = transform
    return images


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise UserError unless both splits have the same classes.

    A class folder that one split lacks would shift the number of every later class, silently.
    """
    for which, own, other in (("validation", val, train), ("training", train, val)):
        if missing := sorted(set(other.class_names) - set(own.class_names)):
            raise UserError(
                f"the {which} images lack {len(missing)} of the classes of the other split: "
                f"{some(missing, 5)}"
            )


def _contents(folder: Path) -> str:
    """What `folder` holds, for a message."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return some(names, 6) or "nothing"


def _class_folders(root: Path, split: str) -> ImageDataset:
    folder = root / split
    if not folder.is_dir():
        hint = "; for archives add --zip-dataloader" if (root / f"{split}.zip").is_file() else ""
        raise UserError(
            f"no folder {folder}: IMNET expects {split}/ with one folder a class under the data "
            f"path, which holds {_contents(root)}{hint}"
        )
    listing = list_folder(folder)
    if not listing.folders:
        raise UserError(
            f"no class folders in {folder}: it needs one folder a class and holds "
            f"{_contents(folder)}"
        )
    return ImageDataset(folder, *class_tree(listing, folder))


def _find_archive(root: Path, split: str) -> Path:
    """`root` itself, `root`/split.zip, or the only archive in `root`."""
    own = root if root.is_file() else root / f"{split}.zip"
    if own.is_file():
        return own
    others = [path for path in root.glob("*.zip") if not is_hidden(path.name)]
    if len(others) != 1:
        raise UserError(
            f"no archive {own}, nor a single zip with {split}/ in it; "
            f"{root} holds {_contents(root)}"
        )
    return others[0]


def _zipped_classes(root: Path, split: str) -> ZipImages:
    archive = _find_archive(root, split)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the archive {archive}: {error}") from error
    files, below = {}, {}  # a file that was added again is there once
    for member in members:
        path = "/".join(part for part in member.filename.split("/") if part != ".")
        files[path] = member
        wrapping, found, rest = f"/{path}".partition(f"/{split}/")
        if found and rest:
            below[path if is_hidden(wrapping) else rest] = member
    if archive.name == f"{split}.zip":  # need not have that folder, and can have such a class
        images = sort_out(below).images
        whole = len(images) == len(sort_out(files).images)
        if not (whole and any("/" in path for path in images)):
            below = files
    paths, *labels = class_tree(sort_out(below), archive)
    if not paths:
        own = root / f"{split}.zip"
        missing = f", and there is no {own}" if archive not in (root, own) else ""
        raise UserError(
            f"no images in {archive} as <class>/<image> or {split}/<class>/<image>{missing}"
        )
    return ZipImages(archive, [below[path] for path in paths], *labels)


def _torchvision(dataset: type, root: Path, split: str, download: bool) -> Any:
    try:
        with open(root / ".download.lock", "w") if download else nullcontext() as lock:
            if download:  # processes of one training would otherwise unpack it at the same time
                fcntl.flock(lock, fcntl.LOCK_EX)
            return dataset(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        hint = "" if download else f" ({root} holds {_contents(root)})"
        raise UserError(f"{dataset.__name__}: {error}{hint}") from error


def find_idx_pair(root: Path, split: str) -> tuple[Path, Path]:
    """The image and the label file of a split below `root`, `.gz` or not. UserError if missing."""
    names = [f"{IDX_PREFIX[split]}-{part}-ubyte" for part in ("images-idx3", "labels-idx1")]
    for subfolder in IDX_SUBFOLDERS:
        pair = [
            next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)
            for path in (root / subfolder / name for name in names)
        ]
        if all(pair):
            return pair[0], pair[1]
    raise UserError(
        f"no files {names[0]}[.gz] and {names[1]}[.gz] in {root}, which holds {_contents(root)}"
    )


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of any shape in an idx file, whose name ends with `.gz` if it is compressed.

    The format of MNIST and its kin is two zero bytes, a type (8: unsigned bytes), the rank, the
    sizes, the data. torchvision's reader wants files unpacked, and answers truncated ones with an
    assertion. Raises UserError, naming the file, if it is missing, damaged or of another type.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        if content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
            raise ValueError(f"it starts {content[:4]!r}")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"cannot read {path}, which must be a whole idx file of unsigned bytes: {error}"
        ) from error


def _fashion(root: Path, split: str) -> ArrayImages:
    image_file, label_file = find_idx_pair(root, split)
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise UserError(
            f"{image_file} of shape {images.shape} and {label_file} of shape {labels.shape} "
            "are not N images and their N labels"
        )
    if labels.max() >= len(tv.FashionMNIST.classes):
        raise UserError(f"{label_file}: label {labels.max()}, but Fashion-MNIST has ten classes")
    return ArrayImages(images, labels, tv.FashionMNIST.classes, str(image_file))


def _inaturalist(root: Path, split: str, year: int, category: str) -> ImageDataset:
    """iNaturalist 2018 or 2019, classified at one level of its taxonomy.

    A class is a distinct value of `category` (kingdom, phylum, class, ..., name) over the
    categories, numbered by the first category id that has it.
    """
    annotations, taxonomy = root / f"{split}{year}.json", root / "categories.json"
    try:
        data = json.loads(annotations.read_text(encoding="utf-8"))
        if taxonomy.is_file():
            data["categories"] = json.loads(taxonomy.read_text(encoding="utf-8"))
        categories = sorted(data["categories"], key=lambda entry: entry["id"])
        levels = sorted(set.intersection(*(set(entry) for entry in categories)) - {"id"})
        label_of = {entry["id"]: str(entry.get(category)) for entry in categories}
        class_names = list(dict.fromkeys(label_of.values()))
        file_of = {entry["id"]: os.fspath(entry["file_name"]) for entry in data["images"]}
        names = [file_of[entry["image_id"]] for entry in data["annotations"]]
        labels = [label_of[entry["category_id"]] for entry in data["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {annotations} (with {taxonomy.name}) as iNaturalist's: "
            f"{type(error).__name__} {error}"
        ) from error
    if category not in levels:
        raise UserError(f"unknown iNaturalist category {category!r}: one of {', '.join(levels)}")
    if not names:
        raise UserError(f"{annotations} lists no images")
    if not (root / names[0]).is_file():
        # older downloads lack the folder of the super-category: train_val2018/2761/x.jpg
        shortened = ["/".join([p[0], *p[2:]]) for p in (name.split("/") for name in names)]
        if not (root / shortened[0]).is_file():
            raise UserError(f"{annotations} lists {names[0]}, which is not in {root}")
        names = shortened
    index = {name: number for number, name in enumerate(class_names)}
    return ImageDataset(root, names, [index[label] for label in labels], class_names)
