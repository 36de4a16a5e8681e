"""All networks; importing this package registers them with timm."""

from deit.models.vit import OrdinaryVisionTransformer, VisionTransformer

__all__ = ["OrdinaryVisionTransformer", "VisionTransformer"]
