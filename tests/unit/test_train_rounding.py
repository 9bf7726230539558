"""Quantisation-aware training: what is rounded, to what, and what is left alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from train.graph import Scale
from train.rounding import Rounding, round_weight


class Classifier(nn.Module):
    """Two layers that read the tokens, one after them, and a head that reads their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        vectors: Tensor = self.out(self.query(tokens) * self.key(tokens))
        return self.head(vectors.mean(dim=1))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def texts() -> list[Tensor]:
    return [torch.randn(1, 5 + number, 8) for number in range(4)]


def measured(model: Classifier, texts: list[Tensor]) -> Rounding:
    rounding = Rounding(model)
    rounding.measure(model, [lambda one=one: model(one) for one in texts])  # type: ignore[misc]
    return rounding


@given(arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_a_weight_is_at_most_half_a_step_away_and_its_largest_stays(values: np.ndarray) -> None:
    rounded = round_weight(torch.from_numpy(values)).numpy()

    largest = np.abs(values).max(axis=1, keepdims=True)
    assert (np.abs(rounded - values) <= largest / 127 * 0.501 + 1e-12).all()
    assert np.allclose(np.abs(rounded).max(axis=1, keepdims=True), largest, rtol=1e-5, atol=1e-12)


@given(
    arrays(np.float32, 7, elements=st.floats(-1e3, 1e3, width=32)),
    st.floats(1e-3, 1.0).map(np.float32),
    st.integers(0, 255),
)
def test_inputs_are_rounded_as_onnx_quantises_them(values: np.ndarray, step: np.float32, zero: int) -> None:
    layer, rounding = nn.Linear(7, 1, bias=False), Rounding()
    layer.weight.data = torch.eye(7)
    rounding._scales["layer"] = Scale(float(step), zero)
    rounded = rounding._forward("layer", layer, torch.from_numpy(values)).detach().numpy()

    # QuantizeLinear of the ONNX standard, and back.
    expected = (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step
    assert np.allclose(rounded, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_rounded_before_scales_are_measured(model: Classifier, texts: list[Tensor]) -> None:
    plain = model(texts[0])
    Rounding(model)

    assert torch.equal(model(texts[0]), plain)


def test_layers_that_read_tokens_are_rounded_and_the_head_is_not(model: Classifier, texts: list[Tensor]) -> None:
    plain = [model(one).detach() for one in texts]
    measured(model, texts)
    rounded = [model(one).detach() for one in texts]

    for before, after in zip(plain, rounded, strict=True):
        assert not torch.equal(before, after)
        assert (before - after).abs().max() < 0.05
    vectors = torch.randn(2, 8)
    assert torch.equal(model.head(vectors), nn.functional.linear(vectors, model.head.weight, model.head.bias))


def test_a_layer_reads_no_more_than_256_values(model: Classifier, texts: list[Tensor]) -> None:
    measured(model, texts)
    model.query.weight.data = torch.eye(8)
    model.query.bias.data.zero_()

    # Texts that are far outside of what was measured come out at the ends of the scale.
    assert len(model.query(torch.linspace(-100, 100, 80_000).reshape(1, -1, 8)).unique()) == 256


def test_gradients_reach_the_weights_that_are_kept(model: Classifier, texts: list[Tensor]) -> None:
    names = set(model.state_dict())
    measured(model, texts)
    model(texts[0]).sum().backward()

    assert set(model.state_dict()) == names
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())


def test_a_copy_rounds_by_the_scales_of_the_model(model: Classifier, texts: list[Tensor]) -> None:
    twin = Classifier()
    twin.load_state_dict(model.state_dict())
    rounding = Rounding(model, twin)
    rounding.measure(model, [lambda: model(texts[0])])

    assert torch.equal(twin(texts[1]), model(texts[1]))


def test_measuring_leaves_the_model_in_training(model: Classifier, texts: list[Tensor]) -> None:
    model.train()
    rounding = measured(model, texts)
    first = model(texts[0])
    rounding.measure(model, [lambda one=one: model(one) for one in texts])  # type: ignore[misc]

    assert model.training
    assert torch.equal(model(texts[0]), first), "measured on unrounded values, so the same again"
