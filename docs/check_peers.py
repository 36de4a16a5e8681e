"""What docs/comparison.md says of timm and escnn, by running them.

    pip install timm "escnn==1.0.11"      # escnn needs a virtual environment with numpy < 2
    python docs/check_peers.py

A library that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings

import torch


def change_under_flopping(network: torch.nn.Module, size: int) -> float:
    """|f(x) - f(flopped x)| / |f(x)| for random images."""
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        outputs, flopped = network(images), network(images.flip(-1))
    return ((outputs - flopped).norm() / outputs.norm()).item()


def check_timm() -> None:
    import timm
    from timm.data.distributed_sampler import OrderedDistributedSampler

    print(f"timm {timm.__version__}")
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).eval()
    change = change_under_flopping(network, 64)
    print(f"  a ViT's logits change under flopping by {change:.2f} of their norm")
    parts = [list(OrderedDistributedSampler(range(10), 4, rank)) for rank in range(4)]
    print(f"  10 test images on 4 processes: {sum(map(len, parts))} evaluated: {parts}")


def check_escnn() -> None:
    warnings.simplefilter("ignore")
    import escnn
    from escnn import gspaces, nn
    from escnn.group import cyclic_group

    print(f"escnn {escnn.__version__}")
    plane = gspaces.flip2dOnR2()
    colours = nn.FieldType(plane, 3 * [plane.trivial_repr])
    features = nn.FieldType(plane, 8 * [plane.regular_repr])
    convolution = nn.R2Conv(colours, features, 7, padding=3).eval()
    images = torch.randn(2, 3, 33, 33)
    maps = convolution(colours(images))
    print(f"  an equivariant convolution of images of odd width: {tuple(maps.shape)}")
    group = cyclic_group(2)
    channels = nn.FieldType(gspaces.no_base_space(group), 8 * [group.regular_representation])
    weight = nn.Linear(channels, channels).expand_parameters()[0]
    print(f"  a linear layer on 16 channels multiplies by a dense matrix {tuple(weight.shape)}")
    for name, module, example in (
        ("the layer", convolution, colours(images)),
        ("its expanded copy", convolution.export(), images),
    ):
        try:
            torch.export.export(module, (example,))
        except Exception as error:
            print(f"  torch.export of {name}: {type(error).__name__}")
        else:
            print(f"  torch.export of {name}: works, as {type(module).__name__}")
    print(f"  attention layers: {[n for n in dir(nn) if 'attention' in n.lower()]}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    for library, check in (("timm", check_timm), ("escnn", check_escnn)):
        if importlib.util.find_spec(library):
            check()
        else:
            print(f"{library} is not installed")
