"""Layers broken on purpose: the check must find each break, and name the layer that is broken.

Each break is applied to one layer, in the middle of a small network with random parameters or, for
what happens on rare paths alone, to the layer case that takes this path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath as TensorDropPath
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import Feature, as_parts, randomize_
from deit.verify.check import Case, check
from deit.verify.layers import LAYER_CASES, LayerCase
from deit.verify.networks import NetworkCase
from deit.verify.settings import Settings
from deit.verify.trace import Event

__all__ = ["INTACT", "MUTATIONS", "Mutation", "MutationResult", "apply_mutation", "intact_failure"]

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
class Mutation:
    """`apply` breaks the layer `where` of a case, which is of type `kind`, in place.

    `in_training`: the forward pass in inference is right, and no layer can be named.
    """

    kind: type[nn.Module]
    what: str
    case: Case
    where: str
    apply: Callable[[Any], None]
    in_training: bool = False

    def __str__(self) -> str:
        return f"{self.kind.__name__}, {self.what}"


@dataclass(frozen=True)
class MutationResult:
    """`found`: the first event that fails, or what training shows; None if nothing does."""

    found: Event | str | None
    error: float | None
    failures: list[str]


def apply_mutation(broken: Mutation, settings: Settings) -> MutationResult:
    """Break a layer and look for it."""
    network = randomize_(broken.case.build(), settings.seed)
    layer = network.get_submodule(broken.where)
    if not isinstance(layer, broken.kind):
        raise TypeError(f"{broken}: {broken.where} is a {type(layer).__name__}")
    broken.apply(layer)
    result = check(broken.case, settings, network, train=broken.in_training)
    event, where = result.culprit, broken.where or "the whole"
    if event is not None:
        blamed = event.culprit == broken.where and not broken.in_training
        wrong = [] if blamed else [f"broken is {where}, blamed is {event}"]
        return MutationResult(event, event.measurement.error, wrong)
    in_training = [failure for failure in result.failures if failure.startswith("gradients")]
    if broken.in_training and in_training:
        return MutationResult(in_training[0].split(":")[0], result.gradient, [])
    return MutationResult(None, None, ["not noticed"])


def intact_failure(case: Case, settings: Settings) -> Event | None:
    """The same for a network that is not broken: nothing may be found."""
    return check(case, settings, train=False).culprit


def _layer_case(name: str, variant: str) -> LayerCase:
    (case,) = (each for each in LAYER_CASES if (each.name, each.variant) == (name, variant))
    return case


# ways of breaking


def _noise(like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _after(change: Callable[[Any], Any], method: str = "forward") -> Callable[[nn.Module], None]:
    """Change what a method returns."""

    def apply(module: nn.Module) -> None:
        original = getattr(module, method)
        setattr(module, method, lambda *args: change(original(*args)))

    return apply


def _before(change: Callable[[Any], Any], method: str = "forward") -> Callable[[nn.Module], None]:
    """Change what a method is given."""

    def apply(module: nn.Module) -> None:
        original = getattr(module, method)
        setattr(module, method, lambda x, *args: original(change(x), *args))

    return apply


def _instead(function: Callable[..., Any], method: str = "forward") -> Callable[[nn.Module], None]:
    """Call `function(module, ...)` in place of a method."""
    return lambda module: setattr(module, method, lambda *args: function(module, *args))


def _shifted(x: Feature) -> Feature:
    """A shift of all channels, the same at all places; of a single tensor as well."""
    parts = tuple(part + _noise(part.flatten(0, -2)[0]) for part in as_parts(x))
    return parts if isinstance(x, tuple) else parts[0]


def _by_place(x: Feature) -> Feature:
    """A shift of its own for each place, the same for all images."""
    parts = tuple(part + 5 * _noise(part[:1]) for part in as_parts(x))
    return parts if isinstance(x, tuple) else parts[0]


def _exchanged(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x[::-1]


def _last(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Change the last part of the output."""
    return _after(lambda x: (*x[:-1], change(x[-1])))


def _asymmetric_bias(linear: L.Linear) -> None:
    weight = linear.blocks()[1].weight
    linear.blocks()[1].bias = nn.Parameter(_noise(weight[:, 0]))


def _half_exchanged(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (p, q), (u, v) = (part.chunk(2, 1) for part in x)
    return torch.cat([p, v], 1), torch.cat([u, q], 1)


def _common_mean(norm: L.LayerNorm) -> None:
    norm.centre = lambda part, dim: part
    _before(lambda x: tuple(p - torch.cat(x, -1).mean(-1, keepdim=True) for p in x))(norm)


def _act_on_sums(gelu: L.GELU, x: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Act on the sums and differences of the mirrored places in place of the places."""
    outputs = []
    for left, right in (part.chunk(2, 1) for part in x):
        sums, differences = gelu.act(left + right), gelu.act(left - right)
        outputs.append(torch.cat([sums + differences, sums - differences], 1))
    return tuple(outputs)


def _crossed(heads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads
    return q, torch.cat(k.chunk(2, -1)[::-1], -1), v


def _random(kernel: Tensor) -> Tensor:
    return 5 * _noise(kernel) / kernel[0].numel() ** 0.5


def _kernel(change: Callable[[Tensor], Tensor], method: str = "forward") -> Callable[..., None]:
    """Change the kernel, and not the bias that comes with it."""
    return _after(lambda both: (change(both[0]), both[1]), method)


class RowMajor(L.MirrorGrid):
    """Forgets to mirror the right half."""

    def to_mirror_order(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def _row_major(patches: L.PatchEmbed) -> None:
    patches.grid = RowMajor(patches.grid.height, patches.grid.width)


def _filled_centre(kernel: L.MirrorKernel) -> None:
    kernel.zero_center.copy_(_noise(kernel.zero_center))


class WrongBackward(torch.autograd.Function):
    """The identity, with a gradient that is not equivariant."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient + 0.5 * gradient.abs()


def _mask_of_tokens(drop: TensorDropPath, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not drop.training:
        return x
    return tuple(part * torch.bernoulli(torch.full_like(part[..., :1], 0.5)) for part in x)


def _drops_tokens(block: L.Block) -> None:
    _instead(_mask_of_tokens)(block.drop_path1)


MUTATIONS = (
    Mutation(L.PatchEmbed, "kernel not mirrored", VIT, "patch_embed",
             _kernel(_random, "kernel")),
    Mutation(L.PatchEmbed, "right half of the tokens not mirrored", VIT, "patch_embed", _row_major),
    Mutation(L.PositionEmbedding, "not symmetric", VIT, "pos_embed", _after(_by_place)),
    Mutation(L.PrefixToken, "antisymmetric half not zero", VIT, "cls_token", _after(_shifted)),
    Mutation(L.LayerNorm, "one mean for both halves", VIT, "blocks.1.norm1", _common_mean),
    Mutation(L.Affine, "shift on the antisymmetric half", VIT, "blocks.1.norm2.scaling",
             _after(_shifted)),
    Mutation(L.Linear, "bias on the antisymmetric half", VIT, "blocks.1.attn.qkv",
             _asymmetric_bias),
    Mutation(L.Linear, "irreps swapped", VIT, "blocks.1.attn.proj", _before(_exchanged)),
    Mutation(L.Linear, "wrong without gradients", VIT, "blocks.1.mlp.fc1",
             _last(lambda a: a if torch.is_grad_enabled() else a + 0.1)),
    Mutation(L.Linear, "wrong with gradients", _layer_case("Linear", ""), "",
             _last(lambda a: a + 0.5 if torch.is_grad_enabled() else a), in_training=True),
    Mutation(L.Linear, "antisymmetric half dead", VIT, "blocks.1.mlp.fc2", _last(lambda a: 0 * a)),
    Mutation(L.Attention, "logits of q_s and k_a", VIT, "blocks.1.attn",
             _after(_crossed, "split_heads")),
    Mutation(L.Attention, "logits of q_s and k_a, mixer", _layer_case("Attention", "mixer"), "",
             _after(_crossed, "split_heads")),
    Mutation(L.GELU, "applied to the halves", VIT, "blocks.1.mlp.act",
             _instead(lambda gelu, x: tuple(map(gelu.act, x)))),
    Mutation(L.GELU, "not a number", VIT, "blocks.1.mlp.act", _last(lambda a: a * float("nan"))),
    Mutation(L.Mlp, "halves exchanged", VIT, "blocks.1.mlp", _before(_exchanged)),
    Mutation(L.Block, "halves exchanged", VIT, "blocks.1", _before(_exchanged)),
    Mutation(L.Block, "tokens dropped by themselves", _layer_case("Block", "stochastic depth"), "",
             _drops_tokens, in_training=True),
    Mutation(L.LayerNorm, "wrong backward pass", _layer_case("LayerNorm", ""), "",
             _last(WrongBackward.apply), in_training=True),
    Mutation(nn.Module, "mean over the left half", MEAN, "",
             _instead(lambda _, x: x[:, : x.shape[1] // 2].mean(1), "pool")),
    Mutation(L.RegularBridge, "left out", HYBRID, "bridge",
             _instead(lambda _, x: torch.cat(x, -1))),
    Mutation(L.InvariantBridge, "left out", EARLY, "bridge",
             _instead(lambda _, x: torch.cat(x, -1))),
    Mutation(L.OrdinaryBlock, "output depends on the place", EARLY, "blocks.2", _after(_by_place)),
    Mutation(L.Linear, "over tokens: irreps swapped on half of the channels", RESMLP,
             "blocks.1.attn",
             _before(_half_exchanged)),
    Mutation(L.Linear, "bias on all four parts", RESMLP, "blocks.1.mlp.fc1", _after(_by_place)),
    Mutation(L.Linear, "shift on the antisymmetric half of a middle column",
             _layer_case("MixerBlock", "decomposed tokens, odd"), "mlp.fc1",
             lambda linear: setattr(linear, "unshifted", None)),
    Mutation(L.Affine, "shift on all four parts", RESMLP, "blocks.1.norm1", _after(_shifted)),
    Mutation(L.GELU, "applied to the four parts", RESMLP, "blocks.1.mlp.act",
             _instead(_act_on_sums)),
    Mutation(L.LayerScale, "with a shift", RESMLP, "blocks.1.gamma_1", _after(_shifted)),
    Mutation(L.MixerBlock, "halves exchanged", RESMLP, "blocks.1", _before(_exchanged)),
    Mutation(L.MirrorConv2d, "bias on the antisymmetric half", ISOTROPIC, "stem",
             _after(lambda both: (both[0], both[1] + _noise(both[1])), "kernel")),
    Mutation(L.MirrorDepthwiseConv2d, "kernels exchanged", ISOTROPIC, "blocks.1.dwconv",
             lambda conv: _instead(lambda conv, inputs, kernels: type(conv)._convolve(
                 conv, inputs, kernels[::-1]), "_convolve")(conv)),
    Mutation(L.MirrorKernel, "not mirrored", ISOTROPIC, "blocks.1.dwconv.sym_to_sym",
             _kernel(_random)),
    Mutation(L.MirrorKernel, "centre column of an antisymmetric one not zero", ISOTROPIC,
             "blocks.1.dwconv.asym_to_sym", _filled_centre),
    Mutation(L.MirrorKernel, "wrong sign, odd width", _layer_case("MirrorConv2d", "3x3, padded"),
             "asym_to_sym", _kernel(torch.abs)),
    Mutation(L.ConvBlock, "halves exchanged", ISOTROPIC, "blocks.1", _before(_exchanged)),
    Mutation(L.MirrorConv2d, "kernel not mirrored", CONVNEXT, "downsample_layers.1.1",
             _kernel(_random, "kernel")),
    Mutation(L.MirrorKernel, "symmetric from s to a", CONVNEXT, "downsample_layers.2.1.sym_to_asym",
             _kernel(lambda kernel: torch.cat([kernel[..., :1], kernel[..., :1]], -1))),
    Mutation(L.PatchEmbed, "tokens of an odd grid not mirrored",
             _layer_case("PatchEmbed", "odd grid"),
             "", _row_major),
)  # fmt: skip
