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
        ConfigurationError: `mean` is asked for and the architecture has no classifier.
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
        """`stock` with dropout and one linear layer over the average of the last layer's vectors as its whole head."""

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            # What has no gradient would stop a run of several workers, and be exported for nothing.
            for name in {name for name, _ in self.named_children()} - {self.base_model_prefix}:
                delattr(self, name)
            self.base_model.pooler = None
            self.dropout = nn.Dropout(_dropout(config))
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
            """Logits [rows, labels] of token ids and mask, both [rows, tokens]."""
            vectors = self.base_model(input_ids=input_ids, attention_mask=attention_mask)[0]
            counted = attention_mask.unsqueeze(-1).to(vectors.dtype)
            mean = (vectors * counted).sum(dim=1) / counted.sum(dim=1)
            return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean)))

    MeanPooled.__name__ = MeanPooled.__qualname__ = f"MeanPooled{stock.__name__}"
    return MeanPooled


def _dropout(shape: PretrainedConfig) -> float:
    """The dropout before the last layer; architectures name it differently."""
    for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob"):
        if (found := getattr(shape, name, None)) is not None:
            return float(found)
    return 0.0
