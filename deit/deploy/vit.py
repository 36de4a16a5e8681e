"""Folding of vision transformers: equivariant, hybrid and invariant-early.

Attention does not care for the order of tokens, so they stay row-major: the patch embedding is one
ordinary convolution, and the position embedding is put into that order once, sign included.

Where nothing but norms reads the residual stream, its two halves are centred by what writes to
them. After a regular bridge the mean of s is one number added to all channels, which every later
LayerNorm removes, so s is centred there too; the mean of a is not removed, and an invariant bridge
needs both.
"""

from __future__ import annotations

import copy
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.deploy.pair import Pair, PairMlp, PairNorm, Target, fold_butterfly
from deit.deploy.weights import convolution, exact, fill, linear_pair
from deit.layers import Attention, Block, LayerNorm, MirrorConv2d, RegularBridge, tracing
from deit.layers.tokens import whole
from deit.models import VisionTransformer

__all__ = ["FoldedVisionTransformer"]


class PairAttention(nn.Module):
    """Self-attention of a pair; scale and mixer are folded into the queries.

    For PyTorch one product makes queries, keys and values of a part, and the heads are joined for
    fused attention. ONNX Runtime copies where PyTorch takes views, so there each has a product of
    its own, and the values of s and a are averaged apart.
    """

    def __init__(self, attn: Attention, norm: LayerNorm, rows: list[Tensor], target: Target):
        super().__init__()
        self.num_heads = attn.num_heads
        self.target = target
        mixer = [1.0, 1.0] if attn.attn_mixer is None else exact(attn.attn_mixer).tolist()
        for name, w, alpha, beta, m in zip(
            "sa", linear_pair(attn.qkv), *scales(norm), mixer, strict=True
        ):
            w = w.reading(alpha, beta)
            width = w.weight.shape[0] // 3
            factors = torch.ones(3, width, dtype=torch.float64)
            factors[0] *= attn.scale * m
            w = w.times(factors.flatten())
            if target == "torch":
                self.add_module(f"qkv_{name}", w.linear())
            else:
                for i, kind in enumerate("qkv"):
                    part = w.rows(slice(i * width, (i + 1) * width))
                    self.add_module(f"{kind}_{name}", part.linear())
        self.proj_s, self.proj_a = (
            w.times(gamma).centred(centre).linear()
            for w, (gamma, centre) in zip(linear_pair(attn.proj), rows, strict=True)
        )

    def forward(self, x: Pair) -> Pair:
        s, a = x
        if self.target == "torch":
            s, a = self._fused(self.qkv_s(s), self.qkv_a(a))
        else:
            s, a = self._explicit(s, a)
        return self.proj_s(s), self.proj_a(a)

    def _fused(self, s: Tensor, a: Tensor) -> Pair:
        shape = (3, self.num_heads, -1)
        qkv = torch.cat([s.unflatten(-1, shape), a.unflatten(-1, shape)], -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=1.0).transpose(1, 2)
        half = y.shape[-1] // 2
        return y[..., :half].flatten(2), y[..., half:].flatten(2)

    def _explicit(self, s: Tensor, a: Tensor) -> Pair:
        shape = (self.num_heads, -1)
        q = torch.cat([self.q_s(s).unflatten(-1, shape), self.q_a(a).unflatten(-1, shape)], -1)
        k = torch.cat([self.k_s(s).unflatten(-1, shape), self.k_a(a).unflatten(-1, shape)], -1)
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
        values = [self.v_s(s), self.v_a(a)]
        s, a = (
            (weights @ v.unflatten(-1, shape).transpose(1, 2)).transpose(1, 2).flatten(2)
            for v in values
        )
        return s, a


class PairBlock(nn.Module):
    """A transformer block of a pair (B, N, C/2) with its scales and shifts folded."""

    def __init__(self, block: Block, centred: tuple[bool, bool], target: Target):
        super().__init__()
        centre = tuple(not c for c in centred)
        self.norm1 = PairNorm(block.norm1.eps, centre)
        gammas = [gamma_of(block.gamma_1), gamma_of(block.gamma_2)]
        self.attn = PairAttention(
            block.attn, block.norm1, list(zip(gammas[0], centred, strict=True)), target
        )
        self.norm2 = PairNorm(block.norm2.eps, centre)
        first = [
            w.reading(alpha, beta)
            for w, alpha, beta in zip(linear_pair(block.mlp.fc1), *scales(block.norm2), strict=True)
        ]
        second = [
            w.times(gamma).centred(c)
            for w, gamma, c in zip(linear_pair(block.mlp.fc2), gammas[1], centred, strict=True)
        ]
        self.mlp = PairMlp(*fold_butterfly(first, second), nn.GELU())

    def forward(self, x: Pair) -> Pair:
        s, a = x
        ys, ya = self.attn(self.norm1((s, a)))
        s, a = s + ys, a + ya
        ys, ya = self.mlp(self.norm2((s, a)))
        return s + ys, a + ya


class Positions(nn.Module):
    """A position embedding (1, N, C) of row-major tokens; resampled for other grids if `dynamic`.

    Resampling starts from what the network has, and centres after it, as the network's norms do.
    """

    def __init__(self, model: VisionTransformer, centred: tuple[bool, bool]):
        super().__init__()
        own = model.pos_embed
        grid = own.grid
        parts = whole(*(exact(own.get_parameter(name)) for name in "01"), grid)
        image = grid.to_image_order(torch.cat(parts, -1))  # (1, height, width, C)
        self.grid, self.centred = (grid.height, grid.width), centred
        self.register_buffer("embedding", centre_halves(image, self.centred, -1).flatten(1, 2))
        self.register_buffer("image", image if model.dynamic_img_size else None)

    def forward(self, height: int, width: int) -> Tensor:
        if self.image is None or (height, width) == self.grid:
            return self.embedding
        image = self.image.float().permute(0, 3, 1, 2)
        image = F.interpolate(image, (height, width), mode="bicubic", antialias=True)
        image = image.to(self.image.dtype).permute(0, 2, 3, 1)
        # only the left half is kept, and mirrored with its sign
        left = image[:, :, : (width + 1) // 2]
        s, a = left.chunk(2, -1)
        if width % 2:
            a = torch.cat([a[:, :, :-1], torch.zeros_like(a[:, :, -1:])], 2)
        right = torch.cat([s, -a], -1)[:, :, : width // 2].flip(2)
        image = torch.cat([torch.cat([s, a], -1), right], 2)
        return centre_halves(image, self.centred, -1).flatten(1, 2)


class FoldedVisionTransformer(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or what the network's head gives.

    Of standard layers and operations; for inference alone.

    Raises:
        ValueError: in `forward`, for images of another size than that of the network.
    """

    def __init__(self, model: VisionTransformer, target: Target):
        super().__init__()
        # what the last norm and the blocks after the bridge are told apart by is removed by them
        removed = isinstance(model.norm, (nn.LayerNorm, LayerNorm))
        if model.bridge is None:
            centred = (removed, removed)
        else:
            centred = (removed and isinstance(model.bridge, RegularBridge), False)
        self.num_classes = model.num_classes
        self.img_size = None if model.dynamic_img_size else model.patch_embed.img_size
        self.patch_size = model.patch_embed.patch_size
        self.global_pool, self.num_prefix_tokens = model.global_pool, model.num_prefix_tokens

        self.patch_embed = fold_patches(model.patch_embed, centred)
        self.positions = Positions(model, centred)
        self.register_buffer("prefix", fold_prefix(model, centred))
        blocks = list(model.blocks)
        self.pairs = nn.Sequential(
            *(PairBlock(block, centred, target) for block in blocks if isinstance(block, Block))
        )
        self.bridge = None
        if model.bridge is not None:
            self.bridge = "regular" if isinstance(model.bridge, RegularBridge) else "invariant"
        self.blocks = nn.Sequential(
            *(copy.deepcopy(block) for block in blocks if not isinstance(block, Block))
        )
        self.absolute = model.invariants is not None
        self.norm = fold_last_norm(model.norm)
        self.head = copy.deepcopy(model.head)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2], images.shape[-1]
        if self.img_size is not None:
            tracing.check_image_size(height, width, *self.img_size)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = x + self.positions(height // self.patch_size[0], width // self.patch_size[1])
        if self.prefix is not None:
            # the size as one tuple, for symbolic tracers
            x = torch.cat([self.prefix.expand((x.shape[0], -1, -1)), x], 1)
        half = x.shape[-1] // 2
        s, a = self.pairs((x[..., :half].contiguous(), x[..., half:].contiguous()))
        if self.bridge == "regular":
            x = self.blocks(torch.cat([s + a, s - a], -1) * sqrt(0.5))
        elif self.bridge == "invariant":
            x = self.blocks(torch.cat([s, a.abs()], -1))
        else:
            x = None
        if self.global_pool == "token":  # the head sees no other token
            s, a, x = s[:, 0], a[:, 0], x if x is None else x[:, 0]
        if x is None:
            x = self.norm(torch.cat([s, a], -1))
            s, a = x[..., :half], x[..., half:]
            x = torch.cat([s, a.abs()], -1) if self.absolute else s
        else:
            x = self.norm(x)
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        return self.head(x)


def scales(norm: LayerNorm) -> tuple[list[Tensor], list[Tensor | None]]:
    """The scales of s and a, and their shifts."""
    affine = norm.scaling
    return [exact(affine.alpha_sym), exact(affine.alpha_asym)], [exact(affine.beta), None]


def gamma_of(gamma: nn.Module) -> list[Tensor]:
    """LayerScale's factors for s and a."""
    return [exact(gamma.alpha_sym), exact(gamma.alpha_asym)]


def centre_halves(x: Tensor, centred: tuple[bool, bool], dim: int) -> Tensor:
    """[s | a] along `dim`, each minus its mean over it where that is wanted."""
    parts = [
        part - part.mean(dim, keepdim=True) if centre else part
        for part, centre in zip(x.chunk(2, dim), centred, strict=True)
    ]
    return torch.cat(parts, dim)


def fold_patches(layer: MirrorConv2d, centred: tuple[bool, bool] = (False, False)) -> nn.Conv2d:
    """A convolution of an image as one ordinary one, which gives [s | a], (B, C, h, w)."""
    kernel, bias = layer.kernel()
    kernel = centre_halves(exact(kernel) * layer.scale, centred, 0)
    if bias is not None:
        bias = centre_halves(exact(bias) * layer.scale, centred, 0)
    return convolution(kernel, bias, layer.stride, layer.padding)


def fold_prefix(model: VisionTransformer, centred: tuple[bool, bool]) -> Tensor | None:
    """Class and register tokens, (1, count, C); None if there are none."""
    tokens = [t for t in (model.cls_token, model.reg_token) if t is not None]
    if not tokens:
        return None
    tokens = torch.cat([torch.cat([exact(part) for part in t(1)], -1) for t in tokens], 1)
    return centre_halves(tokens, centred, -1)


def fold_last_norm(norm: nn.Module) -> nn.Module:
    """The norm before the head: of features in parts, the ordinary one of [s | a]."""
    if not isinstance(norm, LayerNorm):
        return copy.deepcopy(norm)
    # both halves have mean zero, so that their joint variance is half the sum of theirs
    layer = nn.LayerNorm(norm.rep.size, norm.eps / 2, device="meta")
    (alpha_s, alpha_a), (beta, _) = scales(norm)
    return fill(layer, torch.cat([alpha_s, alpha_a]), torch.cat([beta, torch.zeros_like(beta)]))
