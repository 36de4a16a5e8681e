"""Folding of equivariant ResMLPs.

Tokens return to their places. There an equivariant map over tokens is one ordinary matrix for each
part, as large as that of an ordinary ResMLP: a few per cent more multiply-adds than in the
decomposed basis, and no change of basis anywhere. The antisymmetric part is held with the sign of
its right half changed. Then flopping exchanges left and right in both parts, and the biases of both
are the same on all rows, as biases of linear layers are. On a grid of odd width the rows of the
middle column have biases of their own.

Tokens are in mirror order: the left half of the grid, a middle column if there is one, the right
half mirrored.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from deit.deploy.pair import Each, Folded, PairMlp, Residual, RowMlp, Target
from deit.deploy.vit import fold_patches
from deit.deploy.weights import Map, Pair, affine_maps, exact, fill, linear, times
from deit.groups import Rep
from deit.layers import MixerBlock, OrdinaryAffine, tracing
from deit.models import ResMLP

QUICK = 1.702  # of ResMLP's x sigmoid(1.702 x), which is SiLU(1.702 x) / 1.702


class Places:
    """Tokens from the decomposed basis to their places and back; parts (..., N, C/2)."""

    def __init__(self, tokens: Rep):
        self.tokens = tokens
        # of the antisymmetric part in each row, (N, 1): minus one on the right
        self.signs = torch.ones(tokens.size, 1, dtype=torch.float64)
        self.signs[tokens.invariant :] = -1.0

    def to(self, x: Pair) -> Pair:
        s, a = (self.tokens.to_regular(part, -2) for part in x)
        return s, a * self.signs

    def back(self, x: Pair) -> Pair:
        return self.tokens.from_regular(x[0], -2), self.tokens.from_regular(x[1] * self.signs, -2)


class TokenMixing(nn.Module):
    """x + gain (W x) + bias over the tokens of one part, (B, N, C/2).

    The gain is one number a channel, the bias one a token and channel.
    """

    def __init__(self, weight: Tensor, gain: Tensor, bias: Tensor, target: Target):
        super().__init__()
        self.transposed = target == "torch"
        if self.transposed:
            self.map: nn.Module = linear(Map(weight))
        else:  # over the rows, without a transposition
            layer = nn.Conv1d(*weight.T.shape, 1, bias=False, device="meta")
            self.map = fill(layer, weight[..., None])
        self.register_buffer("gain", gain)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x.mT).mT if self.transposed else self.map(x)
        return x + (y * self.gain + self.bias)


class RowBiased(nn.Module):
    """A linear map and a bias of each row, (N, channels), for each part (B, N, channels)."""

    def __init__(self, maps: Sequence[Map], biases: Pair):
        super().__init__()
        self.map = Each(*(linear(Map(weight)) for weight, _ in maps))
        self.register_buffer("bias_s", biases[0])
        self.register_buffer("bias_a", biases[1])

    def forward(self, x: Pair) -> Pair:
        s, a = self.map(x)
        return s + self.bias_s, a + self.bias_a


class FoldedResMLP(Folded):
    """A folded `ResMLP`."""

    def __init__(self, model: ResMLP, target: Target):
        super().__init__(model)
        self.img_size = model.patch_embed.img_size
        self.tokens = model.tokens
        self.patch_embed = fold_patches(model.patch_embed)
        self.register_buffer("order", model.patch_embed.grid.permutation())
        self.register_buffer("signs", Places(model.tokens).signs)
        blocks = (fold_block(exact(block), target) for block in model.blocks)
        self.blocks = nn.Sequential(*(layer for block in blocks for layer in block))
        affine = exact(model.norm) if isinstance(model.norm, OrdinaryAffine) else None
        self.register_buffer("scale", None if affine is None else affine.alpha.data)
        self.register_buffer("bias", None if affine is None else affine.beta.data)

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_images(images, self.in_chans)
        tracing.check_image_size(images.shape[-2], images.shape[-1], *self.img_size)
        x = self.patch_embed(images).flatten(2).transpose(1, 2).index_select(1, self.order)
        half = x.shape[-1] // 2
        s, a = self.blocks((x[..., :half].contiguous(), x[..., half:] * self.signs))
        (ss, sa), (as_, aa) = (
            self.tokens.split(self.tokens.from_regular(part, 1), 1) for part in (s, a * self.signs)
        )
        x = torch.cat([ss, aa], 1)  # what flopping leaves alone
        if self.absolute:
            x = torch.cat([x, torch.cat([as_, sa], 1).abs()], -1)
        if self.global_pool == "avg":
            x = x.mean(1)
        if self.scale is not None:
            x = x * self.scale + self.bias
        return self.head(x)


def fold_block(block: MixerBlock, target: Target) -> list[nn.Module]:
    """The two halves of a block in float64, on a pair (B, N, C/2)."""
    places = Places(block.tokens)
    return [fold_mixing(block, places, target), Residual(fold_perceptron(block, places))]


def fold_mixing(block: MixerBlock, places: Places, target: Target) -> Each:
    """The first half of a block."""
    count, width = block.tokens.size, len(block.gamma_1.alpha_sym)
    # a batch of tokens, one of them one, and one without
    inputs = torch.eye(count, dtype=torch.float64)
    inputs = torch.cat([inputs, inputs.new_zeros(1, count)])[..., None]
    columns = places.to(block.mix(places.back((inputs, inputs))))
    weights = ((y[:-1] - y[-1]).squeeze(-1).T for y in columns)
    gains = (
        block.norm1.alpha_sym * block.gamma_1.alpha_sym,
        block.norm1.alpha_asym * block.gamma_1.alpha_asym,
    )
    zeros = torch.zeros(1, count, width, dtype=torch.float64)
    biases = places.to(block.gamma_1(block.mix(block.norm1((zeros, zeros)))))
    return Each(*(
        TokenMixing(weight, gain, bias[0], target)
        for weight, gain, bias in zip(weights, gains, biases, strict=True)
    ))  # fmt: skip


def fold_perceptron(block: MixerBlock, places: Places) -> PairMlp:
    """What the second half of a block adds.

    The nonlinearity's argument is made QUICK times larger, its value so many times smaller. The
    block's own places have values root two times larger.
    """
    mlp, norm, tokens = block.mlp, block.norm2, block.tokens
    before, after = sqrt(0.5) * QUICK / mlp.act.scale, sqrt(0.5) * mlp.act.scale / QUICK

    def scaled(x: Pair) -> Pair:
        return x[0] * norm.alpha_sym, x[1] * norm.alpha_asym

    def zeros(channels: Rep) -> Pair:
        rows = torch.zeros(1, tokens.size, channels.invariant, dtype=torch.float64)
        return rows, rows

    first = affine_maps(scaled, mlp.fc1, times(sqrt(2) * before))
    second = affine_maps(times(sqrt(0.5) * after), mlp.fc2, block.gamma_2)
    starts = times(before)(mlp.fc1(block.to_places(norm(zeros(mlp.fc1.in_rep)))))
    ends = places.to(block.gamma_2(block.from_places(mlp.fc2(zeros(mlp.fc2.in_rep)))))
    starts, ends = ([part[0] for part in parts] for parts in (starts, ends))
    if tokens.fixed:
        return PairMlp(RowBiased(first, starts), nn.SiLU(), RowBiased(second, ends))
    first = [Map(weight, rows[0]) for (weight, _), rows in zip(first, starts, strict=True)]
    second = [Map(weight, rows[0]) for (weight, _), rows in zip(second, ends, strict=True)]
    return RowMlp(first, nn.SiLU(), second)
