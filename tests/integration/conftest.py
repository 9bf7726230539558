"""What integration tests share: a made-up language of three moods, and an encoder small enough to train in seconds."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from train.encoder import locate

WORDS = {
    "negative": ["awful", "hate", "worst", "sad", "broken"],
    "neutral": ["table", "monday", "train", "paper", "river"],
    "positive": ["love", "great", "best", "happy", "lovely"],
}


def make_encoder(folder: Path) -> None:
    """Two layers, 32 wide, with fresh weights and the tokenizer of the offline encoder."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_texts(path: Path, rows: int, seed: int) -> None:
    rng = random.Random(seed)
    lines = ["label\ttext"]
    for number in range(rows):
        label = list(WORDS)[number % 3]
        words = rng.choices(WORDS[label], k=rng.randint(2, 6))
        lines.append(f"{label}\t{' '.join(words)} {seed * 1000 + number} @someone")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def make_moods() -> Callable[[Path, int], None]:
    """Puts the folder `encoder`, so many training texts and 60 validation texts into a folder."""

    def make(folder: Path, rows: int) -> None:
        make_encoder(folder / "encoder")
        make_texts(folder / "train.tsv", rows, seed=1)
        make_texts(folder / "validation.tsv", 60, seed=2)

    return make


@pytest.fixture(scope="module")
def mlflow_as_before() -> Iterator[None]:
    """MLflow writes the store it is set to into the environment, where settings and child processes of later tests
    would find it."""
    import mlflow

    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    yield
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ.update(before)
