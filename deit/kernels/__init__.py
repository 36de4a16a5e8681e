"""Fused fast paths, each with a plain PyTorch twin."""
