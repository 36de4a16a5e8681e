"""Folding of equivariant ConvNeXts, isotropic and hierarchical.

The depthwise layer makes s' of halves of s and a, and a' of the others. So the residual stream is
held as u = [s1 | a1] and v = [s2 | a2]: one depthwise convolution each makes s' of u and a' of v.
The norm's scales, shift and means are taken in by the map after it. For PyTorch channels are last,
and maps are linear layers; ONNX Runtime is faster with channels first and 1x1 convolutions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deit.deploy.pair import Pair, PairMlp, PairNorm, Target, fold_butterfly
from deit.deploy.vit import fold_last_norm, fold_patches, gamma_of, scales
from deit.deploy.weights import convolution, exact, linear_pair
from deit.layers import ConvBlock, LayerNorm, MirrorConv2d, MirrorKernel, tracing
from deit.models import ConvNeXt, IsotropicConvNeXt

__all__ = ["FoldedConvNeXt", "fold_convnext"]


def regroup(x: Tensor, dim: int) -> Tensor:
    """[s1 | s2 | a1 | a2] to [s1 | a1 | s2 | a2] along `dim`, and the other way round."""
    s1, s2, a1, a2 = x.chunk(4, dim)
    return torch.cat([s1, a1, s2, a2], dim)


class PointwiseMlp(nn.Module):
    """As `PairMlp` with 1x1 convolutions of images (B, C/2, H, W); gives u and v.

    Each quarter of the outputs has its own convolution: joining them costs one copy, taking halves
    apart and joining them others costs two.
    """

    def __init__(self, first: Sequence, second: Sequence, act: nn.Module):
        super().__init__()
        self.fc1_s, self.fc1_a = (w.pointwise() for w in first)
        for name, w in zip("sa", second, strict=True):
            quarter = w.weight.shape[0] // 2
            self.add_module(f"fc2_{name}1", w.rows(slice(None, quarter)).pointwise())
            self.add_module(f"fc2_{name}2", w.rows(slice(quarter, None)).pointwise())
        self.act = act

    def forward(self, x: Pair) -> Pair:
        hs, ha = self.fc1_s(x[0]), self.fc1_a(x[1])
        plus, minus = self.act(hs + ha), self.act(hs - ha)
        s, a = plus + minus, plus - minus
        u = torch.cat([self.fc2_s1(s), self.fc2_a1(a)], 1)
        return u, torch.cat([self.fc2_s2(s), self.fc2_a2(a)], 1)


class PairConvBlock(nn.Module):
    """A ConvNeXt block on (u, v), channels last or first."""

    def __init__(self, block: ConvBlock, target: Target):
        super().__init__()
        self.channels_first = target == "onnx"
        conv = block.dwconv
        self.conv_u = fold_depthwise([conv.sym_to_sym, conv.asym_to_sym], conv.padding)
        self.conv_v = fold_depthwise([conv.sym_to_asym, conv.asym_to_asym], conv.padding)
        self.norm = PairNorm(block.norm.eps, (True, True), dim=1 if self.channels_first else -1)
        first = [
            w.reading(alpha, beta)
            for w, alpha, beta in zip(linear_pair(block.pwconv1), *scales(block.norm), strict=True)
        ]
        second = linear_pair(block.pwconv2)
        if block.gamma is not None:
            second = [w.times(g) for w, g in zip(second, gamma_of(block.gamma), strict=True)]
        mlp = PointwiseMlp if self.channels_first else PairMlp
        self.mlp = mlp(*fold_butterfly(first, second), nn.GELU())

    def forward(self, x: Pair) -> Pair:
        u, v = x
        if self.channels_first:
            yu, yv = self.mlp(self.norm((self.conv_u(u), self.conv_v(v))))
            return u + yu, v + yv
        s, a = self.mlp(self.norm((self._convolve(self.conv_u, u), self._convolve(self.conv_v, v))))
        half = s.shape[-1] // 2
        yu = torch.cat([s[..., :half], a[..., :half]], -1)
        yv = torch.cat([s[..., half:], a[..., half:]], -1)
        return u + yu, v + yv

    @staticmethod
    def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Module):
    """A convolution of the image, with the norm after it if there is one; gives (u, v).

    `order` is that of the convolution's outputs if there is no norm, which wants [s | a].
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.LayerNorm | None, channels_first: bool):
        super().__init__()
        self.conv, self.norm, self.channels_first = conv, norm, channels_first

    def forward(self, images: Tensor) -> Pair:
        x = self.conv(images)
        if self.norm is not None:
            x = self.norm(x.permute(0, 2, 3, 1))
            if self.channels_first:
                x = x.permute(0, 3, 1, 2)
        elif not self.channels_first:
            x = x.permute(0, 2, 3, 1)
        return halves(x, 1 if self.channels_first else -1)


class Downsample(nn.Module):
    """Norm and strided convolution between two stages, (u, v) to (u, v)."""

    def __init__(self, norm: LayerNorm, conv: MirrorConv2d, channels_first: bool):
        super().__init__()
        self.dim = 1 if channels_first else -1
        # the means of s and a are those of quarters of u and v
        self.eps = norm.eps
        (alpha_s, alpha_a), (beta, _) = scales(norm)
        kernel, bias = (exact(tensor) for tensor in conv.kernel())
        bias = bias + torch.einsum("oihw,i->o", kernel[:, : len(beta)], beta)
        kernel = kernel * torch.cat([alpha_s, alpha_a])[:, None, None]
        kernel = regroup(regroup(kernel, 0), 1)
        self.conv = convolution(kernel, regroup(bias, 0), conv.stride, conv.padding)

    def forward(self, x: Pair) -> Pair:
        dim = self.dim
        wide = [tracing.widen(part) for part in x]
        quarters = [quarter for part in wide for quarter in halves(part, dim)]  # s1 a1 s2 a2
        means = [quarter.mean(dim, keepdim=True) for quarter in quarters]
        s, a = (means[0] + means[2]) * 0.5, (means[1] + means[3]) * 0.5
        quarters = [q - mean for q, mean in zip(quarters, (s, a, s, a), strict=True)]
        y = torch.cat(quarters, dim)
        # two halves: the sum of their variances is twice the mean square of all channels
        y = y * torch.rsqrt(y.square().mean(dim, keepdim=True) + self.eps * 0.5)
        y = y.to(x[0].dtype)
        y = self.conv(y if dim == 1 else y.permute(0, 3, 1, 2))
        return halves(y if dim == 1 else y.permute(0, 2, 3, 1), dim)


class FoldedConvNeXt(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or what the network's head gives.

    Of standard layers and operations; for inference alone.

    Raises:
        ValueError: in `forward`, for images whose width the original refuses too.
    """

    def __init__(self, model: IsotropicConvNeXt | ConvNeXt, steps: list[nn.Module], target: Target):
        super().__init__()
        self.channels_first = target == "onnx"
        self.num_classes = model.num_classes
        self.stride = model.feature_info[len(model._steps()) - 1]["reduction"]
        self.global_pool = model.global_pool
        self.absolute = model.use_symmetrized_asym_feats
        self.steps = nn.Sequential(*steps)
        self.norm, self.head = copy.deepcopy(model.norm), copy.deepcopy(model.head)

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_total_stride(images.shape[-2], images.shape[-1], self.stride)
        u, v = self.steps(images)
        dim, places = (1, (2, 3)) if self.channels_first else (-1, (1, 2))
        quarters = [*halves(u, dim), *halves(v, dim)]  # s1, a1, s2, a2
        chosen = [quarters[0], quarters[2]]
        if self.absolute:
            chosen += [quarters[1].abs(), quarters[3].abs()]
        if self.global_pool == "avg":
            return self.head(self.norm(torch.cat([q.mean(places) for q in chosen], -1)))
        x = torch.cat(chosen, dim)
        x = self.head(self.norm(x.permute(0, 2, 3, 1) if self.channels_first else x))
        return x.permute(0, 3, 1, 2)


def halves(x: Tensor, dim: int) -> Pair:
    """The two halves along an axis; contiguous where they are to be convolved."""
    first, second = x.chunk(2, dim)
    return first, second


def fold_depthwise(kernels: Sequence[MirrorKernel], padding: int) -> nn.Conv2d:
    """Two depthwise kernels as one of both inputs."""
    halves, biases = zip(*(kernel() for kernel in kernels), strict=True)
    kernel = torch.cat([exact(half) for half in halves])
    bias = None if biases[0] is None else torch.cat([exact(bias) for bias in biases])
    return convolution(kernel, bias, padding=padding, groups=len(kernel))


def fold_convnext(model: IsotropicConvNeXt | ConvNeXt, target: Target) -> FoldedConvNeXt:
    """The folded form of an equivariant ConvNeXt."""
    first = target == "onnx"
    steps: list[nn.Module] = []
    if isinstance(model, IsotropicConvNeXt):
        conv = fold_patches(model.stem)
        steps.append(Stem(regrouped(conv), None, first))
        blocks = list(model.blocks)
    else:
        conv, norm = model.downsample_layers[0]
        norm = fold_last_norm(norm)
        norm.weight.data, norm.bias.data = regroup(norm.weight, 0), regroup(norm.bias, 0)
        steps.append(Stem(regrouped(fold_patches(conv, (True, True))), norm, first))
        blocks = list(model.stages[0])
        for downsample, stage in zip(model.downsample_layers[1:], model.stages[1:], strict=True):
            blocks += [Downsample(*downsample, first), *stage]
    steps += [PairConvBlock(b, target) if isinstance(b, ConvBlock) else b for b in blocks]
    return FoldedConvNeXt(model, steps, target)


def regrouped(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that gives [s1 | a1 | s2 | a2] in place of [s | a]."""
    conv.weight.data = regroup(conv.weight, 0)
    if conv.bias is not None:
        conv.bias.data = regroup(conv.bias, 0)
    return conv
