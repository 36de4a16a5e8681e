"""What a compiled block costs on a GPU, counted without one: hardly more bytes than its twin."""

import pytest

from benchmarks import inductor_bytes

pytest.importorskip("triton")
LIMITS = {"ViT": 1.15, "ResMLP": 1.2, "ConvNeXt": 1.2}
# In inference q, k and v are concatenated one by one, by loads under a mask, and the count takes
# what a mask hides for read: a megabyte in every eighteen.
MASKED = {("ViT", False): 0.07}


@pytest.mark.skipif(not inductor_bytes.SUPPORTED, reason="uses functions of newer TorchInductors")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("family", LIMITS)
def test_bytes_of_a_block(family, training):
    ours, twin, shape = inductor_bytes.blocks()[family]
    own = inductor_bytes.count(ours, shape, parts=True, training=training)
    other = inductor_bytes.count(twin, shape, parts=False, training=training)
    assert len(own) == len(other) == 1 + training
    # every operation of the twin reads and writes something: the count is not vacuous
    elements = shape[0] * shape[-1]
    assert other[0].bytes > 10 * elements
    limit = LIMITS[family] + MASKED.get((family, training), 0.0)
    assert sum(each.bytes for each in own) <= limit * sum(each.bytes for each in other)
    assert sum(each.nodes for each in own) <= 2.5 * sum(each.nodes for each in other)
