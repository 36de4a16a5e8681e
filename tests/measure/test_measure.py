"""From names to results: choosing networks, running them, batch sizes, failures."""

import sys
from functools import partial

import pytest
import timm
import torch

from deit.errors import UserError
from deit.measure import measure, profiling, subject
from deit.measure.measure import Result, add_bounds, count, first_batch, measure_group
from deit.measure.networks import groups, has_asym_feats, own_networks, select
from deit.measure.profiling import profile
from deit.measure.published import PUBLISHED, twin_of
from deit.measure.roofline import Ceilings, Product
from deit.measure.subject import Settings, Subject

CPU = Settings(torch.device("cpu"), img_size=32)
CEILINGS = Ceilings(1e11, 1e10)
TWIN, OURS = "deit_tiny_patch16_LS", "d2_deit_tiny_patch16_LS"


def test_every_network_of_ours_has_a_twin_or_is_one():
    for name in own_networks():
        twin = twin_of(name)
        if name.startswith(("d2_", "hybrid_", "resmlp_equi_")):
            assert timm.is_model(twin), name
            assert twin_of(twin) is None
        else:
            assert twin is None, name


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("d2_deit_base_patch16_LS", "deit_base_patch16_LS"),
        ("hybrid_deit_huge_patch14_52_LS", "deit_huge_patch14_52_LS"),
        ("d2_inv_early_deit_tiny_patch16_LS", "deit_tiny_patch16_LS"),
        ("resmlp_equi_d2_12", "resmlp_12"),
        ("resmlp_equi_d2_B_24", "resmlpB_24"),
        ("d2_convnext_isotropic_base", "convnext_isotropic_base"),
        ("d2_convnext_xlarge", "convnext_xlarge"),
        ("convnext_base", None),
        ("vit_base_patch16_224", None),
    ],
)
def test_twins(name, twin):
    assert twin_of(name) == twin


def test_published_networks_exist_and_come_with_their_twins():
    names = [row.name for row in PUBLISHED]
    assert len(names) == len(set(names)) == 26
    assert all(timm.is_model(name) for name in names)
    assert sorted(names) == sorted(name for group in groups(names) for name in group.names)
    for row in PUBLISHED:
        assert (row.kind == "ordinary") == (twin_of(row.name) is None)


def test_selection():
    assert select([OURS, "d2_deit_t*", "convnext_tiny"]) == [OURS, "convnext_tiny"]
    # globs are for our networks and their twins, names for all of timm
    assert select(["convnext_x*"]) == ["convnext_xlarge"]
    assert select(["resnet18"]) == ["resnet18"]
    with pytest.raises(UserError, match=f"d2_deit_tiny_patch16.*{OURS}"):
        select(["d2_deit_tiny_patch16"])


def test_groups_begin_with_the_twin():
    (first, second) = groups([OURS, "hybrid_deit_tiny_patch16_LS", "resnet18"])
    assert first.names == (TWIN, OURS, "hybrid_deit_tiny_patch16_LS")
    assert second.names == ("resnet18",)


@pytest.mark.parametrize(
    ("name", "img_size", "message"),
    [
        (OURS, 30, "patch"),
        (TWIN, 30, "patch"),
        ("resmlp_equi_d2_12", 40, "patch"),
        ("resmlp_12", 40, "patches of 16 pixels.*use 32 or 48"),
        ("d2_convnext_tiny", 33, "total stride, 32"),
        ("d2_convnext_isotropic_small", 33, "total stride, 16"),
        ("convnext_isotropic_small", 8, "Kernel size"),
        ("convnext_tiny", 20, "usual size is 224"),
        ("vit_tiny_patch16_224", 40, "use 32 or 48"),
        ("swin_tiny_patch4_window7_224", 31, "."),
    ],
)
def test_impossible_image_sizes(name, img_size, message):
    with pytest.raises(UserError, match=f"{name}.*{message}|--img-size {img_size}.*{message}"):
        count(name, Settings(CPU.device, img_size=img_size))


def test_symmetrized_features():
    plain, both = (
        count(OURS, Settings(CPU.device, img_size=32, symmetrized_asym_feats=s))
        for s in (False, True)
    )
    assert both.params == plain.params + 96 * 1000  # the classifier is twice as wide
    subject = Subject(OURS, 1, Settings(CPU.device, img_size=32, symmetrized_asym_feats=True))
    assert subject.model.head.in_features == 192
    wanted = Settings(CPU.device, img_size=32, symmetrized_asym_feats=True)
    hybrid, twin = count("hybrid_deit_tiny_patch16_LS", wanted), count(TWIN, wanted)
    assert "--symmetrized-asym-feats" in hybrid.notes[0]
    assert not twin.notes


def test_symmetrized_features_are_known_of_every_network():
    for name in own_networks():
        try:
            with torch.device("meta"):
                timm.create_model(name, use_symmetrized_asym_feats=True)
        except (TypeError, ValueError):
            assert not has_asym_feats(name), name
        else:
            assert has_asym_feats(name), name


def test_count_without_fvcore(monkeypatch):
    own_size = Settings(CPU.device)
    with_it = count(OURS, own_size)
    monkeypatch.setitem(sys.modules, "fvcore", None)
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    without = count(OURS, own_size)
    assert without.gflops == pytest.approx(with_it.gflops, rel=1e-3)
    assert without.params == with_it.params
    assert "fvcore" in without.notes[0]
    assert count("resnet18", own_size).gflops is None


def results_of(*names):
    return {name: count(name, CPU) for name in names}


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Timed(Subject):
    """Takes the same time on every machine."""

    def __init__(self, clock, *args):
        super().__init__(*args)
        self.clock = clock

    def infer(self):
        self.clock.now += 0.25
        return super().infer()

    def train_step(self):
        self.clock.now += 0.75
        super().train_step()


@pytest.mark.parametrize("amp", [False, True])
def test_inference_and_training_are_measured(amp, monkeypatch):
    settings = Settings(
        CPU.device,
        torch.bfloat16 if amp else torch.float32,
        amp=amp,
        img_size=32,
        train=True,
    )
    clock = Clock()
    monkeypatch.setattr("deit.measure.timing.time", clock)
    monkeypatch.setattr(measure, "Subject", partial(Timed, clock))
    results, said = results_of(TWIN, OURS), []
    measure_group(groups([OURS])[0], results, settings, 2, 0.0, CEILINGS, said.append)
    ours, twin = results[OURS], results[TWIN]
    for result in (ours, twin):
        assert result.batch_size == 2
        assert (result.images_per_s, result.train_images_per_s) == (2 / 0.25, 2 / 0.75)
        assert result.train_peak_memory_mb > result.peak_memory_mb
        assert not result.notes
        add_bounds(result, settings.dtype, CEILINGS)
        assert result.bound.images_per_s == pytest.approx(3 * result.train_bound.images_per_s)
    assert ours.bound.images_per_s > twin.bound.images_per_s
    ratios = ours.ratios(twin)
    assert ratios["images_per_s"] == ours.images_per_s / twin.images_per_s
    assert ratios["gflops"] == pytest.approx(ours.gflops / twin.gflops)
    assert ratios["peak_memory_mb"] < 1  # half the weights
    assert f"{TWIN}: warming up" in said
    assert f"{OURS}: training" in said


def test_training_steps_change_the_weights():
    torch.manual_seed(0)
    network = Subject(OURS, 2, Settings(CPU.device, img_size=32, train=True))
    before = network.model.head.weight.detach().clone()
    network.warm_up()
    assert not torch.equal(before, network.model.head.weight)
    assert not network.model.training
    assert all(p.grad is None for p in network.model.parameters())


def test_memory_of_inference_is_weights_and_activations():
    found = []
    for batch in (64, 128):
        network = Subject(TWIN, batch, CPU)
        network.warm_up()
        weights = sum(p.nbytes for p in network.model.parameters())
        found.append(network.peak_memory - weights - network.images.nbytes)
        assert found[-1] > 0
    # 5 tokens of 768 hidden channels in float32: at least once, and GELU's result beside it
    hidden = 64 * 5 * 768 * 4
    assert hidden < found[1] - found[0] < 4 * hidden


def test_half_precision_halves_weights():
    network = Subject(TWIN, 1, Settings(CPU.device, torch.bfloat16, img_size=32))
    assert {p.dtype for p in network.model.parameters()} == {torch.bfloat16}
    assert network.infer().dtype == torch.bfloat16


class Hungry(Subject):
    """Runs out of memory with more than two images."""

    limit = 2

    def warm_up(self):
        if len(self.images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().warm_up()


def test_batch_is_reduced_where_memory_does_not_hold_it(monkeypatch):
    monkeypatch.setattr(measure, "Subject", Hungry)
    results = results_of(TWIN, OURS)
    measure_group(groups([OURS])[0], results, CPU, 8, 0.0, CEILINGS)
    for result in results.values():
        assert result.batch_size == 2
        assert result.notes == ["batch 2 in place of 8: memory does not hold more"]


def test_no_batch_fits(monkeypatch):
    monkeypatch.setattr(measure, "Subject", Hungry)
    monkeypatch.setattr(Hungry, "limit", 0)
    results = results_of(TWIN)
    measure_group(groups([TWIN])[0], results, CPU, 4, 0.0, CEILINGS)
    assert results[TWIN].images_per_s is None
    assert "batch of one" in results[TWIN].notes[0]
    add_bounds(results[TWIN], CPU.dtype, CEILINGS)
    assert results[TWIN].bound is None


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def fail(self):
        raise RuntimeError("a defect")

    monkeypatch.setattr(subject.Subject, "warm_up", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        measure_group(groups([TWIN])[0], results_of(TWIN), CPU, 4, 0.0, CEILINGS)


def test_default_batch_suits_the_processor(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 2**40)
    slow = Result("slow", 10, 1.0, [Product(10**9, 10, 10)])
    assert first_batch([slow], CPU, None, Ceilings(1e12, 1))[0] == 64
    # 2e9 operations an image at 1e9 a second, in four seconds
    batch, reason = first_batch([slow], CPU, None, Ceilings(1e9, 1))
    assert batch == 2
    assert "--batch-size" in reason
    assert first_batch([slow], CPU, 64, Ceilings(1e9, 1)) == (64, "")  # asked for


def test_first_batch_fits_into_memory(monkeypatch):
    result = Result("wide", 0, 1.0, [Product(1, 1000, 10)])
    need = measure.INFERENCE_COPIES * 1000 * 4
    monkeypatch.setattr(measure, "available_memory", lambda: 10 * need)
    batch, reason = first_batch([result], CPU, 64, CEILINGS)
    assert batch == 8
    assert "memory" in reason


def test_profile_names_layers_and_operators():
    found = profile(OURS, 2, CPU)
    assert {"Attention", "LayerNorm", "PatchEmbed"} <= set(found.by_layer)
    assert any("addmm" in name for name in found.by_kernel)
    assert min(found.by_layer.values()) >= 0
    assert list(found.by_kernel.values()) == sorted(found.by_kernel.values(), reverse=True)


def test_profile_by_layer_leaves_nothing_out():
    network = Subject(OURS, 2, CPU)
    with profiling._named_layers(network.model):
        events = profiling._events(network.infer, CPU.device)
    by_kernel = profiling._kernels(events)
    operators = [s for name, s in by_kernel.items() if not name.startswith(profiling.LAYER)]
    assert 0 < sum(operators) < sum(by_kernel.values())
    by_layer = profiling._layers(events, CPU.device)
    assert sum(by_layer.values()) == pytest.approx(sum(operators))
