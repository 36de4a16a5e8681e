"""Whether a network takes images of a size, found out before anything long begins."""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from deit.errors import UserError, one_line


def input_channels(model: nn.Module) -> int:
    """The channels of the images that `model` takes; 3 if it does not say it."""
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return getattr(model, "in_chans", None) or next(convolutions, 3)


@torch.no_grad()
def check_image_size(model: nn.Module, size: int | tuple[int, int], option: str, name: str) -> None:
    """Run one image through `model` without computing anything.

    Args:
        size: pixels of a square image, or (height, width).
        option: the spelling of the option that gave the size, for the message.
        name: of the network, for the message.

    Raises:
        UserError: the network cannot take such images, or would ignore some of their pixels.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = () if patch is None else zip(to_2tuple(patch), to_2tuple(size), strict=True)
    for side, pixels in sides:
        if pixels % side:  # some of timm's networks leave out what does not fill a patch
            below = pixels // side * side
            fitting = " or ".join(str(s) for s in (below, below + side) if s)
            raise UserError(
                f"{option} {pixels} does not fit the patches of {side} pixels of {name}: "
                f"use {fitting}, or another patch size"
            )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {key: tensor.to("meta") for key, tensor in tensors.items()}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    image = torch.empty(1, input_channels(model), *to_2tuple(size), device="meta", dtype=dtype)
    training = model.training
    try:
        with register_module_forward_hook(_refuse_empty):
            torch.func.functional_call(model.eval(), on_meta, (image,))
    except NotImplementedError:  # an operator without meta tensors: it cannot be told
        pass
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        own = getattr(model, "pretrained_cfg", None) or {}
        shown = size if isinstance(size, int) else " x ".join(map(str, size))
        usual = own.get("input_size", (3, 224, 224))[-1]
        raise UserError(
            f"{name} cannot take images of {option} {shown}, its usual size is {usual}: "
            f"{one_line(error)}"
        ) from error
    finally:
        model.train(training)


def _refuse_empty(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
    # torch 2.6 does not complain about an image smaller than the kernel, without data
    if isinstance(layer, nn.Conv2d) and output.numel() == 0:
        raise ValueError("nothing is left of the image within the network")
