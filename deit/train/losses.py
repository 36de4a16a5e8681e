"""Training losses: one interface for cross-entropy, BCE, cosub and distillation.

    criterion = build_criterion(args, mixup=True)
    loss = criterion(model(criterion.network_input(images)), targets, images)

`targets` are class indices (B,), or the dense targets (B, K) that mixup makes of them. Every loss
is computed in float32, whatever the outputs' dtype, and is a mean over the batch.
"""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from deit.errors import UserError

# What a network may return: logits (B, K), or two of them from a class and a distillation token.
Outputs = Tensor | tuple[Tensor, Tensor]


class TrainingLoss(nn.Module):
    """A loss of logits (B, K) and targets; subclasses change what the network is given or what
    its outputs are compared with."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def network_input(self, images: Tensor) -> Tensor:
        """What the network is to be given for a batch of images (B, 3, H, W)."""
        return images

    def forward(self, outputs: Outputs, targets: Tensor, images: Tensor | None = None) -> Tensor:
        return self.base(outputs.float(), targets)


class CosubLoss(TrainingLoss):
    """Co-training of sub-networks ("Co-training 2^L submodels", arXiv:2212.04884).

    Each image goes through the network twice in one batch, and stochastic depth makes that two
    sub-networks. With their logits x and y the loss is the mean of BCE(x, targets),
    BCE(y, targets), BCE(x, sigmoid(y)) and BCE(y, sigmoid(x)), the sigmoids without gradient.
    """

    def network_input(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) twice along the batch: (2B, 3, H, W)."""
        return torch.cat([images, images])

    def forward(self, outputs: Outputs, targets: Tensor, images: Tensor | None = None) -> Tensor:
        x, y = outputs.float().chunk(2)
        to_targets = self.base(x, targets) + self.base(y, targets)
        to_each_other = F.binary_cross_entropy_with_logits(
            x, y.detach().sigmoid()
        ) + F.binary_cross_entropy_with_logits(y, x.detach().sigmoid())
        return (to_targets + to_each_other) / 4


class DistillationLoss(TrainingLoss):
    """(1 - alpha) x the base loss + alpha x the distance to a teacher (DeiT, arXiv:2012.12877).

    A network with a distillation token returns two logits: the first is compared with the
    targets, the second with the teacher. A network with a single output has it compared with
    both. timm's networks return two only after `set_distilled_training()`, see `prepare_student`.

    Args:
        base: loss of logits and targets.
        teacher: network from the images that the student was given to logits (B, K).
        kind: "soft" is the KL divergence of the distributions at temperature `tau`, averaged over
            batch and classes and multiplied by tau^2; "hard" is the cross-entropy to the
            teacher's decision.
        alpha: share of the distillation, from 0 to 1.
        tau: temperature of the soft kind.
    """

    def __init__(
        self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float
    ) -> None:
        super().__init__(base)
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, outputs: Outputs, targets: Tensor, images: Tensor | None = None) -> Tensor:
        logits, distilled = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        distilled = distilled.float()
        with torch.no_grad():
            teacher = self.teacher(images).float()
        if teacher.shape != distilled.shape:
            raise UserError(
                f"the teacher gives {teacher.shape[-1]} classes, the student {distilled.shape[-1]}"
            )
        if self.kind == "hard":
            distance = F.cross_entropy(distilled, teacher.argmax(dim=1))
        else:
            divergence = F.kl_div(
                F.log_softmax(distilled / self.tau, dim=1),
                F.log_softmax(teacher / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
            # Averaged over the classes too, as published; tau^2 keeps the size of the gradients.
            distance = divergence * (self.tau * self.tau) / distilled.numel()
        return (1 - self.alpha) * self.base(logits.float(), targets) + self.alpha * distance


def prepare_student(model: nn.Module) -> None:
    """Have a network with a distillation token return both its outputs while it trains."""
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)


def build_criterion(
    args: Namespace, *, mixup: bool, teacher: nn.Module | None = None
) -> TrainingLoss:
    """The training loss that the options `args` ask for.

    Label smoothing is that of targets that are class indices; dense ones have theirs. With
    `bce_loss` targets are 1 wherever the given ones are > 0.

    Args:
        mixup: whether targets are dense.
        teacher: see `DistillationLoss`.
    """
    if args.bce_loss or args.cosub:
        threshold = 0.0 if args.bce_loss else None
        base: nn.Module = BinaryCrossEntropy(args.smoothing, target_threshold=threshold)
    elif mixup:
        base = SoftTargetCrossEntropy()
    elif args.smoothing:
        base = LabelSmoothingCrossEntropy(args.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    kind = args.distillation_type
    if kind == "none":
        return CosubLoss(base) if args.cosub else TrainingLoss(base)
    return DistillationLoss(base, teacher, kind, args.distillation_alpha, args.distillation_tau)
