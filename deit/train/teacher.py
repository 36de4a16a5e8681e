"""The teacher of a distillation: any network of timm or of this package, frozen."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.data.classes import names_of_outputs, outputs_of
from deit.errors import UserError, one_line
from deit.train.build import check_known, mean_and_std
from deit.train.loading import build_as_trained


class Teacher(nn.Module):
    """A frozen network that sees the student's images the way it was trained to see them.

    Images (B, 3, H, W) normalised by `mean` and `std` are renormalised by the network's own
    statistics and, if it takes one size only, resampled to that. It never leaves evaluation mode.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        outputs: Sequence[int] | None = None,
    ) -> None:
        """`outputs`: those of the network that stand for the student's, in order; None for all."""
        super().__init__()
        chosen = None if outputs is None else torch.tensor(outputs)
        self.register_buffer("outputs", chosen, persistent=False)
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
        logits = self.model(images * self.scale + self.shift)
        return logits if self.outputs is None else logits[:, self.outputs]


def build_teacher(
    args: Namespace,
    num_classes: int,
    device: torch.device | str,
    class_names: Sequence[str] = (),
) -> Teacher:
    """The network `args.teacher_model` of timm or of this package as a teacher, on `device`.

    Of its checkpoint `args.teacher_path`, which is read without running code, the trained weights
    are taken, not their average; without one timm's weights.

    Args:
        num_classes: the student's outputs.
        class_names: what the student's outputs stand for; the teacher's are put in this order.

    Raises:
        UserError: an unknown name, weights that are absent or do not fit, or other classes.
    """
    name, path = args.teacher_model, args.teacher_path
    check_known(name, "teacher")
    if path:
        model, _ = build_as_trained(path, model=name)
        has, saved = model.num_classes or num_classes, model.class_names or ()
        outputs = _outputs(class_names, num_classes, has, saved, path)
    else:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if config is None or not config.has_weights:
            raise UserError(
                f"timm offers no weights of the teacher {name!r}: give its checkpoint by "
                "--teacher-path"
            )
        source = f"timm's weights for {config.num_classes} classes of the teacher {name!r}"
        outputs = _outputs(class_names, num_classes, config.num_classes, (), source)
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # the download raises the errors of several libraries
            raise UserError(
                f"timm's weights of the teacher {name!r} cannot be fetched; give a checkpoint by "
                f"--teacher-path ({one_line(error)[:160]})"
            ) from error
    return Teacher(model, *mean_and_std(args), outputs).to(device)


def _outputs(
    classes: Sequence[str], needed: int, has: int, saved: Sequence[str], source: str
) -> list[int] | None:
    """The teacher's outputs for the student's `classes`; None if they are its own in order."""
    if not classes and has != needed:
        raise UserError(f"{source}: {has} outputs, but {needed} classes are needed: give another "
                        "checkpoint by --teacher-path")  # fmt: skip
    if not classes or (has == needed and not saved):
        return None
    names, origin = names_of_outputs(classes, has, source=source, saved=saved)
    chosen = outputs_of(classes, names, has, origin=origin)
    return None if has == needed and chosen == list(range(len(chosen))) else chosen
