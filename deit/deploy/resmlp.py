"""Folding of equivariant ResMLPs.

Tokens return to their places. There an equivariant map over tokens is one ordinary matrix for each
part, as large as that of an ordinary ResMLP: a few per cent more multiply-adds than in the
decomposed basis, and no change of basis anywhere. The antisymmetric part is held with the sign of
its right half changed. Then flopping exchanges left and right in both parts, and the shifts of both
are the same on all rows, as shifts of linear layers are.

Tokens are in mirror order: the left half of the grid, a middle column if there is one, the right
half mirrored.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor, nn

from deit.deploy.pair import Pair, PairMlp, Target, fold_butterfly
from deit.deploy.vit import fold_patches, gamma_of
from deit.deploy.weights import Weights, exact, linear_pair
from deit.groups import Rep
from deit.layers import MixerBlock, OrdinaryAffine, tracing
from deit.layers.affine import Affine
from deit.models import ResMLP

__all__ = ["FoldedResMLP"]

QUICK = 1.702  # of ResMLP's x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702


class TokenMixing(nn.Module):
    """x + gain (W x) + shift over the tokens of one part, (B, N, C/2).

    The gain is one number a channel, the shift one a token and channel.
    """

    def __init__(self, weight: Tensor, gain: Tensor, shift: Tensor, target: Target):
        super().__init__()
        self.transposed = target == "torch"
        self.map = Weights(weight).linear() if self.transposed else Weights(weight).over_rows()
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x.mT).mT if self.transposed else self.map(x)
        return x + (y * self.gain + self.shift)


class RowShiftedMlp(PairMlp):
    """A PairMlp with shifts that are not the same on all rows.

    Args:
        first, second: the maps of s and a, as for all rows.
        middle: those before the nonlinearity as they are in the middle column, where a has no
            shift, neither before the nonlinearity nor after it.
        tokens: which rows these are.
    """

    def __init__(
        self,
        first: Sequence[Weights],
        second: Sequence[Weights],
        act: nn.Module,
        middle: Sequence[Weights],
        tokens: Rep,
    ):
        s, a = second
        super().__init__([replace(w, bias=None) for w in first], [s, replace(a, bias=None)], act)

        def by_row(others: Tensor, own: Tensor) -> Tensor:
            rows = others.repeat(tokens.size, 1)
            rows[tokens.free : tokens.invariant] = own
            return rows

        self.register_buffer("shift_s", by_row(first[0].bias, middle[0].bias))
        self.register_buffer("shift_a", by_row(first[1].bias, torch.zeros_like(first[1].bias)))
        self.register_buffer("shift_out", by_row(a.bias, torch.zeros_like(a.bias)))

    def forward(self, x: Pair) -> Pair:  # parts (B, N, C/2)
        hs, ha = self.fc1_s(x[0]) + self.shift_s, self.fc1_a(x[1]) + self.shift_a
        plus, minus = self.act(hs + ha), self.act(hs - ha)
        return self.fc2_s(plus + minus), self.fc2_a(plus - minus) + self.shift_out


class PairMixerBlock(nn.Module):
    """A block of a ResMLP on a pair (B, N, C/2)."""

    def __init__(self, block: MixerBlock, target: Target):
        super().__init__()
        tokens = block.tokens
        self.mix_s, self.mix_a = fold_mixing(block, target)
        first, second = fold_perceptron(block)
        if tokens.fixed:
            middle, _ = fold_perceptron(block, sqrt(2))  # rows of their own, and no sums of two
            self.mlp: nn.Module = RowShiftedMlp(first, second, nn.SiLU(), middle, tokens)
        else:
            self.mlp = PairMlp(first, second, nn.SiLU())

    def forward(self, x: Pair) -> Pair:
        s, a = self.mix_s(x[0]), self.mix_a(x[1])
        ys, ya = self.mlp((s, a))
        return s + ys, a + ya


class FoldedResMLP(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or what the network's head gives.

    Of standard layers and operations; for inference alone.

    Raises:
        ValueError: in `forward`, for images of another size than that of the network.
    """

    def __init__(self, model: ResMLP, target: Target):
        super().__init__()
        self.num_classes = model.num_classes
        self.img_size = model.patch_embed.img_size
        self.global_pool = model.global_pool
        self.absolute = model.use_symmetrized_asym_feats
        tokens = model.tokens
        self.free, self.fixed = tokens.free, tokens.fixed
        self.patch_embed = fold_patches(model.patch_embed)
        self.register_buffer("order", model.patch_embed.grid.permutation())
        self.register_buffer("signs", signs(tokens))
        self.blocks = nn.Sequential(*(PairMixerBlock(block, target) for block in model.blocks))
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)
        self.head = copy.deepcopy(model.head)
        if isinstance(model.norm, OrdinaryAffine):
            alpha, beta = exact(model.norm.alpha), exact(model.norm.beta)
            if isinstance(model.head, nn.Identity):
                self.scale, self.shift = alpha, beta
            else:
                self.head = Weights.of(model.head).reading(alpha, beta).linear()

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_image_size(images.shape[-2], images.shape[-1], *self.img_size)
        x = self.patch_embed(images).flatten(2).transpose(1, 2).index_select(1, self.order)
        half = x.shape[-1] // 2
        x = self.blocks((x[..., :half].contiguous(), x[..., half:] * self.signs))
        x = self._invariants(*x)
        if self.global_pool == "avg":
            x = x.mean(1)
        if self.scale is not None:
            x = x * self.scale + self.shift
        return self.head(x)

    def _invariants(self, s: Tensor, a: Tensor) -> Tensor:
        """(B, N, C/2): what flopping leaves alone; with the absolute values of the rest, C."""
        left, right = slice(0, self.free), slice(self.free + self.fixed, None)
        middle = slice(self.free, self.free + self.fixed)
        factor = sqrt(0.5)
        symmetric = (s[:, left] + s[:, right]) * factor
        antisymmetric = (a[:, left] + a[:, right]) * factor
        x = torch.cat([symmetric, s[:, middle], antisymmetric], 1)
        if not self.absolute:
            return x
        others = [(a[:, left] - a[:, right]) * factor, a[:, middle]]
        others.append((s[:, left] - s[:, right]) * factor)
        return torch.cat([x, torch.cat(others, 1).abs()], -1)


def signs(tokens: Rep) -> Tensor:
    """Of the antisymmetric part in each row, (N, 1): minus one on the right."""
    factors = torch.ones(tokens.size, 1, dtype=torch.float64)
    factors[tokens.invariant :] = -1.0
    return factors


def scales(norm: Affine) -> tuple[list[Tensor], list[Tensor]]:
    """The scales of s and a, and their shifts."""
    alphas = [exact(norm.alpha_sym), exact(norm.alpha_asym)]
    return alphas, [exact(norm.beta_sym), exact(norm.beta_asym)]


def fold_mixing(block: MixerBlock, target: Target) -> list[TokenMixing]:
    """The first half of a block, for s and for a."""
    tokens = block.tokens
    sym, asym = linear_pair(block.attn)
    weight = torch.block_diag(sym.weight, asym.weight)
    weight = tokens.to_regular(tokens.to_regular(weight, 0), 1)
    biases = [
        torch.cat([sym.bias, torch.zeros_like(asym.bias)]),
        torch.cat([torch.zeros_like(sym.bias), asym.bias]),
    ]
    alphas, _ = scales(block.norm1)
    layers = []
    for i, (gamma, bias) in enumerate(zip(gamma_of(block.gamma_1), biases, strict=True)):
        sign = signs(tokens) if i else torch.ones_like(signs(tokens))
        own = sign * weight * sign.mT
        offset, shift = (
            sign * tokens.to_regular(packed, 0)
            for packed in (exact(block.norm1.offset(i)), bias[:, None])
        )
        layers.append(TokenMixing(own, alphas[i] * gamma, gamma * (own @ offset + shift), target))
    return layers


def fold_perceptron(block: MixerBlock, factor: float = 1.0) -> tuple[list[Weights], list[Weights]]:
    """The maps before and after the nonlinearity, for s and for a.

    factor: on the shift of the norm before them.
    """
    first = [
        w.reading(sqrt(2) * alpha, factor * beta)
        for w, alpha, beta in zip(linear_pair(block.mlp.fc1), *scales(block.norm2), strict=True)
    ]
    second = [
        w.times(sqrt(0.5) * gamma)
        for w, gamma in zip(linear_pair(block.mlp.fc2), gamma_of(block.gamma_2), strict=True)
    ]
    return fold_butterfly(first, second, scale=block.mlp.act.scale, gain=QUICK)
