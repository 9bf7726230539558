"""One vector from many: the mean over the tokens that are there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, MPNetConfig, RobertaConfig, ViTMAEConfig

from overtone.errors import ConfigurationError
from train.pooling import classifier_class

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def test_padding_does_not_count(tmp_path: Path) -> None:
    shape = BertConfig(**SHAPE, pooling="mean")
    model = classifier_class(shape)(shape).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    padded, mask = torch.tensor([[2, 5, 6, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.inference_mode():
        vectors = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        expected = model.classifier(vectors.mean(dim=1))
        assert torch.allclose(model(ids, torch.ones_like(ids)).logits, expected, atol=1e-6)
        assert torch.allclose(model(padded, mask).logits, expected, atol=1e-6)

        model.save_pretrained(tmp_path)
        saved = BertConfig.from_pretrained(tmp_path)
        again = classifier_class(saved).from_pretrained(tmp_path, config=saved).eval()
        assert torch.allclose(again(padded, mask).logits, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig, MPNetConfig, DistilBertConfig])
def test_every_parameter_takes_part_whatever_the_head_was(kind: Any) -> None:
    shape = kind(**SHAPE, pooling="mean")
    model = classifier_class(shape)(shape)
    ids = torch.tensor([[2, 5, 6, 3]])
    model(ids, torch.ones_like(ids)).logits.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert {name for name, _ in model.named_children()} == {model.base_model_prefix, "dropout", "classifier"}


def test_an_architecture_without_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="models of type vit_mae cannot be classifiers"):
        classifier_class(ViTMAEConfig(pooling="mean"))
