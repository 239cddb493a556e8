"""The training layer: against autograd of the plain formula, and what it saves for its backward pass against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute

from loraf.matrices.sparse import SparseB
from loraf_train.adapter import layer as layers
from loraf_train.adapter.dropout import TokenKeys, keep_rate, random_mask
from loraf_train.adapter.layer import EarlierTasks, LorafLinear

D_IN, D_OUT, RANK, SCALE = 20, 14, 6, 1.75


def make(
    dtype=torch.float64, bias=True, dropout=0.0, with_earlier=True, d_in=D_IN, d_out=D_OUT, rank=RANK, seed=0
) -> LorafLinear:
    """A layer with random values at a third of the positions, and an earlier task at another third."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    a = torch.randn(rank, d_in, generator=g).to(dtype)
    order = torch.randperm(d_out * rank, generator=g)
    third = len(order) // 3
    old = SparseB.from_positions(order[third : 2 * third], torch.randn(third, generator=g).bfloat16(), (d_out, rank))
    earlier = EarlierTasks.of([(old, 0.5)] if with_earlier else [])
    values = torch.randn(third, generator=g, dtype=torch.float64)
    return LorafLinear(base, a, order[:third].sort().values, SCALE, earlier, dropout, values)


def slow(layer: LorafLinear, x: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """W·x + b + (scale·B + earlier)·A·(x·mask), all dense; the mask carries 1 / probability."""
    inner = x if mask is None else x * mask
    weight = SCALE * b + dense_earlier(layer)
    return nn.functional.linear(x, layer.base.weight, layer.base.bias) + inner @ layer.a.t() @ weight.t()


def dense_earlier(layer: LorafLinear) -> torch.Tensor:
    dense = torch.zeros(layer.base.out_features * layer.rank, dtype=layer.a.dtype)
    dense[layer.earlier_positions.long()] = layer.earlier_values.to(layer.a.dtype)
    return dense.view(-1, layer.rank)


def dense_values(layer: LorafLinear) -> torch.Tensor:
    dense = torch.zeros(layer.base.out_features * layer.rank, dtype=layer.a.dtype)
    dense[layer.positions.long()] = layer.values.detach().to(layer.a.dtype)
    return dense.view(-1, layer.rank).requires_grad_()


@pytest.mark.parametrize("shape", [(D_IN,), (5, D_IN), (2, 3, D_IN), (2, 2, 2, D_IN)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_earlier", [True, False])
def test_output_and_gradients_equal_those_of_the_dense_formula(shape, bias, dropout, with_earlier):
    layer = make(bias=bias, dropout=dropout, with_earlier=with_earlier)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(*shape[:-1], D_OUT, dtype=torch.float64)
    mask = None
    if dropout:
        torch.manual_seed(3)
        kept = random_mask(torch.Size((x.numel() // D_IN, D_IN)), dropout, x.device)
        mask = kept.view(shape).double() / keep_rate(dropout)
        assert not kept.all()
    torch.manual_seed(3)
    y = layer(x)
    y.backward(gradient)
    slow_x, b = x.detach().clone().requires_grad_(), dense_values(layer)
    slow_y = slow(layer, slow_x, b, mask)
    slow_y.backward(gradient)
    torch.testing.assert_close(y, slow_y)
    torch.testing.assert_close(x.grad, slow_x.grad)
    torch.testing.assert_close(layer.values.grad, b.grad.view(-1)[layer.positions.long()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_agree_with_finite_differences(dropout):
    layer = make(dropout=dropout, d_in=7, d_out=5, rank=3)

    def run(x, values):
        torch.manual_seed(1)  # the same dropout each time
        return layers._LorafLinear.apply(x, values, layer)

    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.values.detach().clone().requires_grad_()))


def test_only_the_values_are_trained_and_the_base_is_unchanged():
    layer = make(torch.float32)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    before = {name: tensor.clone() for name, tensor in layer.base.state_dict().items()}
    start = layer.values.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        layer(torch.randn(4, D_IN)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.values, start)
    for name, tensor in layer.base.state_dict().items():
        assert torch.equal(tensor, before[name])
    outside = layer.b(layer.values.detach(), torch.float32).view(-1).clone()
    outside[layer.positions.long()] = 0
    torch.testing.assert_close(outside.view(-1, RANK), dense_earlier(layer))


def test_an_input_that_needs_no_gradient_gets_none_while_the_values_do():
    layer = make()
    layer(torch.randn(3, D_IN, dtype=torch.float64)).sum().backward()
    assert layer.values.grad.abs().sum() > 0
    with torch.no_grad():
        assert not layer(torch.randn(3, D_IN, dtype=torch.float64)).requires_grad


def test_evaluation_has_no_dropout():
    layer = make(dropout=0.9).eval()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), slow(layer, x, dense_values(layer)))


def by_token(layer: LorafLinear, shape: tuple[int, int], seed: int = 5) -> LorafLinear:
    """The layer with its dropout drawn by token, for a batch of (rows, width)."""
    tokens = TokenKeys(seed)
    tokens.set(0, torch.arange(shape[0])[:, None].expand(shape), torch.arange(shape[1]).expand(shape))
    layer.draws = tokens.of("layer")
    return layer


@pytest.mark.parametrize("flat", [False, True])
def test_dropout_by_token_equals_the_dense_formula_with_the_mask_that_is_drawn(flat):
    layer = by_token(make(dropout=0.4), (2, 3))
    x = torch.randn(2, 3, D_IN, dtype=torch.float64).view((6, D_IN) if flat else (2, 3, D_IN)).requires_grad_()
    kept = layer.draws.mask(layer.draws.tokens.keys, x.shape, 0.4)
    assert not kept.all()
    mask = kept.view(x.shape).double() / keep_rate(0.4)
    y = layer(x)
    y.square().sum().backward()
    slow_x, b = x.detach().clone().requires_grad_(), dense_values(layer)
    slow_y = slow(layer, slow_x, b, mask)
    slow_y.square().sum().backward()
    torch.testing.assert_close(y, slow_y)
    torch.testing.assert_close(x.grad, slow_x.grad)
    torch.testing.assert_close(layer.values.grad, b.grad.view(-1)[layer.positions.long()])


def test_bfloat16_is_close_to_the_exact_formula_and_values_stay_float32():
    exact = make(torch.float64)
    layer = make(torch.bfloat16)
    assert torch.equal(layer.a, exact.a.bfloat16())
    x = torch.randn(64, D_IN, dtype=torch.float64)
    y = layer(x.bfloat16())
    y.backward(torch.ones_like(y))
    assert (
        y.dtype == torch.bfloat16 and layer.values.dtype == torch.float32 and layer.values.grad.dtype == torch.float32
    )
    rounded = make(torch.float64)  # the exact formula on the rounded weights
    rounded.base.load_state_dict({k: v.double() for k, v in layer.base.state_dict().items()})
    rounded.a.copy_(layer.a)
    slow_y = rounded(x.bfloat16().double())
    slow_y.backward(torch.ones_like(slow_y))
    assert (y.double() - slow_y).norm() < 0.01 * slow_y.norm()
    assert (layer.values.grad.double() - rounded.values.grad).norm() < 0.01 * rounded.values.grad.norm()


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients():
    layer, exact = make(torch.float32), make(torch.float32)
    x = torch.randn(2, 30, D_IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    slow_x = x.detach().clone().requires_grad_()
    slow_y = exact(slow_x)
    slow_y.square().mean().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.values.grad.dtype == torch.float32
    for fast, reference in ((y, slow_y), (x.grad, slow_x.grad), (layer.values.grad, exact.values.grad)):
        assert (fast.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("drawn_by_token", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(drawn_by_token):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        first, second = make(dropout=0.3, d_out=D_IN, seed=1), make(dropout=0.3, seed=2)
        if drawn_by_token:
            first, second = by_token(first, (2, 3), 1), by_token(second, (2, 3), 2)
        x = torch.randn(2, 3, D_IN, dtype=torch.float64)

        def block(x, first=first, second=second):
            return second(torch.tanh(first(x)))

        y = recompute(block, x, use_reentrant=False) if checkpointed else block(x)
        y.square().sum().backward()
        results.append((y.detach(), first.values.grad, second.values.grad))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_earlier_tasks_are_the_scaled_sum_of_stored_values():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    one = SparseB.from_positions(order[:20], torch.randn(20).bfloat16(), (10, 6))
    two = SparseB.from_positions(order[20:45], torch.randn(25).half(), (10, 6))
    earlier = EarlierTasks.of([(one, 2.0), (two, 0.25)])
    dense = torch.zeros(60)
    dense[earlier.positions.long()] = earlier.values
    assert torch.equal(dense.view(10, 6), one.dense() * 2.0 + two.dense() * 0.25)


class Kept:
    """Records what autograd saves, except the module's parameters and buffers (which exist anyway)."""

    def __init__(self, module: nn.Module):
        self._own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self.tensors: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._hooks.__exit__(*exc)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self._own:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    @property
    def what(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return sorted(((tuple(t.shape), t.dtype) for t in self.tensors.values()), key=str)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_backward_pass_saves_rank_numbers_per_token_where_peft_saves_the_input(dropout):
    """The input is a new tensor, as in a model, so that whatever the layer saves of it is counted."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear

    tokens, d_in, d_out, rank = 50, 96, 80, 8
    ours = by_token(make(torch.float32, dropout=dropout, d_in=d_in, d_out=d_out, rank=rank), (5, 10))
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, init_lora_weights=False)
    base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    theirs = LoraLinear(base, "default", config=config, r=rank, lora_alpha=rank, lora_dropout=dropout)
    source = torch.randn(5, 10, d_in, requires_grad=True)
    kept = {}
    for name, module in (("ours", ours), ("peft", theirs), ("base alone", base)):
        x = source + 1  # addition keeps nothing itself
        with Kept(module.train()) as kept[name]:
            y = module(x)
        if name == "ours":
            held = [v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)]
            assert held == []  # nothing kept past the hooks
        y.sum().backward()
    z = ((tokens, rank), torch.float32)
    keys = ((5, 10), torch.int64)
    assert kept["base alone"].what == []
    assert kept["ours"].what == sorted([z, keys] if dropout else [z], key=str)
    assert ours.draws.tokens.keys.data_ptr() in kept["ours"].tensors or not dropout  # which all layers share
    assert kept["ours"].bytes == tokens * rank * 4 + (tokens * 8 if dropout else 0)
    wide = [t for t in kept["peft"].tensors.values() if t.shape[-1] == d_in and t.dtype == torch.float32]
    assert wide, "PEFT keeps the input of its trainable A: if it no longer does, this comparison has to change"
    assert kept["peft"].bytes >= tokens * d_in * 4 + tokens * rank * 4


class Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("at_once", [1, 7 * RANK, D_OUT * RANK, 1 << 18])
def test_the_gradient_of_b_is_computed_a_block_of_rows_at_a_time(monkeypatch, at_once):
    whole = make()
    monkeypatch.setattr(layers, "GRADIENT_AT_ONCE", at_once)
    layer = make()
    g, z = torch.randn(9, D_OUT, dtype=torch.float64), torch.randn(9, RANK, dtype=torch.float64)
    with Products() as products:
        gradient = layer.gradient(g, z)
    assert products.shapes and max(rows * columns for rows, columns in products.shapes) <= max(at_once, RANK)
    torch.testing.assert_close(gradient, whole.gradient(g, z))
    torch.testing.assert_close(gradient, (g.t() @ z).view(-1)[layer.positions.long()] * SCALE)


def test_blocks_without_positions_are_skipped():
    base = nn.Linear(4, 1000, bias=False).requires_grad_(False)
    layer = LorafLinear(base, torch.randn(1 << 10, 4), torch.tensor([3, (999 << 10) + 5]), 1.0)
    assert [rows.start for rows, _ in layer._row_blocks] == [0, 768]
    g, z = torch.randn(6, 1000), torch.randn(6, 1 << 10)
    expected = torch.stack([g[:, 0] @ z[:, 3], g[:, 999] @ z[:, 5]])
    torch.testing.assert_close(layer.gradient(g, z), expected)
