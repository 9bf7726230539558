"""Soft labels: what trained teachers say of the training texts, for a student to learn from beside the labels.

The mean of several models' probabilities tells how sure one may be of a text, which a single label given by a few
people does not (Hinton et al. 2015, "Distilling the knowledge in a neural network").
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from overtone.errors import ConfigurationError
from train.config import TeacherConfig, TrainConfig
from train.data import LabelledTexts, alter, augment, log_prior, pad
from train.encoder import encoder_of, open_trained
from train.optimiser import products_in, usable_device
from train.progress import Counted

_BATCH_TOKENS = 8192
_SEED = 0


def lessons(config: TrainConfig, train: LabelledTexts, progress: Counted) -> tuple[LabelledTexts, NDArray[np.float32]]:
    """What a student learns from, and the teachers' probabilities of it, float32 [texts, labels].

    That is `train` and, after it, `distillation.copies` altered copies of each text, labelled by the teachers alone.
    The same for the same configuration, so that a resumed run goes on with it.

    Raises:
        ConfigurationError: as `soft_labels`.
    """
    rng = random.Random(_SEED)
    copies = [text for _ in range(config.distillation.copies) for text in alter(train.texts, rng)]
    # As the teachers were evaluated: a link tells them where a text is from, not what it says.
    texts = augment([*train.texts, *copies], rng, drop_links=1.0, drop_mentions=0.0)
    labels, precision = len(config.data.labels), config.model.precision
    soft = soft_labels(config.distillation.teachers, train, texts, labels, progress, precision=precision)
    learned = np.concatenate([train.labels, soft[len(train) :].argmax(axis=1)])
    return LabelledTexts((*train.texts, *copies), learned, train.sha256), soft


def soft_labels(
    teachers: Sequence[TeacherConfig],
    rows: LabelledTexts,
    texts: Sequence[str],
    labels: int,
    progress: Counted,
    *,
    precision: Literal["bf16", "fp32"] = "fp32",
) -> NDArray[np.float32]:
    """The weighted mean probability of each label over `teachers`, float32 [texts, labels].

    `rows` are what the teachers were trained on, for the class prior that was left out of their logits; `texts` are
    their texts as the teachers shall read them, with matrix products in `precision`, on a GPU where there is one.

    Raises:
        ConfigurationError: a teacher cannot be read or has other labels.
    """
    device = usable_device()
    products = products_in(precision, device)
    prior = torch.from_numpy(log_prior(rows.labels, labels)).to(device)
    total = np.zeros((len(texts), labels), dtype=np.float64)
    for number, teacher in enumerate(teachers):
        model, tokenizer = _open(teacher, labels)
        model.to(device)
        encoded = encoder_of(tokenizer, teacher.max_length)(texts)
        done = number * len(texts)
        for batch in _batches(encoded):
            ids, mask = (
                torch.from_numpy(part).to(device)
                for part in pad([encoded[row] for row in batch], tokenizer.pad_token_id)
            )
            with torch.inference_mode(), products:
                logits = model(input_ids=ids, attention_mask=mask).logits.float()
            probabilities = torch.softmax(logits + teacher.prior_tau * prior, dim=-1).double().cpu().numpy()
            total[batch] += teacher.weight * probabilities
            done += len(batch)
            progress(done, len(teachers) * len(texts))
    return (total / sum(teacher.weight for teacher in teachers)).astype(np.float32)


def _open(teacher: TeacherConfig, labels: int) -> tuple[Any, Any]:
    try:
        model, tokenizer = open_trained(Path(teacher.weights))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"distillation.teachers: {teacher.weights} cannot be read: {error}") from None
    if model.config.num_labels != labels:
        raise ConfigurationError(
            f"distillation.teachers: {teacher.weights} knows {model.config.num_labels} labels, the run {labels}"
        )
    return model, tokenizer


def _batches(encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    batches: list[list[int]] = []
    while order:
        size = max(_BATCH_TOKENS // len(encoded[order[-1]]), 1)
        batches.append(order[-size:])
        order = order[:-size]
    return batches
