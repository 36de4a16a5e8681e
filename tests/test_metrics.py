"""Accuracy is exact for every split of the data over batches (test_distributed: processes)."""

import math

import pytest
import torch

from deit.train.metrics import Accuracy


def by_hand(logits, targets, k):
    order = logits.argsort(dim=1, descending=True)[:, :k]
    return 100 * sum(t in row for t, row in zip(targets.tolist(), order.tolist(), strict=True))


@pytest.mark.parametrize("classes", [11, 3])
def test_exact_for_any_batch_size(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, classes, generator=generator)
    targets = torch.randint(classes, (103,), generator=generator)
    loss = -logits.double().log_softmax(1)[torch.arange(103), targets].mean()
    for batch_size in (1, 7, 1000):
        accuracy = Accuracy()
        for batch in zip(logits.split(batch_size), targets.split(batch_size), strict=True):
            accuracy.update(*batch)
        scores = accuracy.compute()
        assert scores.acc1 == by_hand(logits, targets, 1) / 103
        assert scores.acc5 == by_hand(logits, targets, 5) / 103
        assert 0 < scores.acc1 < scores.acc5 <= 100
        assert scores.count == 103
        assert scores.loss == pytest.approx(loss.item(), rel=1e-6)


def test_nan_is_never_correct_and_empty_is_an_error():
    accuracy = Accuracy()
    nan = torch.full((4, 3), float("nan"))
    accuracy.update(nan, torch.tensor([0, 1, 2, 0]), mirrored=nan)
    scores = accuracy.compute()
    assert (scores.acc1, scores.acc5, scores.mirrored, scores.same, scores.bad) == (0, 0, 0, 0, 4)
    assert math.isnan(scores.loss)
    with pytest.raises(ValueError, match="empty"):
        Accuracy().compute()
