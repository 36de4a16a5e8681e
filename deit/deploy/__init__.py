"""Networks folded for deployment: the same function in standard layers and operations.

    from deit.deploy import fold
    folded = fold(model)                   # for PyTorch
    folded = fold(model, target="onnx")    # to be exported for ONNX Runtime

The structure that training needs (irreps, shared halves of kernels, scales and shifts between
layers) is folded into the weights of ordinary linear layers and convolutions, exactly: in float64
the outputs agree to 1e-9. What is left needs no code of this package when exported, and fewer
operations. Folded networks are for inference; train the original.
"""

from deit.deploy.fold import fold

__all__ = ["fold"]
