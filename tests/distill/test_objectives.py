"""Objectives against closed forms, spelled-out sums in float64, and torch's own gradients."""

import importlib.util
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridlib.distill.objectives import (
    _loss_and_gradient,
    alignment_loss,
    check_divergence,
    divergence,
    divergence_from_hidden,
)

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KINDS = {
    "forward": dict(kind="forward"), "reverse": dict(kind="reverse"), "js": dict(kind="jensen_shannon"),
    "js 0.2": dict(kind="jensen_shannon", beta=0.2),
    **{f"ab {a} {b}": dict(kind="alpha_beta", alpha=a, beta=b) for a, b in (
        (0.2, 0.7), (1, 0), (0, 1), (0.5, 0), (0, 0.5), (0, 0), (0.5, -0.5), (2, -0.5), (1, 1))},
}
FINITE = [name for name, k in KINDS.items() if k.get("beta", 0) >= 0]


def every(names=tuple(KINDS)):
    return pytest.mark.parametrize("kind", [pytest.param(KINDS[name], id=name) for name in names])


def spelled_out(p, q, kind, alpha=None, beta=None):
    """The divergence of each row of probabilities, as its source writes it."""
    if kind == "forward":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse":
        return (q * (q / p).log()).sum(-1)
    if kind == "jensen_shannon":
        beta = 0.5 if beta is None else beta
        m = beta * p + (1 - beta) * q
        return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    a, b, s = alpha, beta, alpha + beta
    if a == 0 and b == 0:
        terms = (p / q).log() ** 2 / 2
    elif a == 0:
        terms = (q**b * (q**b / p**b).log() - q**b + p**b) / b**2
    elif b == 0:
        terms = (p**a * (p**a / q**a).log() - p**a + q**a) / a**2
    elif s == 0:
        terms = ((q**a / p**a).log() + p**a / q**a - 1) / a**2
    else:
        terms = -(p**a * q**b - a / s * p**s - b / s * q**s) / (a * b)
    return terms.sum(-1)


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@every()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_the_spelled_out_sum(kind, temperature):
    teacher, student = tensors((4, 9), (4, 9), dtype=torch.float64)
    expected = spelled_out((teacher / temperature).softmax(-1), (student / temperature).softmax(-1), **kind)
    got = divergence(teacher, student, **kind, temperature=temperature)
    torch.testing.assert_close(got, temperature**2 * expected, rtol=1e-10, atol=1e-12)
    assert divergence(teacher, teacher, **kind, temperature=temperature).abs().max() < 1e-12


def test_exponents_that_add_up_to_0_but_for_rounding_are_taken_as_such():
    logits = tensors((4, 9), (4, 9), dtype=torch.float64)
    near, exact = (divergence(*logits, kind="alpha_beta", alpha=0.1 + 0.2, beta=b) for b in (-0.3, -(0.1 + 0.2)))
    assert torch.equal(near, exact)


@every()
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [3, 10, 100])
def test_from_hidden_has_the_value_and_gradients_of_the_plain_formula(kind, temperature, chunk):
    teacher_hidden, teacher_head, x, w = tensors((2, 5, 6), (17, 6), (2, 5, 4), (17, 4), dtype=torch.float64)
    x.requires_grad_(), w.requires_grad_()
    p, q = (teacher_hidden @ teacher_head.T / temperature).softmax(-1), (x @ w.T / temperature).softmax(-1)
    plain = temperature**2 * spelled_out(p, q, **kind).mean()
    expected = torch.autograd.grad(plain * 3, (x, w))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
        hidden, head = (y.detach().to(dtype).requires_grad_() for y in (x, w))
        loss = divergence_from_hidden(teacher_hidden.to(dtype), teacher_head.to(dtype), hidden, head, **kind,
                                      temperature=temperature, chunk=chunk)
        got = torch.autograd.grad(loss * 3, (hidden, head))
        assert loss.dtype == dtype and loss.item() == pytest.approx(plain.item(), rel=tolerance)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype and (a - b).norm() / b.norm() < tolerance


@every(FINITE)
def test_extreme_logits_stay_finite(kind):
    hidden, head = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    student = [(-hidden).requires_grad_(), head.clone().requires_grad_()]
    loss = divergence_from_hidden(hidden, head, *student, **kind)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, student))


def finite_without(side, kind, alpha=None, beta=None):
    """Whether the divergence is finite where only the teacher (or the student) has tokens of probability 0."""
    if kind != "alpha_beta":
        return kind == "jensen_shannon" or kind == {"teacher": "forward", "student": "reverse"}[side]
    return alpha + beta > 0 and {"teacher": alpha, "student": beta}[side] > 0


@every()
@pytest.mark.parametrize("side", ["both", "teacher", "student"])
def test_tokens_of_probability_0_add_what_the_limit_does(kind, side):
    teacher, student = tensors((4, 9), (4, 9), dtype=torch.float64)
    masked = [x.index_fill(-1, torch.tensor([2, 5]), -math.inf) if side in ("both", name) else x
              for name, x in (("teacher", teacher), ("student", student))]
    if side != "both" and not finite_without(side, **kind):
        assert not divergence(*masked, **kind).isfinite().any()
        return
    if side == "both":
        left = [0, 1, 3, 4, 6, 7, 8]
        p, q = (x[:, left] for x in masked)
    else:
        left, (p, q) = range(9), (x.masked_fill(x == -math.inf, -400) for x in masked)
    q = q.clone().requires_grad_()
    expected = spelled_out(p.softmax(-1), q.softmax(-1), **kind)
    slope = torch.zeros_like(student)
    slope[:, left] = torch.autograd.grad(expected.sum(), q)[0]
    torch.testing.assert_close(divergence(*masked, **kind), expected.detach(), rtol=1e-10, atol=1e-12)
    alpha, beta = check_divergence(kind["kind"], kind.get("alpha"), kind.get("beta"))
    gradient = masked[1].clone()
    _loss_and_gradient(masked[0], gradient, kind["kind"], alpha, beta, 1.0)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)


def test_logits_beyond_the_smallest_number_have_a_divergence_and_gradients():
    hidden = torch.tensor([[1e30, 1.0]])
    heads = [torch.tensor([[0, 0], [0, x], [y, 1]]) for x, y in ((1.0, -1e10), (2.0, 0.0))]
    assert (hidden @ heads[0].T).tolist() == [[0, 1, -math.inf]]
    student = [hidden.clone().requires_grad_(), heads[1].requires_grad_()]
    loss = divergence_from_hidden(hidden, heads[0], *student)
    z = math.e / (1 + math.e)
    total = math.log(1 + math.e**2 + math.e)
    assert loss.item() == pytest.approx((1 - z) * math.log(1 - z) + z * (math.log(z) - 2) + total, rel=1e-6)
    assert loss.item() == pytest.approx(.363, abs=5e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, student))


@every()
def test_half_precision_stays_near_float32(kind):
    teacher_hidden, teacher_head, *inputs = tensors((2, 50, 16), (97, 16), (2, 50, 16), (97, 16))
    teacher_head /= 4
    inputs = [x.requires_grad_() for x in (inputs[0], inputs[1] / 2)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = divergence_from_hidden(teacher_hidden, teacher_head, *inputs, **kind)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32 and (half - exact).norm() / exact.norm() < 3e-2


def test_the_gradient_of_a_half_precision_head_is_summed_in_float32():
    inputs = tensors((400, 8), (30, 8), (400, 8), (30, 8), dtype=torch.bfloat16)
    head = inputs[-1].requires_grad_()
    one, many = (torch.autograd.grad(divergence_from_hidden(*inputs, chunk=chunk), head)[0] for chunk in (400, 1))
    assert one.dtype == torch.bfloat16 and (one - many).norm() / one.norm() < 5e-3  # bfloat16's rounding is 2e-3


def test_only_what_needs_a_gradient_gets_one(monkeypatch):
    teacher_hidden, teacher_head, hidden, head = tensors((6, 3), (7, 3), (6, 2), (7, 2))
    whole = [x.clone().requires_grad_() for x in (hidden, head)]
    expected = torch.autograd.grad(divergence_from_hidden(teacher_hidden, teacher_head, *whole), whole)
    for i in (0, 1):
        mine = [hidden.clone(), head.clone()]
        mine[i].requires_grad_()
        teacher = [x.clone().requires_grad_() for x in (teacher_hidden, teacher_head)]
        divergence_from_hidden(*teacher, *mine).backward()
        assert torch.equal(mine[i].grad, expected[i]) and mine[1 - i].grad is None
        assert all(x.grad is None for x in teacher)
    with torch.no_grad():
        monkeypatch.setattr("hybridlib.distill.objectives._add_product", lambda *_: pytest.fail("computed a gradient"))
        assert not divergence_from_hidden(teacher_hidden, teacher_head, *whole).requires_grad


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@every()
def test_no_tensor_is_larger_than_a_chunk_of_logits_and_none_of_them_outlives_it(kind):
    tokens, vocab, width, chunk = 64, 50, 6, 8
    teacher_hidden, teacher_head, hidden, head = tensors((tokens, width), (vocab, width), (tokens, 4), (vocab, 4))
    inputs = [hidden.requires_grad_(), head.requires_grad_()]
    with _Largest() as largest:
        loss = divergence_from_hidden(teacher_hidden, teacher_head, *inputs, **kind, chunk=chunk)
        assert sorted(x.numel() for x in loss.grad_fn.saved_tensors) == [vocab * 4, tokens * 4]
        loss.backward()
    assert largest.elements == chunk * vocab


def test_alignment_loss_is_error_over_power():
    teacher = torch.tensor([[[3.0, 4.0]]])  # mean square 12.5
    assert alignment_loss(teacher + 1, teacher).item() == pytest.approx(1 / 12.5)
    assert alignment_loss(teacher + 1, teacher, normalize=False).item() == pytest.approx(1.0)
    assert alignment_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1.0)


AB = dict(kind="alpha_beta")


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(kind="kl"), "kind='kl' is unknown; choose one of 'forward', 'reverse'"),
    (dict(alpha=1), "alpha=1 is not taken by kind='forward'"),
    (dict(kind="jensen_shannon", beta=1), "beta=1 is not a number above 0 and below 1"),
    (AB, "alpha=None is not a number that is 0 or at least 0.01 in size"),
    (dict(AB, alpha=0.5, beta=1e-3), "beta=0.001 is not a number that is 0 or"),
    (dict(AB, alpha=0.5, beta=-0.501), "alpha \\+ beta=-0.001.* is not"),
    *((dict(temperature=t), "temperature=.* is not a number above 0") for t in (0, -1.0, float("nan"), "hot")),
    (dict(chunk=0), "chunk=0 is not a whole number of at least 1"),
    (dict(backend="cuda"), "backend='cuda' is unknown; choose one of 'auto', 'torch', 'triton'"),
    (dict(backend="triton"), "backend='triton' cannot run here: the kernel needs tensors on a CUDA GPU"),
    (dict(teacher_hidden=torch.zeros(5, 3)), "teacher_hidden has shape \\(5, 3\\); .* tokens, \\(4,\\)"),
    (dict(student_hidden=torch.zeros(0, 2)), "hidden has shape .* it must be \\(..., width\\), with a token"),
    (dict(teacher_head=torch.zeros(7, 3)), "teacher_head has shape \\(7, 3\\); it must be \\(6, 3\\)")])
def test_bad_arguments_are_refused(arguments, message):
    good = dict(teacher_hidden=torch.zeros(4, 3), teacher_head=torch.zeros(6, 3), student_hidden=torch.zeros(4, 2),
                student_head=torch.zeros(6, 2))
    with pytest.raises(ValueError, match=message):
        divergence_from_hidden(**(good | arguments))


SIZES = [(torch.float32, 200, 200), (torch.float32, 37, 64), (torch.bfloat16, 37, 64)]  # dtype, vocab, its padded width
SIZED = ("forward", "reverse", "js 0.2", "ab 0.2 0.7")  # one of each kind of the kernel, in all sizes


def kernel_errors():
    """Print, for each kind, dtype and size, the kernel's relative errors; runs under Triton's interpreter."""
    from hybridlib.distill import objectives
    from hybridlib.kernels.divergence import loss_and_gradient
    from tests.kernels.interpreter import patch_language_once

    patch_language_once()
    errors = []
    for name, k in KINDS.items():
        settings = (k["kind"], k.get("alpha"), k.get("beta", 0.5 if k["kind"] == "jensen_shannon" else None))
        for dtype, vocab, width in SIZES if name in SIZED else SIZES[:1]:
            logits = [3 * x for x in tensors((2, width), (2, width))]
            for x in logits:
                x[:, vocab:] = math.nan  # padding
            teacher, student = (x.to(dtype)[:, :vocab] for x in logits)
            leaf = (student.double() / 1.7).requires_grad_()
            p, q = (teacher.double() / 1.7).softmax(-1), leaf.softmax(-1)
            expected = spelled_out(p, q, *settings)
            gradient, = torch.autograd.grad(expected.sum(), leaf)
            loss = loss_and_gradient(teacher, student, *settings, 1.7, block=64)
            errors.append((name, str(dtype), (loss / expected - 1).abs().max().item(),
                           ((student - gradient).norm() / gradient.norm()).item()))
        extreme = 1e4 * torch.tensor([[1.0, -1.0, 0.5]])
        loss = loss_and_gradient(extreme, student := -extreme, *settings, 1.0)
        if name in FINITE and not (loss.isfinite().all() and student.isfinite().all()):
            errors.append((name, "extreme", math.inf, math.inf))
    objectives._why_not_triton = lambda *_: None  # it would say that there is no GPU
    results = []
    for backend in ("torch", "auto"):
        teacher_hidden, teacher_head, *inputs = tensors((5, 6), (17, 6), (5, 4), (17, 4))
        inputs = [x.requires_grad_() for x in inputs]
        loss = divergence_from_hidden(teacher_hidden, teacher_head, *inputs, chunk=2, backend=backend)
        results.append((loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs)])))
    (loss, gradient), (kernel_loss, kernel_gradient) = results
    errors.append(("whole", "float32", abs(kernel_loss / loss - 1).item(),
                   ((kernel_gradient - gradient).norm() / gradient.norm()).item()))
    print(json.dumps(errors))


@TRITON
def test_the_kernel_agrees_with_the_spelled_out_sums_under_the_interpreter(interpreted):
    status, printed = interpreted["kernel_errors"]
    assert status == 0, printed[-3000:]
    errors = json.loads(printed.splitlines()[-1])
    assert len(errors) == len(KINDS) + 2 * len(SIZED) + 1
    for name, dtype, loss, gradient in errors:
        assert loss < 5e-6 and gradient < (1e-2 if "bfloat16" in dtype else 1e-5), (name, dtype, loss, gradient)


@TRITON
@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon", "alpha_beta"])
def test_the_kernel_compiles_for_hopper(kind, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hybridlib.kernels.divergence import _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = dict(vocab=49_152, stride=49_152, kind=kind, alpha=0.2, beta=0.7, block=8192)
    types = dict(teacher="*bf16", student="*bf16", loss="*fp32", inverse_temperature="fp32")
    signature = {name: types.get(name, "constexpr") for name in _kernel.arg_names}
    places = {(_kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(_kernel, signature, constexprs=places, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 32})
    assert "ld.global.v4.b32" in compiled.asm["ptx"] and compiled.asm["cubin"]
