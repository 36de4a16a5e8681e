"""Folding of equivariant ConvNeXts, isotropic and hierarchical.

The depthwise layer makes s' of halves of s and a, and a' of the others. So the residual stream is
held as u = [s1 | a1] and v = [s2 | a2]: one depthwise convolution each makes s' of u and a' of v.
The norm's scales, shift and means are taken in by the map after it. For PyTorch channels are last,
and maps are linear layers. ONNX Runtime is faster with channels first and 1x1 convolutions.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deit.deploy.pair import Each, Folded, PairMlp, PairNorm, Residual, RowMlp, Target
from deit.deploy.vit import fold_last_norm, fold_patches
from deit.deploy.weights import BUTTERFLY, Map, Pair, affine_maps, convolution, exact, pointwise
from deit.layers import ConvBlock, LayerNorm, MirrorConv2d, MirrorKernel, tracing
from deit.models import ConvNeXt, IsotropicConvNeXt

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


class Quarters(nn.Module):
    """1x1 convolutions of s and a, images (B, C/2, H, W), that give u and v.

    Each quarter of the outputs has its own: joining them costs one copy, taking halves apart and
    joining them others costs two.
    """

    def __init__(self, maps: Sequence[Map]):
        super().__init__()
        self.s1, self.s2 = map(pointwise, maps[0].chunk(2))
        self.a1, self.a2 = map(pointwise, maps[1].chunk(2))

    def forward(self, x: Pair) -> Pair:
        u = torch.cat([self.s1(x[0]), self.a1(x[1])], 1)
        return u, torch.cat([self.s2(x[0]), self.a2(x[1])], 1)


class FoldedConvNeXt(Folded):
    """A folded equivariant ConvNeXt, isotropic or hierarchical."""

    def __init__(self, model: IsotropicConvNeXt | ConvNeXt, target: Target):
        super().__init__(model)
        self.channels_first = target == "onnx"
        self.stride = model.feature_info[len(model._steps()) - 1]["reduction"]
        self.steps = nn.Sequential(*fold_steps(model, self.channels_first))
        self.norm = copy.deepcopy(model.norm)

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_images(images, self.in_chans)
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
    to_last, to_first = Apply(torch.permute, LAST), Apply(torch.permute, FIRST)
    end = Apply(halves, 1 if channels_first else -1)
    if isinstance(model, IsotropicConvNeXt):
        steps = [regrouped(fold_patches(model.stem)), *([] if channels_first else [to_last]), end]
        return [*steps, *(fold_block(block, channels_first) for block in model.blocks)]
    conv, norm = model.downsample_layers[0]
    steps = [regrouped(fold_patches(conv, (True, True))), to_last, regrouped(fold_last_norm(norm))]
    steps += [to_first, end] if channels_first else [end]
    for i, stage in enumerate(model.stages):
        if i:
            steps += fold_downsample(*model.downsample_layers[i], channels_first)
        steps += [fold_block(block, channels_first) for block in stage]
    return steps


def fold_block(block: ConvBlock, channels_first: bool) -> Residual:
    """A ConvNeXt block on (u, v), channels last or first."""
    dim = 1 if channels_first else -1
    conv = block.dwconv
    kernels = (conv.sym_to_sym, conv.asym_to_sym), (conv.sym_to_asym, conv.asym_to_asym)
    depthwise = Each(*(fold_depthwise(own, conv.padding, channels_first) for own in kernels))
    block = exact(block)
    first = affine_maps(block.norm.scaling, block.pwconv1, BUTTERFLY)
    second = affine_maps(BUTTERFLY, block.pwconv2, block.gamma or nn.Identity())
    norm = PairNorm(block.norm.eps, dim=dim)
    if channels_first:
        mlp = PairMlp(Each(*map(pointwise, first)), nn.GELU(), Quarters(second))
        return Residual(depthwise, norm, mlp)
    return Residual(depthwise, norm, RowMlp(first, nn.GELU(), second), Apply(exchange, dim))


def fold_depthwise(
    kernels: Sequence[MirrorKernel], padding: int, channels_first: bool
) -> nn.Module:
    """Two depthwise kernels as one of both inputs."""
    weights, biases = zip(*(exact(kernel)() for kernel in kernels), strict=True)
    weight = torch.cat(weights)
    bias = None if biases[0] is None else torch.cat(biases)
    return placed(convolution(weight, bias, len(weight), padding=padding), channels_first)


def fold_downsample(norm: LayerNorm, conv: MirrorConv2d, channels_first: bool) -> list[nn.Module]:
    """Norm and strided convolution between two stages, (u, v) to (u, v)."""
    dim = 1 if channels_first else -1
    affine = exact(norm.scaling)
    kernel, bias = exact(conv).kernel()
    bias = bias + torch.einsum("oihw,i->o", kernel[:, : len(affine.beta)], affine.beta)
    kernel = kernel * torch.cat([affine.alpha_sym, affine.alpha_asym])[:, None, None]
    layer = regrouped(convolution(kernel, bias, stride=conv.stride, padding=conv.padding))
    return [
        Apply(exchange, dim),
        PairNorm(norm.eps, dim=dim),
        Apply(torch.cat, dim),
        placed(layer, channels_first),
        Apply(halves, dim),
    ]


def placed(conv: nn.Conv2d, channels_first: bool) -> nn.Module:
    """A convolution of maps whose channels are first or last."""
    if channels_first:
        return conv
    return nn.Sequential(Apply(torch.permute, FIRST), conv, Apply(torch.permute, LAST))


def regrouped(layer: nn.Module) -> nn.Module:
    """A layer that gives [s1 | a1 | s2 | a2] in place of [s | a]."""
    for parameter in layer.parameters():
        s1, s2, a1, a2 = parameter.chunk(4)
        parameter.data = torch.cat([s1, a1, s2, a2])
    return layer
