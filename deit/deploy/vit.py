"""Folding of vision transformers: equivariant, hybrid and invariant-early.

Attention does not care for the order of tokens, so they stay row-major: the patch embedding is one
ordinary convolution, and the position embedding is put into that order once, sign included.

Where nothing but norms reads the residual stream, its two halves are centred by what writes to
them. After a regular bridge the mean of s is one number added to all channels, which every later
LayerNorm removes, so s is centred there too. The mean of a is not removed, and an invariant bridge
needs both.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.deploy.pair import Each, Folded, PairNorm, Residual, RowMlp, Target
from deit.deploy.weights import BUTTERFLY, Map, Pair, affine_maps, convolution, exact, fill, linear
from deit.layers import Block, LayerNorm, MirrorConv2d, RegularBridge, tracing
from deit.layers.tokens import MirrorGrid, resample, whole
from deit.models import VisionTransformer

Centred = tuple[bool, bool]


class PairAttention(nn.Module):
    """Self-attention of a pair; the queries are scaled already.

    For PyTorch one product makes queries, keys and values of a part, and the heads are joined for
    fused attention. ONNX Runtime copies where PyTorch takes views, so there each has a product of
    its own, and the values of s and a are averaged apart.
    """

    def __init__(self, qkv: Sequence[Map], proj: Sequence[Map], num_heads: int, target: Target):
        super().__init__()
        self.num_heads, self.fused = num_heads, target == "torch"
        if self.fused:
            self.qkv = Each(*map(linear, qkv))
        else:
            thirds = zip(*(part.chunk(3) for part in qkv), strict=True)
            self.q, self.k, self.v = (Each(*map(linear, third)) for third in thirds)
        self.proj = Each(*map(linear, proj))

    def forward(self, x: Pair) -> Pair:
        return self.proj(self._fused(x) if self.fused else self._explicit(x))

    def _fused(self, x: Pair) -> Pair:
        qkv = [part.unflatten(-1, (3, self.num_heads, -1)) for part in self.qkv(x)]
        qkv = torch.cat(qkv, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=1.0).transpose(1, 2)
        half = y.shape[-1] // 2
        return y[..., :half].flatten(2), y[..., half:].flatten(2)

    def _explicit(self, x: Pair) -> Pair:
        q, k, v = (
            [part.unflatten(-1, (self.num_heads, -1)) for part in layer(x)]
            for layer in (self.q, self.k, self.v)
        )
        q, k = torch.cat(q, -1), torch.cat(k, -1)
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
        return tuple((weights @ part.transpose(1, 2)).transpose(1, 2).flatten(2) for part in v)


class Positions(nn.Module):
    """A position embedding (1, N, C) of row-major tokens; resampled for other grids if `dynamic`.

    Resampling starts from what the network has, and centres after it, as the network's norms do.
    """

    def __init__(self, model: VisionTransformer, centred: Centred):
        super().__init__()
        self.grid, self.centred = model.pos_embed.grid, centred
        halves = [exact(model.pos_embed.get_parameter(name)) for name in "01"]
        self.register_buffer("embedding", self._row_major(*halves, self.grid))
        for name, half in zip(("sym", "asym"), halves, strict=True):
            self.register_buffer(name, half if model.dynamic_img_size else None)

    def forward(self, height: int, width: int) -> Tensor:
        if self.sym is None or (height, width) == (self.grid.height, self.grid.width):
            return self.embedding
        grid = MirrorGrid(height, width)
        return self._row_major(*resample(self.sym, self.asym, self.grid, grid), grid)

    def _row_major(self, sym: Tensor, asym: Tensor, grid: MirrorGrid) -> Tensor:
        image = grid.to_image_order(torch.cat(whole(sym, asym, grid), -1))
        return centre_halves(image, self.centred, -1).flatten(1, 2)


class FoldedVisionTransformer(Folded):
    """A folded `VisionTransformer`."""

    def __init__(self, model: VisionTransformer, target: Target):
        super().__init__(model)
        # what the last norm and the blocks after the bridge are told apart by is removed by them
        removed = isinstance(model.norm, (nn.LayerNorm, LayerNorm))
        centred = (removed, removed and model.bridge is None)
        if not isinstance(model.bridge, (RegularBridge, type(None))):
            centred = (False, False)
        self.img_size = None if model.dynamic_img_size else model.patch_embed.img_size
        self.patch_size = model.patch_embed.patch_size
        self.num_prefix_tokens = model.num_prefix_tokens

        self.patch_embed = fold_patches(model.patch_embed, centred)
        self.positions = Positions(model, centred)
        tokens = [exact(t)(1) for t in (model.cls_token, model.reg_token) if t is not None]
        prefix = [torch.cat(parts, -1) for parts in tokens]
        prefix = centre_halves(torch.cat(prefix, 1), centred, -1) if prefix else None
        self.register_buffer("prefix", prefix)
        pairs = (fold_block(b, centred, target) for b in model.blocks if isinstance(b, Block))
        self.pairs = nn.Sequential(*pairs)
        self.bridge, self.invariants, self.blocks = copy.deepcopy(
            (model.bridge, model.invariants, model.blocks[len(self.pairs) :])
        )
        self.norm = fold_last_norm(model.norm)

    def forward(self, images: Tensor) -> Tensor:
        tracing.check_images(images, self.in_chans)
        height, width = images.shape[-2], images.shape[-1]
        if self.img_size is not None:
            tracing.check_image_size(height, width, *self.img_size)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = x + self.positions(height // self.patch_size[0], width // self.patch_size[1])
        if self.prefix is not None:
            # the size as one tuple, for symbolic tracers
            x = torch.cat([self.prefix.expand((x.shape[0], -1, -1)), x], 1)
        half = x.shape[-1] // 2
        parts = self.pairs((x[..., :half].contiguous(), x[..., half:].contiguous()))
        if self.bridge is not None:
            parts = (self.blocks(self.bridge(parts)),)
        if self.global_pool == "token":  # the head sees no other token
            parts = [part[:, 0] for part in parts]
        x = self.norm(torch.cat(parts, -1) if self.bridge is None else parts[0])
        if self.bridge is None:
            s, a = x[..., :half], x[..., half:]
            x = s if self.invariants is None else self.invariants((s, a))
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        return self.head(x)


def fold_block(block: Block, centred: Centred, target: Target) -> nn.Sequential:
    """A transformer block of a pair (B, N, C/2) with its scales and shifts folded."""
    block = exact(block)
    centre = tuple(not wanted for wanted in centred)
    attn, mlp = block.attn, block.mlp
    mixer = (1.0, 1.0) if attn.attn_mixer is None else attn.attn_mixer

    def scale_queries(x: Pair) -> Pair:
        parts = [part.chunk(3, -1) for part in x]
        return tuple(
            torch.cat([q * (attn.scale * factor), k, v], -1)
            for (q, k, v), factor in zip(parts, mixer, strict=True)
        )

    def written(x: Pair) -> Pair:
        return tuple(centre_halves(torch.cat(x, -1), centred, -1).chunk(2, -1))

    qkv = affine_maps(block.norm1.scaling, attn.qkv, scale_queries)
    proj = affine_maps(nn.Identity(), attn.proj, lambda x: written(block.gamma_1(x)))
    first = affine_maps(block.norm2.scaling, mlp.fc1, BUTTERFLY)
    second = affine_maps(BUTTERFLY, mlp.fc2, lambda x: written(block.gamma_2(x)))
    return nn.Sequential(
        Residual(
            PairNorm(block.norm1.eps, centre), PairAttention(qkv, proj, attn.num_heads, target)
        ),
        Residual(PairNorm(block.norm2.eps, centre), RowMlp(first, nn.GELU(), second)),
    )


def centre_halves(x: Tensor, centred: Centred, dim: int) -> Tensor:
    """[s | a] along `dim`, each minus its mean over it where that is wanted."""
    parts = [
        part - part.mean(dim, keepdim=True) if centre else part
        for part, centre in zip(x.chunk(2, dim), centred, strict=True)
    ]
    return torch.cat(parts, dim)


def fold_patches(layer: MirrorConv2d, centred: Centred = (False, False)) -> nn.Conv2d:
    """A convolution of an image as one ordinary one, which gives [s | a], (B, C, h, w)."""
    kernel, bias = layer.kernel()
    kernel = centre_halves(exact(kernel) * layer.scale, centred, 0)
    if bias is not None:
        bias = centre_halves(exact(bias) * layer.scale, centred, 0)
    return convolution(kernel, bias, stride=layer.stride, padding=layer.padding)


def fold_last_norm(norm: nn.Module) -> nn.Module:
    """The norm before the head: of features in parts, the ordinary one of [s | a]."""
    if not isinstance(norm, LayerNorm):
        return copy.deepcopy(norm)
    # both halves have mean zero, so that their joint variance is half the sum of theirs
    layer = nn.LayerNorm(norm.rep.size, norm.eps / 2, device="meta")
    affine = exact(norm.scaling)
    beta = torch.cat([affine.beta, torch.zeros_like(affine.beta)])
    return fill(layer, torch.cat([affine.alpha_sym, affine.alpha_asym]), beta)
