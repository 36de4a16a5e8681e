"""Functions that look at the size or dtype of their input, kept whole by symbolic tracers.

A symbolic tracer (torch.fx, which timm and torchvision use to extract features) runs a forward pass
on stand-ins, of which no branch can be decided. These functions are recorded as calls instead and
decide at run time. They are written so that TorchScript compiles them too. Call them as attributes
of this module, `tracing.widen(x)`, because that is where a tracer puts their stand-ins.
"""

import torch
from torch import Tensor
from torch.fx import wrap


@wrap
def check_images(images: Tensor, channels: int) -> None:
    """Raise ValueError unless these are images (B, channels, H, W)."""
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must be of shape (batch, {channels}, height, width), not {images.shape}"
        )


@wrap
def check_image_size(height: int, width: int, own_height: int, own_width: int) -> None:
    """Raise ValueError unless images have the size that the network was made for."""
    if height != own_height or width != own_width:
        raise ValueError(
            f"images are {height} x {width} pixels, the network was made for "
            f"{own_height} x {own_width}: create it with img_size, or if it can change, call "
            "set_input_size or create it with dynamic_img_size=True"
        )


@wrap
def check_stride(width: int, kernel: int, stride: int, padding: int) -> None:
    """Raise ValueError if a convolution leaves out columns on the right: flopping would not commute
    with it."""
    left_out = (width + 2 * padding - kernel) % stride
    if left_out > 0:
        raise ValueError(
            f"a kernel {kernel} wide, moved by {stride} over {width} columns, leaves out "
            f"{left_out} on the right, and flopping would not commute with it: use "
            f"{width - left_out} or {width - left_out + stride} columns"
        )


@wrap
def check_total_stride(height: int, width: int, stride: int) -> None:
    """Raise ValueError if a network of this total stride is not equivariant on such images."""
    if width % stride > 0 or width < stride or height < stride:
        raise ValueError(
            f"images are {height} x {width} pixels: equivariance needs a width that is a multiple "
            f"of the network's total stride, {stride}, and one stride of height, for example "
            f"{max(height, stride)} x {max((width + stride // 2) // stride, 1) * stride}"
        )


@wrap
def widen(x: Tensor) -> Tensor:
    """Half precision to float32, other dtypes as they are."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x
