r"""FLOPs in closed form: what the architectures need by the arithmetic of their definition.

The convention is that of `deit.measure.flops`, but nothing is run or traced, so the two check
each other, and this one works where fvcore is not installed. For an ordinary transformer of width
C, with T tokens and h heads, a block costs

    12 T C^2 + 2 T^2 C + 5 h T^2 + (2 * 5 + 1 + 8 * 4 + 2 + 2) T C :

linear maps, attention's two products, softmax; two layer norms, the scaling of the queries, GELU on
4 C channels, LayerScale and residual sums. An equivariant one has half the linear maps, and instead
more for each element of a layer norm (each part is centred by itself, and half of them is shifted)
and of a GELU (to the regular basis and back, a sum and a factor each).
"""

from __future__ import annotations

from math import prod

from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import nn

from deit.models.convnext import ConvNeXt, IsotropicConvNeXt
from deit.models.resmlp import OrdinaryResMLP, ResMLP
from deit.models.vit import OrdinaryVisionTransformer, VisionTransformer

__all__ = ["closed_form", "convnext", "resmlp", "transformer"]

CLASSES = 1000
COLOURS = 3

# for each element
SOFTMAX, GELU, QUICK_GELU, LAYER_NORM, AFFINE, LAYER_SCALE, RESIDUAL = 5, 8, 6, 5, 2, 1, 1
# what an equivariant layer adds: centring each part, a change of basis and back
CENTRE, BASES = 1.5, 4


def closed_form(model: nn.Module, img_size: int) -> float | None:
    """FLOPs of one square image by the formula of the network's family; None for other networks."""
    if isinstance(model, VisionTransformer | OrdinaryVisionTransformer):
        equivariant = getattr(model, "equivariant_depth", 0)
        return transformer(
            img_size,
            model.patch_embed.patch_size[0],
            model.embed_dim,
            len(model.blocks),
            model.blocks[0].attn.num_heads,
            equivariant_depth=equivariant,
            invariant_bridge=type(getattr(model, "bridge", None)).__name__ == "InvariantBridge",
        )
    if isinstance(model, ResMLP | OrdinaryResMLP):
        return resmlp(
            img_size,
            model.patch_embed.patch_size[0],
            model.embed_dim,
            len(model.blocks),
            equivariant=isinstance(model, ResMLP),
        )
    if isinstance(model, IsotropicConvNeXt):
        info, scaled = model.feature_info[0], model.blocks[0].gamma is not None
        depths, dims = [len(model.blocks)], [info["num_chs"]]
        return convnext(
            img_size, info["reduction"], depths, dims, scaled=scaled, equivariant=model.equivariant
        )
    if isinstance(model, ConvNeXt | TimmConvNeXt):
        own, info = isinstance(model, ConvNeXt), model.feature_info
        depths = [len(stage if own else stage.blocks) for stage in model.stages]
        dims = [stage["num_chs"] for stage in info]
        return convnext(
            img_size, info[0]["reduction"], depths, dims, equivariant=own, stem_norm=True
        )
    return None


def _stem(patches: int, patch: int, width: int) -> int:
    # mirrored kernels are as large as ordinary ones: only their parameters are halved
    return patches * COLOURS * patch**2 * width


def transformer(
    img_size: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    *,
    equivariant_depth: int = 0,
    invariant_bridge: bool = False,
) -> float:
    """A transformer whose first `equivariant_depth` blocks are equivariant; class token, MLP 4."""
    patches = (img_size // patch) ** 2
    tokens = patches + 1
    elements = tokens * width
    attention = 2 * tokens**2 * width + SOFTMAX * heads * tokens**2 + elements
    shared = attention + 2 * (LAYER_SCALE + RESIDUAL) * elements
    ordinary = 12 * width + 2 * LAYER_NORM + 4 * GELU
    equivariant = 6 * width + 2 * (LAYER_NORM + CENTRE) + 4 * (GELU + BASES)
    blocks = depth * shared + elements * (
        equivariant_depth * equivariant + (depth - equivariant_depth) * ordinary
    )
    bridge, norm, features = 0, LAYER_NORM, width
    if equivariant_depth == depth:
        norm, features = LAYER_NORM + CENTRE, width // 2
    elif equivariant_depth:
        # an absolute value of one half, or a sum and a factor each
        bridge = elements // 2 if invariant_bridge else 2 * elements
    stem = _stem(patches, patch, width) + patches * width  # and the position embedding
    return stem + blocks + bridge + norm * elements + features * CLASSES


def resmlp(img_size: int, patch: int, width: int, depth: int, *, equivariant: bool) -> float:
    """A ResMLP with MLP ratio 4. Equivariant ones halve both mixings: each has two blocks."""
    patches = (img_size // patch) ** 2
    elements = patches * width
    products = patches + 8 * width
    pointwise = 2 * (AFFINE + LAYER_SCALE + RESIDUAL)
    if equivariant:
        # changes of basis, and the three biases, which no multiply-add takes along
        products, activation = products / 2, QUICK_GELU + BASES
        pointwise += 1 + 4 + 1
    else:
        activation = GELU
    blocks = depth * elements * (products + pointwise + 4 * activation)
    head = 3 * elements + width * CLASSES  # affine and mean
    to_parts = 0
    if equivariant:
        head, to_parts = head / 2, 2 * elements
    return _stem(patches, patch, width) + to_parts + blocks + head


def convnext(
    img_size: int,
    patch: int,
    depths: list[int],
    dims: list[int],
    *,
    equivariant: bool,
    scaled: bool = True,
    stem_norm: bool = False,
) -> float:
    """A ConvNeXt with 7 x 7 depthwise convolutions and MLP ratio 4.

    Convolutions of equivariant ones cost as much as ordinary ones: between stages all four parts
    are there, and depthwise each channel has one kernel in both.
    """
    centre, bases = (CENTRE, BASES) if equivariant else (0, 0)
    norm = LAYER_NORM + centre
    flops = 0.0
    places = [(img_size // (patch * 2**stage)) ** 2 for stage in range(len(depths))]
    for stage, (area, depth, width) in enumerate(zip(places, depths, dims, strict=True)):
        if stage:
            before = dims[stage - 1]
            flops += norm * places[stage - 1] * before + 4 * area * before * width
        products = 49 + (4 if equivariant else 8) * width
        pointwise = norm + 4 * (GELU + bases) + RESIDUAL + LAYER_SCALE * scaled
        flops += depth * area * width * (products + pointwise)
    if stem_norm:
        flops += norm * places[0] * dims[0]
    features = dims[-1] // 2 if equivariant else dims[-1]
    pool = prod((places[-1], features))
    return flops + _stem(places[0], patch, dims[0]) + pool + (LAYER_NORM + CLASSES) * features
