"""Data sets, transforms, loaders."""

from deit.data.classes import match_classes, names_of_outputs, outputs_of, read_class_map
from deit.data.datasets import DATA_SETS, build_dataset, check_same_classes
from deit.data.images import ImageDataset, to_rgb
from deit.data.loader import DeviceLoader
from deit.data.stream import ResumableBatchSampler, evaluation_batches
from deit.data.transforms import eval_transform, train_transform

__all__ = [
    "DATA_SETS",
    "DeviceLoader",
    "ImageDataset",
    "ResumableBatchSampler",
    "build_dataset",
    "check_same_classes",
    "eval_transform",
    "evaluation_batches",
    "match_classes",
    "names_of_outputs",
    "outputs_of",
    "read_class_map",
    "to_rgb",
    "train_transform",
]
