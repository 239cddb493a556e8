"""Masks drawn by token: fair, independent of each other in every direction, and the same however a batch is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from loraf.errors import ConfigError
from loraf_train.adapter.dropout import Dropout, TokenKeys, _mixed, keep_rate, random_mask

EXAMPLES, PLACES, D_IN = 24, 40, 402  # d_in is no multiple of the four lanes of a word
P = 0.3


def masks(seed=1, step=0, module="model.layers.0.mlp.up_proj", dropout=P, examples=EXAMPLES, d_in=D_IN):
    """The mask of a batch of whole examples, (examples, places, d_in)."""
    tokens = TokenKeys(seed)
    shape = (examples, PLACES)
    tokens.set(step, torch.arange(examples)[:, None].expand(shape), torch.arange(PLACES).expand(shape))
    size = torch.Size((*shape, d_in))
    return tokens.of(module).mask(tokens.keys, size, dropout).view(size)


def test_keys_are_mixed_as_splitmix64_does():
    """Against the published generator in Python's own integers: the state grows by γ, and is mixed."""
    state, expected = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert expected[0] == 6457827717110365317  # the first number of the reference implementation for this seed
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) % 2**64 for i in range(5)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [word % 2**64 for word in _mixed(signed).tolist()] == expected


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("rule", ["by token", "torch's generator"])
def test_a_mask_keeps_the_right_share_of_every_token_and_feature(rule, dropout):
    torch.manual_seed(0)
    size = torch.Size((EXAMPLES, PLACES, D_IN))
    drawn = masks(dropout=dropout) if rule == "by token" else random_mask(size, dropout, torch.device("cpu"))
    assert drawn.dtype == torch.bool and drawn.shape == size
    p = keep_rate(dropout)
    assert p == pytest.approx(1 - dropout, abs=2**-17)
    kept = drawn.double() - p
    variance = p * (1 - p)
    assert abs(kept.mean()) < 5 * (variance / kept.numel()) ** 0.5
    for among, of in (((0, 1), D_IN), ((1, 2), EXAMPLES), ((0, 2), PLACES)):  # features, examples, places
        sums = kept.sum(among)
        per_sum = variance * kept.numel() / of
        assert sums.abs().max() < 6 * per_sum**0.5
        assert abs(sums.square().mean() / per_sum - 1) < 6 * (2 / of) ** 0.5  # they vary as independent draws do


def test_dropout_is_never_of_everything():
    assert 0 < keep_rate(0.9999999) < 1e-4


def correlation(a: torch.Tensor, b: torch.Tensor, dropout: float) -> float:
    """In standard deviations of the correlation of independent masks."""
    p = keep_rate(dropout)
    a, b = a.double() - p, b.double() - p
    return float((a * b).sum() / (a.numel() ** 0.5 * p * (1 - p)))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_masks_of_other_seeds_steps_modules_examples_places_and_features_are_independent(dropout):
    drawn = masks(dropout=dropout)
    others = {
        "seed": masks(dropout=dropout, seed=2),
        "step": masks(dropout=dropout, step=1),
        "module": masks(dropout=dropout, module="model.layers.1.mlp.up_proj"),
        "example": drawn.roll(1, 0),
        "place": drawn.roll(1, 1),
    }
    others |= {f"feature {n} further": drawn.roll(n, 2) for n in (1, 2, 3, 4, 5, 8, 64)}
    for name, other in others.items():
        assert abs(correlation(drawn, other, dropout)) < 5, name
    if dropout == 0.5:  # whether two masks are equal is then as fair as a mask, and tells nothing of a third
        for one, two in itertools.combinations(others, 2):
            assert abs(correlation(drawn, others[one] == others[two], dropout)) < 5, (one, two)


def test_groups_of_entries_have_all_patterns_as_often_as_independent_draws():
    """χ² of the 16 patterns of four entries at a dropout of ½, for groups within a word, across words and tokens."""
    drawn = masks(dropout=0.5, d_in=400, examples=60)
    n = drawn.shape[0] * drawn.shape[1] * 100
    groups = {
        "four lanes of a word": drawn.view(60, PLACES, 100, 4),
        "four words": drawn.view(60, PLACES, 100, 4)[:, :, torch.randperm(100), :].transpose(2, 3).reshape(-1, 4),
        "two words of two tokens": torch.stack(
            [drawn[:, :, 0::4], drawn[:, :, 2::4], drawn[:, :, 0::4].roll(1, 1), drawn[:, :, 2::4].roll(1, 1)], -1
        ),
        "a step and a module": torch.stack(
            [masks(step=s, module=m, dropout=0.5, d_in=400, examples=60)[..., ::4] for s in (0, 1) for m in "ab"], -1
        ),
    }
    for name, group in groups.items():
        patterns = (group.reshape(-1, 4).long() * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16).double()
        assert patterns.sum() == n
        chi_square = float((patterns - n / 16).square().sum() / (n / 16))
        assert chi_square < 45, (name, chi_square)  # 15 degrees of freedom: one in 10,000 is above 44.3


def test_a_token_has_the_same_mask_wherever_it_stands():
    """Padded, in micro-batches, packed behind others, and flattened."""
    whole = masks()
    tokens, module = TokenKeys(1), "model.layers.0.mlp.up_proj"

    def mask_of(examples, places, *shape):
        tokens.set(0, torch.tensor(examples), torch.tensor(places))
        return tokens.of(module).mask(tokens.keys, torch.Size((*shape, D_IN)), P)

    packed = mask_of([[5, 5, 5, 2, 2, -1]], [[0, 1, 2, 0, 1, 0]], 1, 6)
    assert torch.equal(packed[:5], torch.cat([whole[5, :3], whole[2, :2]]))
    flat = mask_of([[7, 7], [3, 3]], [[0, 1], [0, 1]], 4)
    assert torch.equal(flat, torch.cat([whole[7, :2], whole[3, :2]]))
    heads = mask_of([[7, 7]], [[0, 1]], 1, 2, 3)  # three vectors of each token, each with a mask of its own
    again = mask_of([[0, 7]], [[9, 1]], 1, 2, 3)
    assert torch.equal(heads[3:], again[3:]) and len({tuple(row.tolist()) for row in heads}) == 6


@pytest.mark.parametrize("shape", [(3, D_IN), (2, 4, D_IN), (5, 2, D_IN), (D_IN,)])
def test_an_input_whose_tokens_are_unknown_is_refused_by_the_modules_name(shape):
    tokens = TokenKeys(1)
    tokens.set(0, torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"training.dropout: .* experts.0, .* for \(2, 5\) tokens → set drop"):
        tokens.of("experts.0").mask(tokens.keys, torch.Size(shape), P)


def test_the_module_scales_what_it_keeps_and_is_torchs_without_tokens():
    ours = Dropout(P)
    x = torch.rand(2, 5, 8) + 1
    torch.manual_seed(0)
    without = ours(x)
    torch.manual_seed(0)
    assert torch.equal(without, nn.Dropout(P)(x))
    tokens = TokenKeys(3)
    tokens.set(0, torch.arange(2)[:, None].expand(2, 5), torch.arange(5).expand(2, 5))
    ours.draws = tokens.of("lora")
    kept = ours.draws.mask(tokens.keys, x.shape, P).view(x.shape)
    torch.testing.assert_close(ours(x), torch.where(kept, x / keep_rate(P), 0))
    assert torch.equal(ours.eval()(x), x)
