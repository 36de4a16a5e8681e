"""Layers broken on purpose: the check must find each break, and name the layer that is broken.

Each break is applied to a small network with random parameters, to one layer in the middle of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import randomize_
from deit.verify import samples
from deit.verify.networks import NetworkCase, first_failure
from deit.verify.settings import Settings
from deit.verify.trace import Event, Trace

__all__ = ["BREAKS", "INTACT", "Break", "BreakResult", "apply_break", "intact_failure"]

SMALL = (64, 96)
VIT = NetworkCase("d2_deit_tiny_patch16_LS", "2 blocks", {"depth": 2}, SMALL)
MEAN = NetworkCase(
    "d2_deit_tiny_patch16_LS", "2 blocks, mean", {"depth": 2, "global_pool": "avg"}, SMALL
)
HYBRID = NetworkCase("hybrid_deit_tiny_patch16_LS", "4 blocks", {"depth": 4}, SMALL)
EARLY = NetworkCase("d2_inv_early_deit_tiny_patch16_LS", "4 blocks", {"depth": 4}, SMALL)
RESMLP = NetworkCase("resmlp_equi_d2_12", "2 blocks", {"depth": 2}, SMALL)
ISOTROPIC = NetworkCase(
    "d2_convnext_isotropic_small",
    "2 blocks, LayerScale",
    {"depth": 2, "layer_scale_init_value": 1e-6},
    SMALL,
)
CONVNEXT = NetworkCase("d2_convnext_tiny", "4 blocks", {"depths": (1, 1, 1, 1)}, SMALL)
INTACT = (VIT, MEAN, HYBRID, EARLY, RESMLP, ISOTROPIC, CONVNEXT)


@dataclass(frozen=True)
class Break:
    """`apply` breaks the layer `where` of a network, which is of type `kind`, in place."""

    kind: type[nn.Module]
    what: str
    case: NetworkCase
    where: str
    apply: Callable[[Any], None]


@dataclass(frozen=True)
class BreakResult:
    """`found`: the first event that fails; None if the break was not noticed."""

    broken: Break
    found: Event | None
    failures: list[str]


def apply_break(broken: Break, settings: Settings) -> BreakResult:
    """Break a layer and look for it."""
    network = randomize_(broken.case.build(), settings.seed)
    layer = network.get_submodule(broken.where)
    assert isinstance(layer, broken.kind), (broken, type(layer))
    broken.apply(layer)
    found = _first_failure(network, broken.case, settings)
    failures = []
    if found is None:
        failures.append("not noticed")
    elif found.culprit != broken.where:
        failures.append(f"broken is {broken.where or 'the network'}, blamed is {found}")
    return BreakResult(broken, found, failures)


def intact_failure(case: NetworkCase, settings: Settings) -> Event | None:
    """The same for a network that is not broken: nothing may be found."""
    return _first_failure(randomize_(case.build(), settings.seed), case, settings)


def _first_failure(network: nn.Module, case: NetworkCase, settings: Settings) -> Event | None:
    images = samples.images(settings.count, case.img_size, settings.seed)
    batch = torch.cat([images, images.flip(-1)]).to(settings.device, settings.dtype)
    network = network.to(settings.device, settings.dtype).eval()
    with torch.no_grad(), settings.autocast(), Trace(network) as trace:
        network(batch)
    return first_failure(trace.events, settings.tolerance())


# ways of breaking


def _noise(like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _shift(method: str) -> Callable[[nn.Module], None]:
    """Add random numbers to what a method returns, the same for all images."""

    def apply(module: nn.Module) -> None:
        original = getattr(module, method)

        def shifted(*args: Any) -> Tensor:
            value = original(*args)
            return value + 0.2 * _noise(value[:1] if value.ndim > 2 else value)

        setattr(module, method, shifted)

    return apply


def _reversed_channels(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x.flip(-1))


def _identity(module: nn.Module) -> None:
    module.forward = lambda x: x


def _asymmetric_bias(linear: L.Linear) -> None:
    weight = linear.blocks()[1].weight
    linear.blocks()[1].bias = nn.Parameter(0.2 * _noise(weight[:, 0].flatten()))


def _swapped_irreps(linear: L.Linear) -> None:
    original = linear.map
    linear.map = lambda parts, **gains: original([parts[1], parts[0]], **gains)


def _shifted_parts(linear: L.Linear) -> None:
    original = linear.map
    linear.map = lambda parts, **gains: [y + 0.2 * _noise(y[0]) for y in original(parts, **gains)]


def _common_mean(norm: L.LayerNorm) -> None:
    norm.centre = lambda x: x - x.mean(-1, keepdim=True)


def _act_on_irreps(gelu: L.GELU) -> None:
    gelu.map = lambda parts: [gelu.act(part) for part in parts]


def _crossed_logits(attention: L.Attention) -> None:
    original = attention.split_heads

    def crossed(parts: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = original(parts)
        return q, torch.cat(k.chunk(2, -1)[::-1], -1), v

    attention.split_heads = crossed


def _unmirrored(module: L.MirrorConv2d) -> None:
    original = module.kernel
    kernel = _noise(original()[0])
    kernel = kernel / kernel[0].numel() ** 0.5
    module.kernel = lambda: (kernel.to(next(module.parameters())), original()[1])


class RowMajor(L.MirrorGrid):
    """Forgets to mirror the right half."""

    def to_mirror_order(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def _row_major(patches: L.PatchEmbed) -> None:
    patches.grid = RowMajor(patches.grid.height, patches.grid.width)


def _left_half(network: nn.Module) -> None:
    network.pool = lambda x: x[:, : x.shape[1] // 2].mean(1)


def _unmirrored_depthwise(conv: L.MirrorDepthwiseConv2d) -> None:
    part = conv.sym_to_sym
    kernel = _noise(part()[0]) / 7
    part.forward = lambda: (kernel.to(part.weight), part.bias)


def _filled_centre(conv: L.MirrorDepthwiseConv2d) -> None:
    conv.asym_to_sym.zero_center.copy_(0.2 * _noise(conv.asym_to_sym.zero_center))


def _wrong_sign(conv: L.MirrorConv2d) -> None:
    part = conv.sym_to_asym
    part.forward = lambda: (torch.cat([part.weight, part.weight.flip(-1)], -1), part.bias)


BREAKS = (
    Break(L.PatchEmbed, "kernel not mirrored", VIT, "patch_embed", _unmirrored),
    Break(L.PatchEmbed, "right half of the tokens not mirrored", VIT, "patch_embed", _row_major),
    Break(L.PositionEmbedding, "not symmetric", VIT, "pos_embed", _shift("packed")),
    Break(L.PrefixToken, "antisymmetric half not zero", VIT, "cls_token", _shift("forward")),
    Break(L.LayerNorm, "one mean for both halves", VIT, "blocks.1.norm1", _common_mean),
    Break(L.Affine, "shift on the antisymmetric half", VIT, "blocks.1.norm2.scaling",
          _shift("offset")),
    Break(L.Linear, "bias on the antisymmetric half", VIT, "blocks.1.attn.qkv", _asymmetric_bias),
    Break(L.Linear, "irreps swapped", VIT, "blocks.1.attn.proj", _swapped_irreps),
    Break(L.Attention, "logits of q_s and k_a", VIT, "blocks.1.attn", _crossed_logits),
    Break(L.GELU, "applied to the halves", VIT, "blocks.1.mlp.act", _act_on_irreps),
    Break(L.Mlp, "halves exchanged", VIT, "blocks.1.mlp", _reversed_channels),
    Break(L.Block, "halves exchanged", VIT, "blocks.1", _reversed_channels),
    Break(nn.Module, "mean over the left half", MEAN, "", _left_half),
    Break(L.RegularBridge, "left out", HYBRID, "bridge", _identity),
    Break(L.InvariantBridge, "left out", EARLY, "bridge", _identity),
    Break(L.OrdinaryBlock, "output depends on the place", EARLY, "blocks.2", _shift("forward")),
    Break(L.Linear, "over tokens: irreps swapped", RESMLP, "blocks.1.attn", _swapped_irreps),
    Break(L.Linear, "bias on all four parts", RESMLP, "blocks.1.mlp.fc1", _shifted_parts),
    Break(L.Affine, "shift on all four parts", RESMLP, "blocks.1.norm1", _shift("offset")),
    Break(L.GELU, "applied to the four parts", RESMLP, "blocks.1.mlp.act", _act_on_irreps),
    Break(L.LayerScale, "with a shift", RESMLP, "blocks.1.gamma_1", _shift("forward")),
    Break(L.MixerBlock, "halves exchanged", RESMLP, "blocks.1", _reversed_channels),
    Break(L.MirrorConv2d, "bias on the antisymmetric half", ISOTROPIC, "stem", _shift("bias")),
    Break(L.MirrorDepthwiseConv2d, "kernel not mirrored", ISOTROPIC, "blocks.1.dwconv",
          _unmirrored_depthwise),
    Break(L.MirrorDepthwiseConv2d, "centre column of an antisymmetric kernel not zero", ISOTROPIC,
          "blocks.1.dwconv", _filled_centre),
    Break(L.ConvBlock, "halves exchanged", ISOTROPIC, "blocks.1", _reversed_channels),
    Break(L.ChannelsLastMirrorConv2d, "kernel not mirrored", CONVNEXT, "downsample_layers.1.1",
          _unmirrored),
    Break(L.ChannelsLastMirrorConv2d, "symmetric kernel from s to a", CONVNEXT,
          "downsample_layers.2.1", _wrong_sign),
)  # fmt: skip
