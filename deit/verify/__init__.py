"""Checks that layers and networks are equivariant, and that the checks can fail.

`test_equivariance.py` at the root of the repository is the command line and the pytest module over
this package. Errors and tolerances are those of `deit.equivariance`.

    rules      how flopping acts on what goes into a layer and comes out of it
    trace      every feature inside a network, and the first layer that fails
    check      what to check, and how: features, output, gradients, ordinary twin
    layers     one case for each variant of each layer
    networks   the networks, and how they are made
    mutations  layers broken on purpose, which must be found
    samples    natural and random images, and features made from them
    cli        the command line and its tables
"""
