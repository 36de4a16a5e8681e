"""All networks; importing this package registers them with timm."""

from deit.models.convnext import ConvNeXt, IsotropicConvNeXt
from deit.models.ordinary import OrdinaryResMLP, OrdinaryVisionTransformer
from deit.models.resmlp import ResMLP
from deit.models.vit import VisionTransformer

__all__ = [
    "ConvNeXt",
    "IsotropicConvNeXt",
    "OrdinaryResMLP",
    "OrdinaryVisionTransformer",
    "ResMLP",
    "VisionTransformer",
]
