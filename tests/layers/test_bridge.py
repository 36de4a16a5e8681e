"""From packed features to ordinary ones."""

import pytest
import torch
from checks import BOTH_GROUPS, Packed, breaks, check, close, features

from deit.equivariance import channels, invariant
from deit.groups import FLOP, OCTIC
from deit.layers import InvariantBridge, RegularBridge


def test_formulas():
    x = features(2, 5, 8)
    s, a = x.chunk(2, -1)
    close(Packed(RegularBridge(8))(x), torch.cat([s + a, s - a], -1) / 2**0.5)
    close(Packed(InvariantBridge(8))(x), torch.cat([s, a.abs()], -1))


def test_invariant_features_are_left_alone():
    check(Packed(InvariantBridge(8)), features(3, 5, 8), channels(FLOP.regular(8)), invariant)
    breaks(Packed(RegularBridge(8)), features(3, 5, 8), channels(FLOP.regular(8)), invariant)


@BOTH_GROUPS
def test_regular_features_are_permuted(group):
    """By copies of the group: element g moves copy h to gh."""

    def permute(g, y):
        copies = y.unflatten(-1, (group.order, -1))
        moved = [group.table[group.inverse(g)][h] for h in range(group.order)]
        return copies[..., moved, :].flatten(-2)

    check(
        Packed(RegularBridge(16, group)),
        features(3, 16),
        channels(group.regular(16)),
        permute,
        group,
    )


def test_no_information_is_lost():
    x = features(2, 8)
    close(Packed(RegularBridge(8))(x).norm(), x.norm())
    close(FLOP.regular(8).from_regular(Packed(RegularBridge(8))(x)), x)


def test_only_signs_have_absolute_values():
    with pytest.raises(NotImplementedError, match="more than one dimension"):
        InvariantBridge(16, OCTIC)
