"""The teacher of a distillation: any network of timm or of this package, frozen."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from deit.args import parse_args
from deit.build import build_model
from deit.checkpoint import load_model, model_state, read_checkpoint, trained_model_name
from deit.errors import UserError, one_line, suggest


class Teacher(nn.Module):
    """A frozen network that sees the student's images the way it was trained to see them.

    Images (B, 3, H, W) normalised by `mean` and `std` are renormalised by the network's own
    statistics and, if it takes one size only, resampled to that. It never leaves evaluation mode.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        config = getattr(model, "pretrained_cfg", None) or {}
        self.model = model.requires_grad_(False).eval()
        own_mean = torch.tensor(config.get("mean", mean)).view(1, -1, 1, 1)
        own_std = torch.tensor(config.get("std", std)).view(1, -1, 1, 1)
        self.register_buffer("scale", torch.tensor(std).view(1, -1, 1, 1) / own_std)
        self.register_buffer("shift", (torch.tensor(mean).view(1, -1, 1, 1) - own_mean) / own_std)
        self.size: tuple[int, int] | None = None
        if config.get("fixed_input_size", False):
            # The configuration holds the published size; the network may be built for another.
            built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
            self.size = tuple(built_for or config["input_size"][-2:])

    def train(self, mode: bool = True) -> Teacher:
        """Keeps evaluation mode, whatever `mode` the loss around it is put into."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images * self.scale + self.shift)


def build_teacher(
    name: str,
    path: str,
    num_classes: int,
    device: torch.device | str,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Teacher:
    """The network `name` of timm or of this package as a teacher, on `device`.

    Args:
        path: its checkpoint (a file, an address, `hf-hub:NAME`), read without running code; ''
            for the weights that timm offers, which must have `num_classes` classes.
        mean, std: normalisation of the student's images, for each channel.

    Raises:
        UserError: an unknown name, or weights that are absent or do not fit.
    """
    if not timm.is_model(name):
        raise UserError(f"unknown teacher {name!r}{suggest(name, timm.list_models())}")
    if path:
        checkpoint = read_checkpoint(path)
        model = _as_trained(name, num_classes, checkpoint)
        load_model(model, model_state(checkpoint, source=path), source=path)
    else:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        offered = config.num_classes if config is not None and config.has_weights else None
        if offered != num_classes:
            has = f"weights for {offered} classes" if offered else "no weights"
            raise UserError(
                f"timm offers {has} of the teacher {name!r}, {num_classes} classes are needed: "
                "give its checkpoint by --teacher-path"
            )
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # the download raises the errors of several libraries
            raise UserError(
                f"timm's weights of the teacher {name!r} cannot be fetched; give a checkpoint by "
                f"--teacher-path ({one_line(error)[:160]})"
            ) from error
    return Teacher(model, mean, std).to(device)


def _as_trained(name: str, num_classes: int, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The network `name`; if `checkpoint` is of a run of `deit.main`, with that run's options."""
    if trained_model_name(checkpoint) != name:
        return timm.create_model(name, num_classes=num_classes)
    options = vars(parse_args([])) | vars(checkpoint["args"])
    options["grad_checkpointing"] = False
    return build_model(Namespace(**options), num_classes)[0]
