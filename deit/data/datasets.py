"""`build_dataset`: every data set of `--data-set`, by name.

    IMNET     <root>/{train,val}/<class>/**/<image>; the same in {train,val}.zip or in one zip
    CIFAR10, CIFAR100 (or CIFAR)  torchvision's folder
    INAT, INAT19  iNaturalist 2018 and 2019: {train,val}20xx.json, categories.json, the images
    FASHION   a folder with Fashion-MNIST's idx files, compressed or not (Debian's, torchvision's)
    SAMPLE    the subset of Fashion-MNIST that comes with this package

Classes are numbered in a way that does not depend on the split, and `val` is built without a look
at the training images: evaluation needs the validation files alone.
"""

from __future__ import annotations

import fcntl
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torchvision import datasets as tv

from deit.data.idx import read_idx
from deit.data.images import ArrayImages, FileImages, ImageDataset, ZipImages
from deit.data.tree import is_hidden, is_image, list_folder, sort_out
from deit.errors import UserError, some, suggest

SAMPLE_FOLDER = Path(__file__).resolve().parent / "sample"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_PREFIX = {"train": "train", "val": "t10k"}
IDX_SUBFOLDERS = ("", "raw", "FashionMNIST/raw")  # as downloaded; inside and around torchvision's

DATA_SETS = ("IMNET", "IMNETZIP", "CIFAR", "CIFAR10", "CIFAR100", "INAT", "INAT18", "INAT19",
             "FASHION", "FASHIONMNIST", "SAMPLE")  # fmt: skip


def build_dataset(
    split: str,
    *,
    name: str = "IMNET",
    root: str | Path | None = None,
    transform: Callable | None = None,
    inat_category: str = "name",
    zip_archive: bool = False,
    download: bool = False,
    class_folders: str | Path | None = None,
) -> ImageDataset:
    """The images of one split: `dataset[i]` is `(transform(RGB PIL image), class index)`.

    `split` is train or val, `name` one of DATA_SETS in any case. Without `root`, IMNET (the
    default) is the bundled sample and FASHION is Debian's package if it is installed. `zip_archive`
    reads IMNET from archives, `download` lets torchvision fetch CIFAR and FASHION into `root`.
    `class_folders` is a folder with a folder a class, read in place of <root>/<split>.

    Raises UserError for an unknown name and for missing, empty or damaged data.
    """
    if class_folders is not None:
        folder = _existing_root(name, name, class_folders, create=False)
        images = _class_folders(folder.parent, folder.name)
    else:
        images = _open(split, name, root, inat_category, zip_archive, download)
    images.transform = transform
    return images


def _open(
    split: str, name: str, root: str | Path | None, category: str, zipped: bool, download: bool
) -> ImageDataset:
    if split not in IDX_PREFIX:
        raise UserError(f"unknown split {split!r}: train or val")
    kind = name.upper().replace("-", "").replace("_", "")
    if kind not in DATA_SETS:
        raise UserError(
            f"unknown data set {name!r}{suggest(kind, DATA_SETS)} (known: {', '.join(DATA_SETS)})"
        )
    zipped = zipped or kind == "IMNETZIP"
    if zipped and not kind.startswith("IMNET"):
        raise UserError(f"zip archives are read for the data set IMNET, not for {name}")
    if kind == "SAMPLE" or (root is None and kind == "IMNET" and not zipped):
        if root is not None:
            raise UserError(f"the data set SAMPLE is bundled: it takes no data path, got {root}")
        return _fashion(SAMPLE_FOLDER, split)
    folder = _existing_root(name, kind, root, create=download)
    if kind.startswith("IMNET"):
        return _zipped_classes(folder, split) if zipped else _class_folders(folder, split)
    if kind.startswith("CIFAR"):
        kind = tv.CIFAR10 if kind == "CIFAR10" else tv.CIFAR100
        data = _torchvision(kind, folder, split, download)
        return ArrayImages(data.data, data.targets, data.classes, f"{kind.__name__} {split}")
    if kind.startswith("INAT"):
        return _inaturalist(folder, split, 2019 if kind == "INAT19" else 2018, category)
    if download:
        _torchvision(tv.FashionMNIST, folder, split, download)
    return _fashion(folder, split)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise UserError unless both splits have the same classes.

    A class folder that one split lacks would shift the number of every later class, silently.
    """
    for which, missing in (
        ("validation", [c for c in train.class_names if c not in set(val.class_names)]),
        ("training", [c for c in val.class_names if c not in set(train.class_names)]),
    ):
        if missing:
            raise UserError(
                f"the {which} images lack {len(missing)} of the classes of the other split: "
                f"{some(missing, 5)}"
            )


def _existing_root(name: str, kind: str, root: str | Path | None, create: bool) -> Path:
    if root is None:
        if kind.startswith("FASHION") and DEBIAN_FASHION_MNIST.is_dir():
            return DEBIAN_FASHION_MNIST
        raise UserError(f"the data set {name} needs a data path (--data-path)")
    root = Path(root).expanduser()
    if not root.exists():
        if not create:
            raise UserError(f"the data path does not exist: {root}")
        root.mkdir(parents=True)
    return root


def _contents(folder: Path) -> str:
    """What `folder` holds, for a message."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"


def _class_folders(root: Path, split: str) -> FileImages:
    folder = root / split
    if not folder.is_dir():
        hint = "; for archives add --zip-dataloader" if (root / f"{split}.zip").is_file() else ""
        raise UserError(
            f"no folder {folder}: IMNET expects {split}/ with one folder a class under the data "
            f"path, which holds {_contents(root)}{hint}"
        )
    files, classes, repeated = list_folder(folder)
    if not classes:
        raise UserError(
            f"no class folders in {folder}: it needs one folder a class and holds "
            f"{_contents(folder)}"
        )
    paths = ((path, path) for path in files)
    return FileImages(folder, *sort_out(paths, classes, folder, repeated))


def _find_archive(root: Path, split: str) -> Path:
    """`root` itself, `root`/split.zip, or the only archive in `root`."""
    if root.is_file():
        return root
    own = root / f"{split}.zip"
    if own.is_file():
        return own
    others = sorted(path for path in root.glob("*.zip") if not is_hidden(path.name))
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
    files = {}  # a file that was added again is there once
    for member in members:
        files["/".join(part for part in member.filename.split("/") if part != ".")] = member
    files = _below_split(files, split, own=archive.name == f"{split}.zip")
    classes = {path.partition("/")[0] for path in files if "/" in path and not is_hidden(path)}
    tree = sort_out((item for item in files.items() if item[0][-1] != "/"), classes, archive)
    if not tree.files:
        raise UserError(f"no images in {archive} as <class>/<image> or {split}/<class>/<image>")
    return ZipImages(archive, *tree)


def _below_split(
    files: dict[str, zipfile.ZipInfo], split: str, own: bool
) -> dict[str, zipfile.ZipInfo]:
    """The files of `split` by their path below its folder, if there is one.

    That folder may be wrapped in another one. An archive of the split's `own` need not have it, and
    can have a class of that name: then it counts only if all images are below.
    """
    images = [path.split("/") for path in files if is_image(path) and not is_hidden(path)]
    is_folder = all(split in parts[:-1] for parts in images)
    if own and not (is_folder and any(split in parts[:-2] for parts in images)):
        return files
    below = {}
    for path, member in files.items():
        parts = path.split("/")
        if split in parts[:-1]:
            rest = "/".join(parts[parts.index(split) + 1 :])
            below[path if is_hidden(path) else rest] = member
    below.pop("", None)  # the folder itself
    return below


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes of one training would otherwise unpack the same download at the same time."""
    with open(folder / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _torchvision(dataset: type, root: Path, split: str, download: bool) -> Any:
    try:
        with _one_at_a_time(root) if download else nullcontext():
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


def _fashion(root: Path, split: str) -> ArrayImages:
    image_file, label_file = find_idx_pair(root, split)
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
        raise UserError(
            f"{image_file} of shape {images.shape} and {label_file} of shape {labels.shape} "
            "are not N images and their N labels"
        )
    if labels.max() >= len(tv.FashionMNIST.classes):
        raise UserError(f"{label_file}: label {labels.max()}, but Fashion-MNIST has ten classes")
    return ArrayImages(images, labels, tv.FashionMNIST.classes, str(image_file))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _inaturalist(root: Path, split: str, year: int, category: str) -> FileImages:
    """iNaturalist 2018 or 2019, classified at one level of its taxonomy.

    A class is a distinct value of `category` (kingdom, phylum, class, ..., name) over the
    categories, numbered by the first category id that has it.
    """
    annotations = root / f"{split}{year}.json"
    data = _read_json(annotations)
    taxonomy = root / "categories.json"
    try:
        categories = _read_json(taxonomy) if taxonomy.is_file() else data["categories"]
        categories = sorted(categories, key=lambda entry: entry["id"])
        levels = sorted(set.intersection(*(set(entry) for entry in categories)) - {"id"})
        if category not in levels:
            raise UserError(
                f"unknown iNaturalist category {category!r}: one of {', '.join(levels)}"
            )
        class_names = list(dict.fromkeys(str(entry[category]) for entry in categories))
        index = {name: number for number, name in enumerate(class_names)}
        target_of = {entry["id"]: index[str(entry[category])] for entry in categories}
        file_of = {entry["id"]: entry["file_name"] for entry in data["images"]}
        names = [file_of[entry["image_id"]] for entry in data["annotations"]]
        targets = [target_of[entry["category_id"]] for entry in data["annotations"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{annotations} (with {taxonomy.name}) is not as iNaturalist's: "
            f"{type(error).__name__} {error}"
        ) from error
    shown = [number for number, name in enumerate(names) if not is_hidden(name)]
    if not shown:
        raise UserError(f"{annotations} lists no images")
    hidden = len(names) - len(shown)
    names, targets = [names[number] for number in shown], [targets[number] for number in shown]
    if not (root / names[0]).is_file():
        # older downloads lack the folder of the super-category: train_val2018/2761/x.jpg
        shortened = ["/".join([p[0], *p[2:]]) for p in (name.split("/") for name in names)]
        if not (root / shortened[0]).is_file():
            raise UserError(f"{annotations} lists {names[0]}, which is not in {root}")
        names = shortened
    note = f"not read of {annotations}: hidden files: {hidden}" if hidden else ""
    return FileImages(root, names, targets, class_names, note)
