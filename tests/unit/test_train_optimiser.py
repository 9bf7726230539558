"""Loss, parameter groups, schedule and the running average."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from train.config import OptimiserConfig
from train.optimiser import (
    UsedRows,
    learning_rate_factor,
    make_average,
    make_loss,
    make_mixout,
    parameter_groups,
    products_in,
)


class TinyEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.encoder = nn.Module()
        self.encoder.relative_attention_bias = nn.Embedding(5, 2)
        self.encoder.layer = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.LayerNorm = nn.LayerNorm(4)
        self.classifier = nn.Linear(4, 3)


def rate_of(groups: list[dict[str, object]], wanted: nn.Parameter) -> tuple[float, float]:
    for group in groups:
        if any(parameter is wanted for parameter in group["params"]):  # type: ignore[union-attr]
            return group["lr"], group["weight_decay"]  # type: ignore[return-value]
    raise AssertionError("in no group")


def test_every_parameter_is_in_one_group_with_its_rate() -> None:
    model = TinyEncoder()
    config = OptimiserConfig(learning_rate=1.0, head_learning_rate=0.9, layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(model, config)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert rate_of(groups, model.classifier.weight) == (0.9, 0.1)
    assert rate_of(groups, model.encoder.layer[1].weight) == (0.5, 0.1)
    assert rate_of(groups, model.encoder.layer[0].bias) == (0.25, 0.0)
    assert rate_of(groups, model.embeddings.weight) == (0.125, 0.1)
    assert rate_of(groups, model.encoder.relative_attention_bias.weight) == (0.125, 0.1)
    assert rate_of(groups, model.LayerNorm.weight) == (0.9, 0.0)


def test_mixed_weights_are_the_first_ones_or_scaled_beyond_the_trained_ones() -> None:
    model = TinyEncoder()
    draw = make_mixout(model, 0.75)
    layer = model.encoder.layer[0]
    first = layer.weight.detach().clone()
    assert torch.equal(draw()["encoder.layer.0.weight"], first)
    with torch.no_grad():
        layer.weight += 1

    drawn = torch.stack([draw()["encoder.layer.0.weight"] for _ in range(500)])
    assert set(((drawn - first) * 1e3).round().flatten().tolist()) == {0.0, 4000.0}
    assert drawn.mean(dim=0).sub(layer.weight).abs().max() < 0.4

    weight = draw()["encoder.layer.0.weight"]
    weight.sum().backward()
    assert torch.allclose(layer.weight.grad, torch.where(weight == first, 0.0, 4.0))


def test_what_is_in_no_layer_is_not_mixed() -> None:
    assert set(make_mixout(TinyEncoder(), 0.5)()) == {"encoder.layer.0.weight", "encoder.layer.1.weight"}


def test_the_prior_is_in_the_loss_alone() -> None:
    prior = torch.tensor([0.1, 0.6, 0.3]).log()
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    adjusted = make_loss(OptimiserConfig(prior_tau=1.0), prior)(logits, labels, None)
    assert adjusted.item() == pytest.approx(-(torch.tensor([0.1, 0.6]).log().mean().item()))
    plain = make_loss(OptimiserConfig(), prior)(logits, labels, None)
    assert plain.item() == pytest.approx(torch.tensor(3.0).log().item())


def test_the_loss_is_shared_between_labels_and_teachers() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([2])
    soft = torch.tensor([[0.5, 0.3, 0.2]])
    log_probabilities = logits.log_softmax(dim=-1)[0]
    loss = make_loss(OptimiserConfig(), torch.zeros(3), soft_weight=0.75)
    expected = -0.25 * log_probabilities[2] - 0.75 * (soft[0] * log_probabilities).sum()
    assert loss(logits, labels, soft).item() == pytest.approx(expected.item())
    assert loss(logits, labels, None).item() == pytest.approx(-log_probabilities[2].item())


@given(st.lists(st.floats(-8, 8), min_size=12, max_size=12), st.floats(0.1, 5))
def test_two_passes_cost_what_they_disagree_about(values: list[float], weight: float) -> None:
    first, second = torch.tensor(values).reshape(2, 2, 3)
    labels, soft = torch.tensor([0, 2]), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    plain = make_loss(OptimiserConfig(), torch.zeros(3), soft_weight=0.6)
    loss = make_loss(OptimiserConfig(rdrop=weight), torch.zeros(3), soft_weight=0.6)
    p, q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    both_ways = nn.functional.kl_div(p, q, reduction="batchmean", log_target=True)
    both_ways += nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    expected = (plain(first, labels, soft) + plain(second, labels, soft)) / 2 + weight * both_ways / 2
    assert loss(torch.cat([first, second]), labels, soft).item() == pytest.approx(expected.item(), abs=1e-4, rel=1e-4)
    again = loss(torch.cat([first, first]), labels, None).item()
    assert again == pytest.approx(plain(first, labels, None).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("features", "precision", "dtype"),
    [
        ({"avx2"}, "bf16", torch.float32),
        (None, "bf16", torch.float32),
        ({"avx2", "avx512_bf16"}, "bf16", torch.bfloat16),
        ({"avx2", "avx512_bf16"}, "fp32", torch.float32),
    ],
)
def test_bf16_is_for_processors_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, features: set[str] | None, precision: Literal["bf16", "fp32"], dtype: torch.dtype
) -> None:
    monkeypatch.setattr("train.optimiser.read_cpu_features", lambda: features and frozenset(features))
    products = products_in(precision, torch.device("cpu"))
    for _ in range(2):
        with products:
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_climbs_and_then_falls_to_zero(schedule: str) -> None:
    factor = learning_rate_factor(OptimiserConfig(warmup=0.1, schedule=schedule), 100)
    rates = [factor(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)
    assert min(rates) >= 0


def test_the_average_starts_at_the_weights_and_follows() -> None:
    model = nn.Linear(2, 2)
    average = make_average(model, OptimiserConfig(ema_decay=0.5))
    assert average is not None
    start = model.weight.detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        model.weight += 1
    average.update_parameters(model)
    assert torch.allclose(average.module.weight, start + 0.5)
    assert make_average(model, OptimiserConfig(ema_decay=0.0)) is None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 4)
        self.head = nn.Linear(4, 3)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.words(ids).mean(dim=1))
        return scores


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_gradients_of_used_rows_train_as_those_of_all_rows(max_norm: float) -> None:
    torch.manual_seed(3)
    plain = Words()
    model = Words()
    model.load_state_dict(plain.state_dict())
    rows = UsedRows(model)
    optimisers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (plain, model)]
    for _ in range(4):
        # The same word twice in a text, and two passes before a step.
        texts = [torch.tensor([[number, number, 7]]) for number in torch.randint(0, 50, (2,)).tolist()]
        for one in (plain, model):
            for ids in texts:
                one(ids).pow(2).sum().backward()
        assert model.words.weight.grad is not None
        assert model.words.weight.grad.is_sparse
        nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        rows.clip(max_norm)
        for mine, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine.grad, wanted.grad, atol=1e-7)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
