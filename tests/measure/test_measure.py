"""From names to results: choosing networks, running them, batch sizes, failures."""

import pytest
import timm
import torch

from deit.errors import UserError
from deit.measure import measure as measuring
from deit.measure.bench_model import BenchModel
from deit.measure.flops import MatMul
from deit.measure.measure import Result, count, first_batch, measure
from deit.measure.networks import build, comparisons, has_asym_feats, own_networks, select
from deit.measure.options import parse_args
from deit.measure.profiling import profile
from deit.measure.roofline import PeakRates
from deit.measure.timing import Timing
from deit.models.published import PUBLISHED, twin_of

RATES = PeakRates(1e11, 1e10)
TWIN, OURS, HYBRID = (f"{kind}deit_tiny_patch16_LS" for kind in ("", "d2_", "hybrid_"))


def options(words=""):
    return parse_args(["--device=cpu", "--img-size=32", "--min-time=0", *words.split()])


def shallow(words):
    return options(f"--model-kwargs depth=2 {words}")


def test_twins():
    for name in own_networks():
        twin, equivariant = twin_of(name), name.startswith(("d2_", "hybrid_", "resmlp_equi_"))
        assert timm.is_model(twin) and twin_of(twin) is None if equivariant else twin is None, name
    assert twin_of(HYBRID) == twin_of("d2_inv_early_deit_tiny_patch16_LS") == TWIN
    assert twin_of("resmlp_equi_d2_B_24") == "resmlpB_24"
    published = [row.name for row in PUBLISHED]
    assert len(published) == 26
    members = [name for group in comparisons(published) for name in group]
    assert sorted(members) == sorted(published)  # none twice, and all twins among them
    assert all((row.kind == "ordinary") == (twin_of(row.name) is None) for row in PUBLISHED)


def test_selection():
    assert select([OURS, "d2_deit_t*", "convnext_tiny"]) == [OURS, "convnext_tiny"]
    # globs are for our networks and their twins, names for all of timm
    assert select(["convnext_x*"]) == ["convnext_xlarge"]
    assert select(["resnet18"]) == ["resnet18"]
    # each behind its twin
    assert comparisons([OURS, HYBRID, "resnet18"]) == [(TWIN, OURS, HYBRID), ("resnet18",)]
    assert comparisons([OURS, TWIN], folded=True) == [(TWIN, OURS, f"{OURS}, folded")]
    with pytest.raises(UserError, match=f"d2_deit_tiny_patch16.*{OURS}"):
        select(["d2_deit_tiny_patch16"])


@pytest.mark.parametrize(
    ("name", "img_size", "message"),
    [
        (OURS, 30, "patch"),
        ("resmlp_12", 40, "patches of 16 pixels.*use 32 or 48"),
        ("d2_convnext_tiny", 33, "total stride, 32"),
        ("convnext_isotropic_small", 8, "(Kernel size|nothing is left of the image|too small)"),
        ("convnext_tiny", 20, "usual size is 224"),
        ("vit_tiny_patch16_224", 40, "use 32 or 48"),
        ("swin_tiny_patch4_window7_224", 31, "."),
    ],
)
def test_impossible_image_sizes(name, img_size, message):
    with pytest.raises(UserError, match=f"{name}.*{message}|--img-size {img_size}.*{message}"):
        count(name, options(f"--img-size {img_size}"))


@pytest.mark.parametrize("name", [TWIN, OURS, "convnext_tiny"])
def test_images_of_one_colour(name):
    args = options("--model-kwargs in_chans=1 --batch-size 2")
    assert count(name, args).gflops < count(name, options()).gflops
    assert BenchModel(name, 2, args).infer().shape == (2, 1000)


def test_symmetrized_features():
    wanted = options("--symmetrized-asym-feats")
    # the classifier is twice as wide
    assert count(OURS, wanted).params == count(OURS, options()).params + 96 * 1000
    model, _ = build(OURS, 32, wanted.arguments, device="meta")
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not model.training
    assert "--symmetrized-asym-feats" in count(HYBRID, wanted).notes[0]
    assert not count(TWIN, wanted).notes
    for name in own_networks():
        try:
            with torch.device("meta"):
                timm.create_model(name, use_symmetrized_asym_feats=True)
        except (TypeError, ValueError):
            assert not has_asym_feats(name), name
        else:
            assert has_asym_feats(name), name


@pytest.mark.parametrize(
    ("name", "other"), [(OURS, "depths"), ("d2_convnext_isotropic_small", "depths")]
)
def test_a_network_goes_without_arguments_that_it_does_not_know(name, other):
    assert count(name, options(f"--model-kwargs {other}=1")) == count(name, options())


@pytest.mark.parametrize("amp", ["", "--amp"])
def test_inference_and_training_are_measured(amp, monkeypatch):
    def timed(steps, device, min_time, on_sample):
        timings = {}
        for name, step in steps.items():
            step()
            on_sample(name)
            timings[name] = Timing((0.25 if step.__name__ == "infer" else 0.75,) * 3)
        return timings

    monkeypatch.setattr(measuring, "alternate", timed)
    args = shallow(f"--train --batch-size 2 {amp}")
    said, (twin, ours) = [], (count(name, args) for name in (TWIN, OURS))
    measure([twin, ours], args, RATES, said.append)
    for result in (ours, twin):
        assert result.batch_size == 2
        assert (result.images_per_s, result.train_images_per_s) == (2 / 0.25, 2 / 0.75)
        assert result.train_peak_memory_mb > result.peak_memory_mb
        assert not result.notes
        assert result.bound_images_per_s == pytest.approx(3 * result.train_bound_images_per_s)
    assert ours.bound_images_per_s > twin.bound_images_per_s
    ratios = ours.ratios(twin)
    assert ratios["gflops"] == pytest.approx(ours.gflops / twin.gflops)
    assert ratios["images_per_s"] == 1 > ratios["peak_memory_mb"]  # half the weights
    assert {f"{TWIN}: warming up", f"{OURS}: training"} <= {*said}


@pytest.mark.parametrize(
    ("words", "stored"), [("--dtype bfloat16", torch.bfloat16), ("--amp", torch.float32)]
)
def test_training_steps_change_the_weights(words, stored):
    network = BenchModel(OURS, 2, shallow(f"--train {words}"))
    before = network.model.head.weight.detach().clone()
    _, peak = network.warm_up()
    # weights, gradients and two moments
    assert peak * 2**20 > 4 * sum(p.nbytes for p in network.model.parameters())
    assert not torch.equal(before, network.model.head.weight)
    assert not network.model.training
    assert all(p.grad is None for p in network.model.parameters())
    assert {p.dtype for p in network.model.parameters()} == {stored}
    assert network.infer().dtype == torch.bfloat16


def test_memory_of_inference_is_weights_and_activations():
    found = []
    for batch in (64, 128):
        network = BenchModel(TWIN, batch, shallow(""))
        peak, _ = network.warm_up()
        weights = sum(p.nbytes for p in network.model.parameters())
        found.append(peak * 2**20 - weights - network.images.nbytes)
        assert found[-1] > 0
    # 5 tokens of 768 hidden channels in float32: at least once, and GELU's result beside it
    hidden = 64 * 5 * 768 * 4
    assert hidden < found[1] - found[0] < 4 * hidden


@pytest.mark.parametrize(
    ("limit", "batch", "note"),
    [
        (4, 4, "batch 4 in place of 8: memory does not hold more"),
        (0, None, "not timed: memory does not hold a batch of one"),
    ],
)
def test_batch_is_reduced_where_memory_does_not_hold_it(monkeypatch, limit, batch, note):
    def hungry(self):
        if len(self.images) > limit:
            raise error
        return None, None

    monkeypatch.setattr(BenchModel, "warm_up", hungry)
    args, error = shallow("--batch-size 8"), torch.OutOfMemoryError("CUDA out of memory")
    results = [count(name, args) for name in (TWIN, OURS)]
    measure(results, args, RATES)
    for result in results:
        assert (result.batch_size, result.notes) == (batch, [note])
        rates = (result.images_per_s, result.bound_images_per_s)
        assert [rate is None for rate in rates] == 2 * [batch is None]
    error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        measure(results, args, RATES)


@pytest.mark.parametrize(
    ("words", "matmul", "rate", "batch", "reason"),
    [
        ("", MatMul(10**9, 10, 10), 1e12, 64, ""),
        # 2e9 operations an image at 1e9 a second, in four seconds
        ("", MatMul(10**9, 10, 10), 1e9, 2, "--batch-size"),
        ("--batch-size 64", MatMul(10**9, 10, 10), 1e9, 64, ""),
        # ten images' memory
        ("--batch-size 64", MatMul(1, 1000, 10), 1e9, 8, "memory"),
    ],
)
def test_first_batch(words, matmul, rate, batch, reason, monkeypatch):
    monkeypatch.setattr(measuring, "available_memory", lambda: 10 * measuring.COPIES * 1000 * 4)
    result = Result("a", 0, 1.0, matmuls=[matmul])
    found, said = first_batch([result], options(words), PeakRates(rate, 1))
    assert found == batch
    assert reason in said if reason else said == ""


def test_profiles_name_layers_and_operators():
    inference, training, layers = profile(OURS, 2, shallow("--train"))
    assert f"{OURS}, batch 2, 3 steps of inference" in inference[0]
    assert "aten::" in inference[1]
    assert "AdamW.step" in training[1]
    for name, calls in (("Block", 2 * 3), ("Attention", 2 * 3), ("PatchEmbed", 3)):
        (row,) = [line.split() for line in layers[1].splitlines() if f"layer: {name} " in line]
        assert row[-1] == str(calls)


@pytest.mark.slow
def test_profiles_are_of_the_compiled_network():
    title, table = next(profile("resmlp_12", 1, options("--compile --model-kwargs depth=1")))
    assert "MB by Inductor's count" in title
    assert "Torch-Compiled Region" in table
