r"""Convolutions that commute with flopping (arXiv:2502.05169, section 3).

From irrep rho to irrep sigma only kernels with k(mirrored x) = rho sigma k(x) are allowed: equal
columns left and right where the irreps agree, opposite ones where they differ. Half of a kernel
decides the rest, so only the left half is stored.

The layers here store halves of kernels, which is particular to groups whose only motion is the
mirror: both irreps have dimension one, and the sign of the mirror is all that is needed of them.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from deit.groups import FLOP, Rep
from deit.layers import tracing
from deit.layers.fixed import FixedBuffers

SYM, ASYM = FLOP.irreps
# the order in which both layers list their parts: (from, to)
PARTS = ((SYM, SYM), (SYM, ASYM), (ASYM, SYM), (ASYM, ASYM))


class MirrorKernel(FixedBuffers):
    """Kernels that are mirror-symmetric (`sign` +1) or mirror-antisymmetric (-1).

    Keys: `weight`, (out, in, height, stored width), the left half: with an odd width a symmetric
    kernel stores its centre column too, last; an antisymmetric one has zero there and keeps that
    column as `zero_center`, (out, in, height, 1). And `bias` (out,) if asked for.

    The layers below call it for the whole kernel and the bias.
    """

    zero_center: Tensor

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        kernel_size: tuple[int, int],
        sign: int,
        bias: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.sign = sign
        self._set_whole(torch.empty(out_channels, in_channels, *kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(out_channels, **dd)) if bias else None
        self.reset_parameters()

    def _set_whole(self, kernel: Tensor) -> None:
        """Store the half of a whole kernel, (out, in, height, width)."""
        width = kernel.shape[-1]
        self.odd = width % 2
        stored = width // 2 + (self.odd if self.sign > 0 else 0)
        self.weight = nn.Parameter(kernel[..., :stored].clone())
        if self.sign < 0 and self.odd:
            zeros = torch.zeros(*kernel.shape[:-1], 1, device="cpu", dtype=kernel.dtype)
            rule = "zero, as the centre column of an antisymmetric kernel must be"
            self.register_fixed("zero_center", zeros, rule, kernel.device)
        elif "zero_center" in self._fixed:
            self.unregister_fixed("zero_center")

    def resize(self, kernel_size: tuple[int, int]) -> None:
        """Resample to another size, as timm resamples patch embeddings (arXiv:2212.08013).

        Only the left half of the result is kept: the kernel stays exactly (anti)symmetric.
        """
        requires_grad = self.weight.requires_grad
        with torch.no_grad():
            self._set_whole(resample_patch_embed(self()[0], list(kernel_size)))
        self.weight.requires_grad_(requires_grad)

    def reset_parameters(self) -> None:
        """torch's default for Conv2d with the fan-in of the stored half."""
        super().reset_parameters()
        # an antisymmetric kernel one column wide stores nothing
        bound = max(self.weight[0].numel(), 1) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The whole kernel, (out, in, height, width), and the bias."""
        left = self.weight
        if self.sign > 0:
            columns = [left, left[..., : left.shape[-1] - self.odd].flip(-1)]
        else:
            columns = [left, *([self.zero_center] if self.odd else []), -left.flip(-1)]
        return torch.cat(columns, -1), self.bias


class MirrorConv2d(nn.Module):
    """A dense convolution of an image (B, C_in, H, W), or of parts with channels last.

    It gives parts with channels last, (B, H', W', C_out / 2): s' = k_ss * s + k_as * a + b and
    a' = k_sa * s + k_aa * a, where the first index is the input. Flopping commutes with it if it
    maps the kernel's positions to one another, that is if a stride leaves out no column on the
    right.

    Args:
        in_rep: representation of the input channels; colours are `Rep(FLOP, free=0, fixed=3)`.
        out_channels: C_out, even.
        kernel_size: (height, width).
        stride, padding: as in Conv2d.
        scale: factor on the output.

    Keys: `<from>_to_<to>.weight` and `sym_to_sym.bias`; from an image `proj_<to>.…`.

    Raises:
        ValueError: in `forward`, for a width on which flopping does not commute.
    """

    def __init__(
        self,
        in_rep: Rep,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        bias: bool = True,
        *,
        scale: float = 1.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.in_rep, self.out_rep = in_rep, FLOP.regular(out_channels)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.scale = scale
        # not keyed by irreps: torch 2.6 cannot compile look-ups by tuples
        self.names: dict[str, list[str]] = {sigma.name: [] for sigma in FLOP.irreps}
        for rho, sigma in PARTS:
            if not in_rep.multiplicity(rho):
                continue
            name = (f"{rho.name}_to_" if in_rep.free else "proj_") + sigma.name
            self.names[sigma.name].append(name)
            sizes = (self.out_rep.multiplicity(sigma), in_rep.multiplicity(rho))
            shift = bias and rho is sigma is SYM
            kernel = MirrorKernel(*sizes, kernel_size, 1 if rho is sigma else -1, shift, **dd)
            self.add_module(name, kernel)

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """All kernels as one of packed channels, (C_out, C_in, height, width), and the shift of all
        output channels, zero on a; (C_out,)."""
        rows, biases = [], []
        for sigma in FLOP.irreps:
            row = [getattr(self, name)() for name in self.names[sigma.name]]
            kernels, shifts = zip(*row, strict=True)
            rows.append(torch.cat(kernels, 1))
            biases.append(shifts[0])
        bias = biases[0]
        if bias is not None:
            bias = F.pad(bias, (0, self.out_rep.multiplicity(ASYM)))
        return torch.cat(rows, 0), bias

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image = torch.cat(tuple(x), -1).permute(0, 3, 1, 2) if self.in_rep.free else cast(Tensor, x)
        width = image.shape[-1]
        tracing.check_stride(width, self.kernel_size[1], self.stride[1], self.padding[1])
        kernel, bias = self.kernel()
        if self.scale != 1.0:  # on the weights, which are smaller than the output
            kernel, bias = kernel * self.scale, None if bias is None else bias * self.scale
        y = F.conv2d(image, kernel, bias, self.stride, self.padding)
        return tuple(self.out_rep.split(y.permute(0, 2, 3, 1)))


class MirrorDepthwiseConv2d(nn.Module):
    """A depthwise convolution of parts (B, H, W, C / 2) that keeps the size.

    With s = (s1, s2) and a = (a1, a2) along channels: s' = (k_ss * s1, k_as * a1) and
    a' = (k_sa * s2, k_aa * a2). Keys: `<from>_to_<to>.weight`, (C/4, 1, k, stored), and biases on
    the two parts that make s'.

    Raises:
        ValueError: if `channels` is no multiple of 4 or `kernel_size` is even.
    """

    sym_to_sym: MirrorKernel
    sym_to_asym: MirrorKernel
    asym_to_sym: MirrorKernel
    asym_to_asym: MirrorKernel

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"{channels} channels cannot be split into the four parts of an equivariant "
                "depthwise convolution: use a multiple of 4"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"a kernel of size {kernel_size} has no centre: use an odd size")
        self.channels = channels
        self.padding = kernel_size // 2
        for rho, sigma in PARTS:
            size, shift = (kernel_size, kernel_size), bias and sigma is SYM
            kernel = MirrorKernel(channels // 4, 1, size, 1 if rho is sigma else -1, shift, **dd)
            self.add_module(f"{rho.name}_to_{sigma.name}", kernel)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        s1, s2 = x[0].permute(0, 3, 1, 2).chunk(2, 1)
        a1, a2 = x[1].permute(0, 3, 1, 2).chunk(2, 1)
        s = self._convolve([s1, a1], [self.sym_to_sym, self.asym_to_sym])
        a = self._convolve([s2, a2], [self.sym_to_asym, self.asym_to_asym])
        return s, a

    def _convolve(self, inputs: list[Tensor], kernels: list[MirrorKernel]) -> Tensor:
        """Both inputs by their kernels: the two halves of one part, channels last."""
        (first, first_bias), (second, second_bias) = (kernel() for kernel in kernels)
        bias = None if first_bias is None else torch.cat([first_bias, second_bias])
        y = F.conv2d(
            torch.cat(inputs, 1),
            torch.cat([first, second]),
            bias,
            padding=self.padding,
            groups=self.channels // 2,
        )
        return y.permute(0, 2, 3, 1)
