"""All networks; importing this package registers them with timm."""

from deit.models.convnext import ConvNeXt, IsotropicConvNeXt
from deit.models.ordinary_vit import OrdinaryVisionTransformer
from deit.models.resmlp import OrdinaryResMLP, ResMLP
from deit.models.vit import VisionTransformer

__all__ = [
    "ConvNeXt",
    "IsotropicConvNeXt",
    "OrdinaryResMLP",
    "OrdinaryVisionTransformer",
    "ResMLP",
    "VisionTransformer",
]
