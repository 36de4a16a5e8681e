"""Layers broken on purpose: the check must find each break, and name the layer that is broken.

Each break is applied to one layer, in the middle of a small network with random parameters or, for
what happens on rare paths alone, to the layer case that takes this path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import Feature, map_parts, randomize_
from deit.verify.check import Case, Settings, check
from deit.verify.layers import LAYER_CASES
from deit.verify.networks import SCALED, SMALL, network_case

VIT = network_case("d2_deit_tiny_patch16_LS", "2 blocks", SMALL, depth=2)
MEAN = network_case(VIT.name, "2 blocks, mean", SMALL, depth=2, global_pool="avg")
HYBRID = network_case("hybrid_deit_tiny_patch16_LS", "4 blocks", SMALL, depth=4)
EARLY = network_case("d2_inv_early_deit_tiny_patch16_LS", "4 blocks", SMALL, depth=4)
RESMLP = network_case("resmlp_equi_d2_12", "2 blocks", SMALL, depth=2)
ISOTROPIC = network_case(
    "d2_convnext_isotropic_small", "2 blocks, LayerScale", SMALL, depth=2, **SCALED
)
CONVNEXT = network_case("d2_convnext_tiny", "4 blocks", SMALL, depths=(1, 1, 1, 1))
INTACT = (VIT, MEAN, HYBRID, EARLY, RESMLP, ISOTROPIC, CONVNEXT)
LAYERS = {str(case): case for case in LAYER_CASES}


@dataclass(frozen=True)
class Mutation:
    """Calls `change(original, ...)` in place of a `method` of the layer `where` of a case.

    Attributes:
        kind: type of this layer.
        in_training: the forward pass in inference is right, and no layer can be named.
    """

    kind: type[nn.Module]
    what: str
    case: Case
    where: str
    change: Callable[..., Any]
    method: str = "forward"
    in_training: bool = False

    def __str__(self) -> str:
        return f"{self.kind.__name__}, {self.what}"


def find(mutation: Mutation, settings: Settings) -> tuple[str, float | None, list[str]]:
    """Break a layer and look for it.

    Returns:
        The first feature that fails, or what training shows; its error; what is wrong with that.
    """
    network = randomize_(mutation.case.build(), settings.seed)
    layer = network.get_submodule(mutation.where)
    if not isinstance(layer, mutation.kind):
        raise TypeError(f"{mutation}: {mutation.where} is a {type(layer).__name__}")
    original = getattr(layer, mutation.method)
    setattr(layer, mutation.method, partial(mutation.change, original))
    features_only = not mutation.in_training
    result = check(replace(mutation.case, trained=network), settings, features_only)
    if event := result.culprit:
        blamed = features_only and event.culprit == mutation.where
        wrong = f"broken is {mutation.where or 'the whole'}, blamed is {event}"
        return str(event), event.measurement.error, [] if blamed else [wrong]
    for failure in result.failures:
        if failure.startswith("gradients"):
            return failure.split(":")[0], result.gradient, []
    return "nothing", None, ["not noticed"]


# ways of breaking


def noise(like: Tensor, size: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def after(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Change what is returned."""
    return lambda original, *args: change(original(*args))


def last(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Change the last part of what is returned."""
    return after(lambda x: (*x[:-1], change(x[-1])))


def kernel(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Change the kernel, and not the bias that comes with it."""
    return after(lambda both: (change(both[0]), both[1]))


def exchanged(original: Callable[..., Any], x: Feature) -> Any:
    return original(x[::-1])


def left_out(_: Any, x: Feature) -> Tensor:
    return torch.cat(x, -1)


def shifted(x: Feature) -> Feature:
    """A shift of all channels, the same at all places."""
    return map_parts(lambda part: part + noise(part.flatten(0, -2)[0]), x)


def by_place(x: Feature) -> Feature:
    """A shift of its own for each place, the same for all images."""
    return map_parts(lambda part: part + noise(part[:1], 1.0), x)


def random(weight: Tensor) -> Tensor:
    return noise(weight, weight[0].numel() ** -0.5)


def filled_centre(kernel: Tensor) -> Tensor:
    kernel, middle = kernel.clone(), kernel.shape[-1] // 2
    kernel[..., middle] = noise(kernel[..., middle])
    return kernel


def row_major(embed: Any, x: Tensor) -> Feature:
    return map_parts(lambda part: embed.__self__.grid.to_image_order(part).flatten(1, 2), embed(x))


def common_mean(norm: Any, x: Feature) -> Feature:
    mean = torch.cat(x, -1).mean(-1, keepdim=True)
    centred = [part - mean for part in x]
    variance = sum(part.square().mean(-1, keepdim=True) for part in centred)
    rstd = torch.rsqrt((variance + norm.__self__.eps) / 2)
    return norm.__self__.scaling(tuple(part * rstd for part in centred))


def half_exchanged(linear: Any, x: Feature) -> Feature:
    (p, q), (u, v) = (part.chunk(2, 1) for part in x)
    return linear((torch.cat([p, v], 1), torch.cat([u, q], 1)))


def on_sums(gelu: Any, x: Feature) -> Feature:
    """Acts on the sums and differences of the mirrored places in place of the places."""
    act = gelu.__self__.act

    def change(part: Tensor) -> Tensor:
        left, right = part.chunk(2, 1)
        sums, differences = act(left + right), act(left - right)
        return torch.cat([sums + differences, sums - differences], 1)

    return map_parts(change, x)


def crossed(heads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads
    return q, torch.cat(k.chunk(2, -1)[::-1], -1), v


def shift_everywhere(linear: Any, x: Feature) -> Feature:
    linear.__self__.unshifted = None
    return linear(x)


def wrong_backward(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient + 0.5 * gradient.abs())
    return x


def drop_tokens(drop: Any, x: Feature) -> Feature:
    if not drop.__self__.training:
        return x
    return map_parts(lambda part: part * torch.full_like(part[..., :1], 0.5).bernoulli(), x)


MUTATIONS = (
    Mutation(L.PatchEmbed, "kernel not mirrored", VIT, "patch_embed", kernel(random), "kernel"),
    Mutation(L.PatchEmbed, "right half of the tokens not mirrored", VIT, "patch_embed", row_major),
    Mutation(L.PositionEmbedding, "not symmetric", VIT, "pos_embed", after(by_place)),
    Mutation(L.PrefixToken, "antisymmetric half not zero", VIT, "cls_token", after(shifted)),
    Mutation(L.LayerNorm, "one mean for both halves", VIT, "blocks.1.norm1", common_mean),
    Mutation(L.Affine, "shift on the antisymmetric half", VIT, "blocks.1.norm2.scaling",
             last(shifted)),
    Mutation(L.Linear, "bias on the antisymmetric half", VIT, "blocks.1.attn.qkv", last(shifted)),
    Mutation(L.Linear, "irreps swapped", VIT, "blocks.1.attn.proj", exchanged),
    Mutation(L.Linear, "wrong without gradients", VIT, "blocks.1.mlp.fc1",
             last(lambda a: a if torch.is_grad_enabled() else a + 0.1)),
    Mutation(L.Linear, "wrong with gradients", LAYERS["Linear"], "",
             last(lambda a: a + 0.5 if torch.is_grad_enabled() else a), in_training=True),
    Mutation(L.Linear, "antisymmetric half dead", VIT, "blocks.1.mlp.fc2", last(lambda a: 0 * a)),
    Mutation(L.Attention, "logits of q_s and k_a", VIT, "blocks.1.attn", after(crossed),
             "split_heads"),
    Mutation(L.Attention, "logits of q_s and k_a, mixer", LAYERS["Attention, mixer"], "",
             after(crossed), "split_heads"),
    Mutation(L.GELU, "applied to the halves", VIT, "blocks.1.mlp.act",
             lambda gelu, x: map_parts(gelu.__self__.act, x)),
    Mutation(L.GELU, "not a number", VIT, "blocks.1.mlp.act", last(lambda a: a * float("nan"))),
    Mutation(L.Mlp, "halves exchanged", VIT, "blocks.1.mlp", exchanged),
    Mutation(L.Block, "halves exchanged", VIT, "blocks.1", exchanged),
    Mutation(L.DropPath, "tokens dropped by themselves", LAYERS["Block, stochastic depth"],
             "drop_path1", drop_tokens, in_training=True),
    Mutation(L.LayerNorm, "wrong backward pass", LAYERS["LayerNorm"], "", last(wrong_backward),
             in_training=True),
    Mutation(nn.Module, "mean over the left half", MEAN, "",
             lambda _, x: x[:, : x.shape[1] // 2].mean(1), "pool"),
    Mutation(L.RegularBridge, "left out", HYBRID, "bridge", left_out),
    Mutation(L.InvariantBridge, "left out", EARLY, "bridge", left_out),
    Mutation(L.OrdinaryBlock, "output depends on the place", EARLY, "blocks.2", after(by_place)),
    Mutation(L.Linear, "over tokens: irreps swapped on half of the channels", RESMLP,
             "blocks.1.attn", half_exchanged),
    Mutation(L.Linear, "bias on all four parts", RESMLP, "blocks.1.mlp.fc1", after(by_place)),
    Mutation(L.Linear, "shift on the antisymmetric half of a middle column",
             LAYERS["MixerBlock, decomposed tokens, odd"], "mlp.fc1", shift_everywhere),
    Mutation(L.Affine, "shift on all four parts", RESMLP, "blocks.1.norm1", after(shifted)),
    Mutation(L.GELU, "applied to the four parts", RESMLP, "blocks.1.mlp.act", on_sums),
    Mutation(L.LayerScale, "with a shift", RESMLP, "blocks.1.gamma_1", after(shifted)),
    Mutation(L.MixerBlock, "halves exchanged", RESMLP, "blocks.1", exchanged),
    Mutation(L.MirrorConv2d, "bias on the antisymmetric half", ISOTROPIC, "stem", last(shifted)),
    Mutation(L.MirrorDepthwiseConv2d, "kernels exchanged", ISOTROPIC, "blocks.1.dwconv",
             lambda convolve, x, kernels: convolve(x, kernels[::-1]), "_convolve"),
    Mutation(L.MirrorKernel, "not mirrored", ISOTROPIC, "blocks.1.dwconv.sym_to_sym",
             kernel(random)),
    Mutation(L.MirrorKernel, "centre column of an antisymmetric one not zero", ISOTROPIC,
             "blocks.1.dwconv.asym_to_sym", kernel(filled_centre)),
    Mutation(L.MirrorKernel, "wrong sign, odd width", LAYERS["MirrorConv2d, 3x3, padded"],
             "asym_to_sym", kernel(torch.abs)),
    Mutation(L.ConvBlock, "halves exchanged", ISOTROPIC, "blocks.1", exchanged),
    Mutation(L.MirrorConv2d, "kernel not mirrored", CONVNEXT, "downsample_layers.1.1",
             kernel(random), "kernel"),
    Mutation(L.MirrorKernel, "symmetric from s to a", CONVNEXT, "downsample_layers.2.1.sym_to_asym",
             kernel(lambda whole: torch.cat([whole[..., :1], whole[..., :1]], -1))),
    Mutation(L.PatchEmbed, "tokens of an odd grid not mirrored", LAYERS["PatchEmbed, odd grid"],
             "", row_major),
)  # fmt: skip
