"""Mirror-equivariant vision networks (arXiv:2502.05169): layers, models, training, measurement."""

__version__ = "0.1.0"
