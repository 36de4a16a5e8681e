"""Exact evaluation metrics over any number of processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Accuracies in per cent and the mean cross-entropy over `count` images.

    Attributes:
        bad: images with a logit that is infinite or NaN; they count as wrong.
        mirrored: the top-1 accuracy on the mirrored images, None if they were not evaluated.
        same: per cent of the images that get the same answer as their mirror image.
    """

    acc1: float
    acc5: float
    loss: float
    count: int
    bad: int = 0
    mirrored: float | None = None
    same: float | None = None

    def __str__(self) -> str:
        """The line that evaluations of this family of networks print."""
        text = f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"
        if self.mirrored is not None:
            text += f" mirrored Acc@1 {self.mirrored:.3f} same answer {self.same:.3f}"
        return text

    def as_log(self, suffix: str = "") -> dict[str, float | None]:
        """The `test_*` entries of a line of log.txt, with `suffix` at the end of their names."""
        log = {"test_loss": self.loss, "test_acc1": self.acc1, "test_acc5": self.acc5}
        if self.mirrored is not None:
            log |= {"test_flop_acc1": self.mirrored, "test_flop_same": self.same}
        # JSON has no NaN
        return {k + suffix: v if math.isfinite(v) else None for k, v in log.items()}


class Accuracy:
    """Top-1 and top-5 accuracy and cross-entropy of a data set that arrives in batches.

    It keeps sums and counts, so that batches may differ in size and processes in the number of
    their batches, and nothing is averaged twice. They stay on the device until `compute`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # Top-1, top-5, images, not finite; mirrored: images, top-1, same answer; the loss. Counts
        # below 2^53 are exact in float64, which Apple's GPUs lack: there they are below 2^24.
        real = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._sums = torch.zeros(8, dtype=real, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, mirrored: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, K) of any dtype.
            targets: class indices (B,).
            mirrored: logits (B, K) of the mirrored images.
        """
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = top == targets[:, None]
        # topk ranks NaN first, which must not count as a prediction.
        bad = ~logits.isfinite().all(dim=1)
        hits &= ~bad[:, None]
        flopped = []
        if mirrored is not None:
            answers = mirrored.float().argmax(dim=1)
            bad_mirrored = ~mirrored.isfinite().all(dim=1)
            same = (answers == top[:, 0]) & ~bad & ~bad_mirrored
            flopped = [torch.ones_like(same), (answers == targets) & ~bad_mirrored, same]
            bad = bad | bad_mirrored
        counts = [hits[:, 0], hits, torch.ones_like(bad), bad, *flopped]
        sums = torch.stack([count.sum() for count in counts]).to(self._sums)
        self._sums[: len(sums)] += sums
        losses = F.cross_entropy(logits, targets, reduction="none")
        self._sums[-1] += losses.to(self._sums).sum()

    def compute(self, distributed: bool = False) -> Scores:
        """The scores so far. `distributed` sums over all processes, of which each must call it.

        Raises:
            ValueError: no image has been seen.
        """
        sums = self._sums.clone()
        if distributed:
            dist.all_reduce(sums)
        top1, top5, count, bad, flopped, mirrored, same, loss = sums.tolist()
        if count == 0:
            raise ValueError("no accuracy without images: the evaluation data are empty")
        flop = (100 * mirrored / flopped, 100 * same / flopped) if flopped else ()
        scores = (100 * top1 / count, 100 * top5 / count, loss / count, int(count), int(bad))
        return Scores(*scores, *flop)
