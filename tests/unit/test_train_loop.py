"""The training loop in this process, on an encoder of one small layer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.config import TrainConfig
from train.data import LabelledTexts, Split
from train.loop import STATE, WEIGHTS, Run, alone
from train.optimiser import trained_attention

LABELS = ("negative", "neutral", "positive")
STILL = {"dropout": 0.0, "classifier_dropout": 0.0}
WORDS = ("awful", "table", "lovely")


def labelled(rows: int) -> LabelledTexts:
    numbers = np.arange(rows) % 3
    return LabelledTexts(tuple(f"{WORDS[number]} thing {row}" for row, number in enumerate(numbers)), numbers)


@dataclass
class Told:
    """What a run reported."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    kept: Path | None = None
    """Where the state of each checkpoint is copied to."""

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        self.metrics.append(metrics)
        if folder is not None:
            assert (folder / WEIGHTS / "config.json").exists()
            if self.kept is not None:
                (self.kept / STATE).write_bytes((folder / STATE).read_bytes())


def make_run(encoder: Path, told: Told, *, model: dict[str, Any] | None = None, **optimiser: Any) -> Run:
    config = TrainConfig.model_validate(
        {
            "name": "tiny",
            "model": {"name": str(encoder), "precision": "fp32", "pooling": "mean", **(model or {})},
            "optimiser": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "evaluations": 1, **optimiser},
        }
    )
    return Run(config, Split(labelled(24), labelled(9), 0), None, alone(told))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.bare.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return all(torch.allclose(left[name], right[name], rtol=0, atol=tolerance) for name in left)


def test_every_epoch_ends_with_an_evaluation_and_a_checkpoint(tiny_encoder: Path, tmp_path: Path) -> None:
    told = Told(kept=tmp_path)
    make_run(tiny_encoder, told).train()

    assert [(one["step"], one["epoch"]) for one in told.metrics] == [(4, 1.0), (8, 2.0)]
    assert all(0 <= one["macro_recall"] <= 1 for one in told.metrics)
    assert (tmp_path / STATE).exists()
    # Each text is longer than one token, and nothing is said of a GPU on a machine without one.
    assert all(one["tokens_per_s"] > one["texts_per_s"] > 0 for one in told.metrics)
    assert all("gpu_utilisation" not in one for one in told.metrics)


def test_attention_is_written_out_on_a_processor(tiny_encoder: Path) -> None:
    assert make_run(tiny_encoder, Told()).bare.config._attn_implementation == "eager"
    assert trained_attention(torch.device("cuda")) is None


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_encoder: Path, tmp_path: Path) -> None:
    unbroken = make_run(tiny_encoder, Told())
    unbroken.train()

    broken = make_run(tiny_encoder, Told(kept=tmp_path))
    broken.train_epoch(0)
    resumed = make_run(tiny_encoder, Told())
    resumed.resume(tmp_path)
    assert resumed.progress.step == 4
    resumed.train()

    assert resumed.progress.step == unbroken.progress.step == 8
    assert same(weights(resumed), weights(unbroken))


@pytest.mark.parametrize("parts", [2, 4, 6])
def test_a_step_in_parts_is_the_same_step(tiny_encoder: Path, parts: int) -> None:
    whole = make_run(tiny_encoder, Told(), model=STILL, epochs=1)
    divided = make_run(tiny_encoder, Told(), model=STILL, epochs=1, accumulate=parts)
    whole.train()
    divided.train()

    assert same(weights(whole), weights(divided), tolerance=1e-4)


def test_without_dropout_two_passes_agree(tiny_encoder: Path) -> None:
    once = make_run(tiny_encoder, Told(), model=STILL | {"attention_dropout": 0.0}, epochs=1)
    twice = make_run(tiny_encoder, Told(), model=STILL | {"attention_dropout": 0.0}, epochs=1, rdrop=4.0)
    once.train()
    twice.train()

    assert same(weights(once), weights(twice), tolerance=1e-4)


def test_with_dropout_their_disagreement_is_learned_from(tiny_encoder: Path) -> None:
    once = make_run(tiny_encoder, Told(), epochs=1)
    twice = make_run(tiny_encoder, Told(), epochs=1, rdrop=4.0)
    once.train()
    twice.train()

    assert not same(weights(once), weights(twice), tolerance=1e-4)


def test_mixout_trains_towards_the_start_and_resumes(tiny_encoder: Path, tmp_path: Path) -> None:
    plain = make_run(tiny_encoder, Told(), model=STILL)
    mixed = make_run(tiny_encoder, Told(kept=tmp_path), model=STILL, mixout=0.9)
    plain.train()
    mixed.train_epoch(0)
    resumed = make_run(tiny_encoder, Told(), model=STILL, mixout=0.9)
    resumed.resume(tmp_path)
    resumed.train()
    mixed.train()

    assert not same(weights(plain), weights(mixed), tolerance=1e-4)
    assert same(weights(resumed), weights(mixed))


def test_a_quantisation_aware_run_rounds_and_resumes(tiny_encoder: Path, tmp_path: Path) -> None:
    plain = make_run(tiny_encoder, Told(), model=STILL, ema_decay=0.5, ema_every=1)
    unbroken = make_run(tiny_encoder, Told(), model=STILL, ema_decay=0.5, ema_every=1, quantisation_aware=True)
    broken = make_run(
        tiny_encoder,
        Told(kept=tmp_path),
        model=STILL,
        ema_decay=0.5,
        ema_every=1,
        quantisation_aware=True,
        evaluations=2,
    )
    plain.train()
    unbroken.train()
    broken.train_epoch(0)
    resumed = make_run(
        tiny_encoder, Told(), model=STILL, ema_decay=0.5, ema_every=1, quantisation_aware=True, evaluations=2
    )
    resumed.resume(tmp_path)
    broken.train_epoch(1)
    resumed.train()

    assert not same(weights(plain), weights(unbroken))
    assert same(weights(plain), weights(unbroken), tolerance=0.2)
    assert same(weights(resumed), weights(broken))


def test_gradient_checkpointing_changes_no_figure(tiny_encoder: Path) -> None:
    kept = make_run(tiny_encoder, Told(), epochs=1)
    again = make_run(tiny_encoder, Told(), epochs=1, model={"gradient_checkpointing": True})
    kept.train()
    again.train()

    assert same(weights(kept), weights(again), tolerance=1e-5)


def test_a_run_that_gets_no_better_stops(tiny_encoder: Path) -> None:
    told = Told()
    make_run(tiny_encoder, told, epochs=50, learning_rate=1e-12, patience=2).train()

    assert len(told.metrics) == 3, "the first epoch sets the figure, two more do not better it"
