"""Kernels that compiled code launches by itself, run by test_direct_kernels.py (see conftest.py).

On a CPU torch treats the kernels as it would for a GPU, and only their launch is interpreted.
"""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
os.environ["TRITON_INTERPRET"] = "0"  # torch wraps compiled kernels only

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap as triton_wrap  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from deit.kernels import backends, choice, direct, trial, tuning  # noqa: E402
from deit.kernels.gelu import mirror_gelu, plain_gelu  # noqa: E402
from deit.kernels.linear import mirror_linear  # noqa: E402
from deit.kernels.perceptron import mirror_perceptron  # noqa: E402
from deit.layers.block import Block  # noqa: E402

BACKEND = "aot_eager" if DEVICE == "cpu" else "inductor"
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
PLANS = ["triton", "plain", "batched"]


if DEVICE == "cpu":

    def _launch(self, *args, grid, warmup, **kwargs) -> None:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("num_warps", "num_stages")}
        kwargs = {k: v for k, v in kwargs.items() if k in self.arg_names}
        InterpretedFunction(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def _call(self, *args, **kwargs) -> object:
        patches = interpreter._patch_lang(self.fn)
        try:
            return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
        finally:
            if patches is not None:  # Triton 3.2 leaves its patches in place
                patches.restore()

    JIT = triton.runtime.jit.JITFunction
    JIT.run, JIT.__call__ = _launch, _call
    # torch asks for the target to see which arguments a kernel writes to, and for the rest
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_benchmarker=lambda: None)
    )


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    """A seed, a device that is trusted, and code that is compiled anew."""
    torch.manual_seed(0)
    torch.compiler.reset()
    device = torch.empty(0, device=DEVICE).device
    monkeypatch.setattr(backends, "trusted", {device})
    monkeypatch.setattr(trial, "_tried", {})
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "device_compiles", lambda device: True)
        monkeypatch.setattr(backends, "_device_runs", lambda device: True)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def weights(n: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(n, k, dtype=dtype, scale=k**-0.5) for _ in range(2)]


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double() for t in tensors]


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= factor * TOLERANCE[actual.dtype], f"{float(error):.1e}"  # never for NaN


def with_gradients(function, *args: Tensor | None) -> list[Tensor]:
    """The result of `function` and the gradients of a sum of squares."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in args]
    y = function(*leaves)
    present = [t for t in leaves if t is not None]
    return [y, *torch.autograd.grad(y.square().sum(), present)]


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend=BACKEND, **options)


def targets(monkeypatch) -> list[str]:
    """Collects the names of what is called in the graphs that are compiled from now on."""
    names: list[str] = []
    counted = triton_wrap.TritonKernelWrapperFunctional.__call__

    def call(self, *args, **kwargs):
        kernel = triton_wrap.kernel_side_table.get_kernel(kwargs["kernel_idx"])
        names.append(getattr(kernel, "fn", kernel).__name__)
        assert kwargs["tensors_to_clone"] in (["y_ptr"], ["dx_ptr"], ["partial_ptr"]) or kwargs[
            "tensors_to_clone"
        ] == ["y_ptr", "h_ptr"]
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(triton_wrap.TritonKernelWrapperFunctional, "__call__", call)
    return names


CASES = [((80, 120), True), ((40, 120), False), ((80, 40), True)]  # segments of K and N, bias


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("segments", "bias"), CASES)
def test_linear(plan: str, segments: tuple[int, int], bias: bool) -> None:
    args = random(3, 23, 160), *weights(120, 80), random(120) if bias else None

    def exact(x, *rest):
        return _formula(x, *rest, *segments)

    def f(*args):
        return mirror_linear(*args, in_segment=segments[0], out_segment=segments[1])

    with tuning.only(plan):
        got = with_gradients(compiled(f), *args)
    for a, e in zip(got, with_gradients(exact, *double(*args)), strict=True):
        assert a.is_contiguous()
        close(a, e)


def _formula(x, ws, wa, bias, in_segment: int, out_segment: int) -> Tensor:
    pair = x.unflatten(-1, (-1, 2, in_segment)).transpose(-3, -2).flatten(-2)
    s, a = pair.unbind(-2)
    s, a = torch.nn.functional.linear(s, ws, bias), torch.nn.functional.linear(a, wa)
    y = torch.stack([s, a], -2).unflatten(-1, (-1, out_segment))
    return y.transpose(-3, -2).flatten(-3)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_nonlinearities(plan: str, act: str) -> None:
    args = random(3, 23, 160), *weights(120, 80), random(120)

    def f(*args):
        return mirror_gelu(mirror_linear(*args, act=act), act)

    def exact(*args):
        return plain_gelu(plain_gelu(_formula(*args, 80, 120), act), act)

    expected = with_gradients(exact, *double(*args))
    with tuning.only(plan):
        got = with_gradients(compiled(f), *args)
        with torch.no_grad():
            close(compiled(f)(*args), expected[0])
    for a, e in zip(got, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("biased", [(True, True), (False, False)])
def test_perceptron(plan: str, biased: tuple[bool, bool]) -> None:
    b1, b2 = (
        random(n) if with_bias else None for n, with_bias in zip((120, 48), biased, strict=True)
    )
    args = random(70, 160), *weights(120, 80), b1, *weights(48, 120), b2

    def f(x, ws, wa, b1, vs, va, b2):
        return mirror_perceptron(x, (ws, wa), b1, (vs, va), b2, "gelu")

    def exact(x, ws, wa, b1, vs, va, b2):
        y = plain_gelu(_formula(x, ws, wa, b1, 80, 120), "gelu")
        return _formula(y, vs, va, b2, 120, 48)

    expected = with_gradients(exact, *double(*args))
    with tuning.only(plan):
        got = with_gradients(compiled(f), *args)
        with torch.no_grad():
            close(compiled(f)(*args), expected[0])
    for a, e in zip(got, expected, strict=True):
        close(a, e)


def test_partly_frozen() -> None:
    """Only some gradients are wanted: none for the input, none for the first weights."""
    x, first, second = random(70, 160), weights(120, 80), weights(48, 120)
    second = [t.requires_grad_() for t in second]

    def f(x):
        return mirror_perceptron(x, first, None, second, None, "gelu")

    with tuning.only("triton"):
        got = torch.autograd.grad(compiled(f)(x).square().sum(), second)
    leaves = [t.requires_grad_() for t in double(*second)]
    y = plain_gelu(_formula(*double(x, *first), None, 80, 120), "gelu")
    expected = torch.autograd.grad(_formula(y, *leaves, None, 120, 48).square().sum(), leaves)
    for a, e in zip(got, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize("plan", PLANS)
def test_half_precision_and_autocast(plan: str) -> None:
    """Weights are cast; biases are not, where that would be a launch of its own."""
    args = random(70, 160), *weights(120, 80), random(120), *weights(80, 120), random(80)

    def f(x, ws, wa, b, vs, va, c):
        y = mirror_perceptron(x, (ws, wa), b, (vs, va), c, "gelu")
        return mirror_linear(y, ws, wa, b, in_segment=40)

    def exact(x, ws, wa, b, vs, va, c):
        y = _formula(plain_gelu(_formula(x, ws, wa, b, 80, 120), "gelu"), vs, va, c, 120, 80)
        return _formula(y, ws, wa, b, 40, 120)

    with tuning.only(plan), torch.autocast(DEVICE, HALF):
        got = with_gradients(compiled(f), *args)
    assert got[0].dtype == HALF
    for a, e in zip(got, with_gradients(exact, *double(*args)), strict=True):
        close(a.to(HALF), e, 2)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_number_of_rows_is_kept_open() -> None:
    f, parameters = compiled(mirror_linear), [*weights(120, 80), random(120)]

    def open_rows(x, *rest):
        torch._dynamo.mark_dynamic(x, 0)
        return f(x, *rest)

    for rows in (70, 33, 260):
        x = random(rows, 160)
        with tuning.only("triton"):
            got = with_gradients(open_rows, x, *parameters)
        expected = with_gradients(lambda *a: _formula(*a, 80, 120), *double(x, *parameters))
        for a, e in zip(got, expected, strict=True):
            close(a, e, 2)


def test_rows_with_a_stride_and_transposed_weights() -> None:
    x, ws, wa = random(70, 200)[:, 8:168], *(t.t() for t in weights(80, 120))
    with tuning.only("triton"):
        y = compiled(mirror_linear)(x, ws, wa)
    close(y, _formula(*double(x, ws, wa), None, 80, 120))


def test_kernels_are_launched_directly(monkeypatch) -> None:
    """An attention and a perceptron of a network: one launch for each linear map, and none of
    the opaque operations."""
    names = targets(monkeypatch)
    block = Block(128, num_heads=2, init_values=1.0, device=DEVICE)
    x = random(2, 12, 128)
    with tuning.only("triton"), torch.no_grad():
        y = compiled(block)(x)
    with choice.plain(), torch.no_grad():
        close(y, block(x).double())
    assert sorted(set(names)) == ["linear_act_kernel", "linear_kernel"]


def test_plan_is_measured_once(monkeypatch) -> None:
    timed: list[str] = []

    def timer(run, best: float) -> float:
        run()
        timed.append("")
        return 1.0 / len(timed)  # the last one is the fastest

    tuner = tuning.Tuner(timer=timer, timing_allowed=lambda device: True)
    monkeypatch.setattr(tuning, "choose", tuner.choose)
    args = random(70, 160), *weights(120, 80), random(120)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no candidate disagrees
        for _ in range(2):
            torch.compiler.reset()
            y = compiled(mirror_linear)(*args)
    close(y, _formula(*double(*args), 80, 120))
    (decision,) = tuner.report()
    assert len(timed) == len(decision.milliseconds) > 2
    assert decision.chosen == list(decision.milliseconds)[-1]


def test_every_plan_agrees(monkeypatch) -> None:
    """All candidates of all operations, on the random tensors that decide."""
    tuner = tuning.Tuner(timer=lambda run, best: 1.0, timing_allowed=lambda device: True)
    monkeypatch.setattr(tuning, "choose", tuner.choose)
    args = random(70, 160), *weights(120, 80), random(120), *weights(80, 120), random(80)

    def f(x, ws, wa, b, vs, va, c):
        y = mirror_perceptron(x, (ws, wa), b, (vs, va), c, "gelu")
        return mirror_linear(mirror_gelu(y), ws, wa, b, in_segment=40, out_segment=40)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with_gradients(compiled(f), *args)
    assert {d.op for d in tuner.report()} == {
        "mirror_linear",
        "mirror_linear_act",
        "mirror_linear_weight_grad",
        "mirror_gelu",
        "mirror_gelu_backward",
    }
    assert all(len(d.milliseconds) > 2 for d in tuner.report())


@pytest.mark.parametrize("op", ["linear", "linear_act", "gelu", "perceptron"])
def test_opcheck(op: str) -> None:
    x, first, second = random(9, 96), weights(64, 48), weights(48, 64)
    args = {
        "linear": (x, *first, random(64), 24, 64),
        "linear_act": (x, *first, None, 48, "gelu", True),
        "gelu": (x, "quick_gelu"),
        "perceptron": (x, *first, random(64), *second, None, "gelu", True),
    }[op]
    args = tuple(t.requires_grad_() if isinstance(t, Tensor) else t for t in args)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with tuning.only("plain"):
        torch.library.opcheck(getattr(torch.ops.deit, f"direct_{op}"), args, test_utils=tests)


def test_no_gradients_of_second_order() -> None:
    args = [t.requires_grad_() for t in (random(9, 96), *weights(64, 48))]
    with tuning.only("plain"):
        y = torch.ops.deit.direct_linear(*args, None, 48, 64)
        (dw,) = torch.autograd.grad(y.square().sum(), args[1], create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            dw.sum().backward()


# --- the trial --------------------------------------------------------------------------------


def test_trial_passes() -> None:
    backends.trusted.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert trial.trust_compiler(DEVICE)
        assert trial.trust_compiler(DEVICE)
    assert len(backends.trusted) == 1


def test_trial_does_nothing_when_plain() -> None:
    backends.trusted.clear()
    with choice.plain():
        assert not trial.trust_compiler(DEVICE)
    assert not backends.trusted


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_failed_trial(fault: str, monkeypatch) -> None:
    """The opaque operations stay, and one warning says why."""
    launch = direct.linear_launch.linear

    def broken(*args):
        if fault == "raises":
            raise TypeError("no such argument")
        y = launch(*args)
        return y + torch.nn.functional.one_hot(torch.tensor(0), y.shape[1]).to(y) * y

    backends.trusted.clear()
    names = targets(monkeypatch)
    monkeypatch.setattr(direct.linear_launch, "linear", broken)
    with pytest.warns(RuntimeWarning, match="norm" if fault == "wrong" else "no such") as caught:
        answers = [trial.trust_compiler(DEVICE) for _ in range(2)]
    assert answers == [False, False]
    assert [w.category for w in caught].count(RuntimeWarning) == 1
    assert not backends.trusted
    names.clear()
    args = random(70, 160), *weights(120, 80)
    close(compiled(mirror_linear)(*args), _formula(*double(*args), None, 80, 120))
    assert not names
