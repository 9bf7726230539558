"""How a classifier makes one vector of a text's token vectors.

Hugging Face classifiers read the first token's vector through a pooling layer. Sentence encoders, MiniLM among them,
were trained to mean something by the average over all tokens, and learn a task faster and further from there.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from overtone.errors import ConfigurationError


def classifier_class(shape: PretrainedConfig) -> Any:
    """The class to load a model of `shape` with; `shape.pooling` is `cls` (or absent) or `mean`, and saved with it.

    Raises:
        ConfigurationError: `mean` is asked for and the architecture's head is more than dropout and a linear layer.
    """
    if getattr(shape, "pooling", "cls") != "mean":
        return AutoModelForSequenceClassification
    try:
        stock = AutoModelForSequenceClassification._model_mapping[type(shape)]
    except KeyError:
        raise ConfigurationError(f"models of type {shape.model_type} cannot be classifiers") from None
    return _mean_pooled(stock)


@cache
def _mean_pooled(stock: Any) -> Any:
    class MeanPooled(stock):  # type: ignore[misc]
        """`stock` with the average of the last layer's vectors in place of the pooled first one."""

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            parts = {name for name, _ in self.named_children()}
            if parts != {self.base_model_prefix, "dropout", "classifier"} or not isinstance(self.classifier, nn.Linear):
                raise ConfigurationError(f"model.pooling=mean does not go with the head of {stock.__name__}; use cls")
            # Without a gradient it would stop a run of several workers, and be exported for nothing.
            self.base_model.pooler = None

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
            """Logits [rows, labels] of token ids and mask, both [rows, tokens]."""
            vectors = self.base_model(input_ids=input_ids, attention_mask=attention_mask)[0]
            counted = attention_mask.unsqueeze(-1).to(vectors.dtype)
            mean = (vectors * counted).sum(dim=1) / counted.sum(dim=1)
            return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))

    MeanPooled.__name__ = MeanPooled.__qualname__ = f"MeanPooled{stock.__name__}"
    return MeanPooled
