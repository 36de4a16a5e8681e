"""Folding of equivariant ConvNeXts, isotropic and hierarchical.

The depthwise layer makes s' of halves of s and a, and a' of the others. So the residual stream is
held as u = [s1 | a1] and v = [s2 | a2]: one depthwise convolution each makes s' of u and a' of v.
The norm's scales, shift and means are taken in by the map after it. For PyTorch channels are last,
and maps are linear layers. ONNX Runtime is faster with channels first and 1x1 convolutions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deit.deploy.pair import Each, PairMlp, PairNorm, Residual, Target
from deit.deploy.vit import fold_last_norm, fold_patches
from deit.deploy.weights import BUTTERFLY, Map, Pair, affine_maps, convolution, exact, pointwise
from deit.layers import ConvBlock, LayerNorm, MirrorConv2d, MirrorKernel, tracing
from deit.models import ConvNeXt, IsotropicConvNeXt

__all__ = ["FoldedConvNeXt"]

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.args)

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, {', '.join(map(str, self.args))}"


def exchange(x: Pair, dim: int) -> Pair:
    """(s, a) to (u, v), and the other way round."""
    (s1, s2), (a1, a2) = x[0].chunk(2, dim), x[1].chunk(2, dim)
    return torch.cat([s1, a1], dim), torch.cat([s2, a2], dim)


def halves(x: Tensor, dim: int) -> Pair:
    """Both halves, each dense in memory: what follows keeps its layout through all blocks."""
    first, second = x.chunk(2, dim)
    return first.contiguous(), second.contiguous()


class PointwiseMlp(nn.Module):
    """As `PairMlp` with 1x1 convolutions of images (B, C/2, H, W); gives u and v.

    Each quarter of the outputs has its own convolution: joining them costs one copy, taking halves
    apart and joining them others costs two.
    """

    def __init__(self, first: Sequence[Map], second: Sequence[Map], act: nn.Module):
        super().__init__()
        self.fc1_s, self.fc1_a = map(pointwise, first)
        self.fc2_s1, self.fc2_s2 = map(pointwise, second[0].chunk(2))
        self.fc2_a1, self.fc2_a2 = map(pointwise, second[1].chunk(2))
        self.act = act

    def forward(self, x: Pair) -> Pair:
        hs, ha = self.fc1_s(x[0]), self.fc1_a(x[1])
        plus, minus = self.act(hs + ha), self.act(hs - ha)
        s, a = plus + minus, plus - minus
        u = torch.cat([self.fc2_s1(s), self.fc2_a1(a)], 1)
        return u, torch.cat([self.fc2_s2(s), self.fc2_a2(a)], 1)


class FoldedConvNeXt(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or what the network's head gives.

    Of standard layers and operations, for inference alone.

    Raises:
        ValueError: in `forward`, for images whose width the original refuses too.
    """

    def __init__(self, model: IsotropicConvNeXt | ConvNeXt, target: Target):
        super().__init__()
        self.channels_first = target == "onnx"
        self.num_classes = model.num_classes
        self.stride = model.feature_info[len(model._steps()) - 1]["reduction"]
        self.global_pool = model.global_pool
        self.absolute = model.use_symmetrized_asym_feats
        self.steps = nn.Sequential(*fold_steps(model, self.channels_first))
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_total_stride(images.shape[-2], images.shape[-1], self.stride)
        u, v = self.steps(images)
        dim, places = (1, (2, 3)) if self.channels_first else (-1, (1, 2))
        (s1, a1), (s2, a2) = u.chunk(2, dim), v.chunk(2, dim)
        chosen = [s1, s2, a1.abs(), a2.abs()] if self.absolute else [s1, s2]
        if self.global_pool == "avg":
            return self.head(self.norm(torch.cat([q.mean(places) for q in chosen], -1)))
        x = torch.cat(chosen, dim)
        x = self.head(self.norm(x.permute(LAST) if self.channels_first else x))
        return x.permute(FIRST)


def fold_steps(model: IsotropicConvNeXt | ConvNeXt, channels_first: bool) -> list[nn.Module]:
    """Stem, blocks and what stands between stages, from images to (u, v)."""
    to_own = [] if channels_first else [Apply(torch.permute, LAST)]
    end = Apply(halves, 1 if channels_first else -1)
    if isinstance(model, IsotropicConvNeXt):
        stem = [regrouped(fold_patches(model.stem)), *to_own, end]
        return [*stem, *(fold_block(block, channels_first) for block in model.blocks)]
    conv, norm = model.downsample_layers[0]
    conv, norm = regrouped(fold_patches(conv, (True, True))), regrouped(fold_last_norm(norm))
    steps = [
        conv,
        Apply(torch.permute, LAST),
        norm,
        *([Apply(torch.permute, FIRST)] if channels_first else []),
        end,
    ]
    for i, stage in enumerate(model.stages):
        if i:
            steps += fold_downsample(*model.downsample_layers[i], channels_first)
        steps += [fold_block(block, channels_first) for block in stage]
    return steps


def fold_block(block: ConvBlock, channels_first: bool) -> Residual:
    """A ConvNeXt block on (u, v), channels last or first."""
    dim = 1 if channels_first else -1
    conv = block.dwconv
    depthwise = Each(
        fold_depthwise([conv.sym_to_sym, conv.asym_to_sym], conv.padding, channels_first),
        fold_depthwise([conv.sym_to_asym, conv.asym_to_asym], conv.padding, channels_first),
    )
    block = exact(block)
    first = affine_maps(block.norm.scaling, block.pwconv1, BUTTERFLY)
    second = affine_maps(BUTTERFLY, block.pwconv2, block.gamma or nn.Identity())
    norm = PairNorm(block.norm.eps, (True, True), dim)
    if channels_first:
        return Residual(depthwise, norm, PointwiseMlp(first, second, nn.GELU()))
    return Residual(depthwise, norm, PairMlp(first, second, nn.GELU()), Apply(exchange, dim))


def fold_depthwise(
    kernels: Sequence[MirrorKernel], padding: int, channels_first: bool
) -> nn.Module:
    """Two depthwise kernels as one of both inputs."""
    weights, biases = zip(*(kernel() for kernel in kernels), strict=True)
    weight = torch.cat([exact(half) for half in weights])
    bias = None if biases[0] is None else torch.cat([exact(bias) for bias in biases])
    return placed(convolution(weight, bias, padding=padding, groups=len(weight)), channels_first)


def placed(conv: nn.Conv2d, channels_first: bool) -> nn.Module:
    """A convolution of maps whose channels are first or last."""
    if channels_first:
        return conv
    return nn.Sequential(Apply(torch.permute, FIRST), conv, Apply(torch.permute, LAST))


def fold_downsample(norm: LayerNorm, conv: MirrorConv2d, channels_first: bool) -> list[nn.Module]:
    """Norm and strided convolution between two stages, (u, v) to (u, v)."""
    dim = 1 if channels_first else -1
    affine = exact(norm.scaling)
    kernel, bias = (exact(tensor) for tensor in conv.kernel())
    bias = bias + torch.einsum("oihw,i->o", kernel[:, : len(affine.beta)], affine.beta)
    kernel = kernel * torch.cat([affine.alpha_sym, affine.alpha_asym])[:, None, None]
    layer = placed(regrouped(convolution(kernel, bias, conv.stride, conv.padding)), channels_first)
    return [
        Apply(exchange, dim),
        PairNorm(norm.eps, (True, True), dim),
        Apply(torch.cat, dim),
        layer,
        Apply(halves, dim),
    ]


def regrouped(layer: nn.Module) -> nn.Module:
    """A layer that gives [s1 | a1 | s2 | a2] in place of [s | a]."""
    for parameter in layer.parameters():
        s1, s2, a1, a2 = parameter.chunk(4)
        parameter.data = torch.cat([s1, a1, s2, a2])
    return layer
