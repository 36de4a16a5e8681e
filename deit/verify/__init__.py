"""Checks that layers and networks are equivariant, and that the checks can fail.

`test_equivariance.py` at the root of the repository is the command line and the pytest module over
this package.

    measure    errors, tolerances, and what makes a measurement vacuous
    features   how flopping acts on a tensor of a given layout
    samples    natural and random images, and features made from them
    layers     one case for each variant of each layer, with its ordinary twin
    trace      every feature inside a network, and the first layer that fails
    networks   whole networks: features, logits, gradients
    breaks     layers broken on purpose, which must be found
    report     tables
    cli        the command line
"""
