"""All networks; importing this package registers them with timm."""

from deit.models.convnext import ConvNeXt as ConvNeXt
from deit.models.convnext import IsotropicConvNeXt as IsotropicConvNeXt
from deit.models.ordinary import OrdinaryResMLP as OrdinaryResMLP
from deit.models.ordinary import OrdinaryVisionTransformer as OrdinaryVisionTransformer
from deit.models.resmlp import ResMLP as ResMLP
from deit.models.vit import VisionTransformer as VisionTransformer
