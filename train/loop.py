"""The training loop: what every worker runs, from top to bottom, whoever started it."""

import contextlib
import copy
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from overtone.errors import ConfigurationError
from train.config import TrainConfig
from train.data import LabelledTexts, Split, augment, length_grouped, log_prior, pad, share_of
from train.encoder import Encode, encoder_of, open_classifier, open_tokenizer
from train.optimiser import (
    UsedRows,
    learning_rate_factor,
    make_average,
    make_loss,
    make_mixout,
    parameter_groups,
    products_in,
    trained_attention,
)
from train.scores import score, softmax

# `train.sharding` and `train.rounding` are imported where they are used: that takes a second or two, which other runs
# need not wait.
if TYPE_CHECKING:
    from train.rounding import Rounding

WEIGHTS = "weights"
"""Folder of a checkpoint with the weights to evaluate and export, in Hugging Face form, and the tokenizer."""
STATE = "state.pt"
"""File of a checkpoint with what resuming needs."""
_REPORT_EVERY_STEPS = 50
_EVALUATION_TOKENS = 8192
_HEAD_SEED = 7


@dataclass(frozen=True)
class Place:
    """Where one worker stands among the others, what it computes on, and whom it tells."""

    rank: int
    world: int
    device: torch.device
    report: Callable[[dict[str, Any], Path | None], None]
    """Takes metrics and, at the end of an epoch, the folder of a checkpoint, which is gone when it returns."""
    prepare: Callable[[nn.Module], nn.Module]
    """Makes a model one that shares its gradients with the other workers."""
    sharded: bool = False
    """Whether `prepare` divides the weights among the workers (`train.sharding`)."""


def alone(report: Callable[[dict[str, Any], Path | None], None]) -> Place:
    """The place of the only worker, in this process, on the CPU."""
    return Place(0, 1, torch.device("cpu"), report, lambda model: model)


@dataclass
class _Progress:
    """How far the run is; what a checkpoint keeps besides the tensors."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    """Time spent in finished sessions of the run."""
    best: float = 0.0
    """Highest macro-averaged recall at the end of an epoch."""
    stale: int = 0
    """Epochs since that one."""

    def end_epoch(self, epoch: int, macro_recall: float) -> None:
        """Count an epoch as finished."""
        self.epoch = epoch + 1
        self.stale = 0 if macro_recall > self.best else self.stale + 1
        self.best = max(self.best, macro_recall)


class Run:
    """One worker's share of a run: the model, what changes it, and the counters.

    `soft` holds the teachers' probabilities, float32 [training texts, labels], if there are any.
    """

    def __init__(self, config: TrainConfig, split: Split, soft: NDArray[np.float32] | None, place: Place) -> None:
        self.rank, self.world, self.device, self.report = place.rank, place.world, place.device, place.report
        self.sharded = place.sharded
        self.config, self.split, self.soft = config, split, soft
        self.settings = config.optimiser
        self.progress = _Progress()
        self.started = time.monotonic()
        self.products = products_in(config.model.precision, self.device)

        # One start for all seeds: runs of different seeds then lie close enough for their weights to be averaged.
        torch.manual_seed(_HEAD_SEED)
        self.tokenizer = open_tokenizer(config.model)
        self.encode: Encode = encoder_of(self.tokenizer, config.model.max_length)
        attention = trained_attention(self.device)
        self.bare = open_classifier(config.model, config.data.labels, attention=attention).to(self.device)
        # Evaluated and saved by the first worker in place of the divided model.
        self.twin = copy.deepcopy(self.bare) if self.sharded and self.rank == 0 else None
        self.average = make_average(self.bare, self.settings)
        if config.model.gradient_checkpointing:
            self.bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # A compiled model cannot make such gradients, a divided one has its own way, and a GPU writes all in no time.
        has_use = self.device.type == "cpu" and not self.sharded and not config.model.compile
        self.used_rows = UsedRows(self.bare) if has_use else None
        self.model = place.prepare(self.bare)
        self.mixed = make_mixout(self.model, self.settings.mixout) if self.settings.mixout else None
        if config.model.compile:
            self.model.compile(dynamic=True)
        self.rounding = self._make_rounding() if self.settings.quantisation_aware else None

        batches = -(-len(split.train) // self.settings.batch_size)
        self.steps = min(batches * self.settings.epochs, self.settings.max_steps or batches * self.settings.epochs)
        self.epochs = -(-self.steps // batches)
        self.evaluate_every = max(batches // self.settings.evaluations, 1)
        self.optimiser = torch.optim.AdamW(parameter_groups(self.bare, self.settings), fused=True)
        factor = learning_rate_factor(self.settings, self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factor)
        prior = torch.from_numpy(log_prior(split.train.labels, len(config.data.labels))).to(self.device)
        self.loss = make_loss(self.settings, prior, config.distillation.weight)

    def _make_rounding(self) -> "Rounding":
        from train.rounding import Rounding

        others = [self.twin, self.average.module if self.average is not None else None]
        return Rounding(self.bare, *(one for one in others if one is not None))

    def train(self) -> None:
        """Every epoch that is not finished, or until the figures stop getting better."""
        for epoch in range(self.progress.epoch, self.epochs):
            if self.settings.patience and self._stale() >= self.settings.patience:
                break
            self.train_epoch(epoch)

    def _stale(self) -> int:
        """Epochs without a better figure, as the first worker, which evaluates, has counted them."""
        counted = torch.tensor(self.progress.stale, device=self.device)
        if self.world > 1:
            torch.distributed.broadcast(counted, src=0)
        return int(counted)

    def train_epoch(self, epoch: int) -> None:
        """Every batch of the epoch once; evaluations on the way and a checkpoint at the end."""
        rng = random.Random(f"{self.settings.seed}/{epoch}")
        # Dropout of an epoch does not depend on those before it, so a resumed run is the unbroken one.
        torch.manual_seed(random.Random(f"{self.settings.seed}/{epoch}/{self.rank}").getrandbits(63))
        data = self.config.data
        texts = augment(self.split.train.texts, rng, drop_links=data.drop_links, drop_mentions=data.drop_mentions)
        rows = self.encode(texts)
        batches = length_grouped([len(row) for row in rows], self.settings.batch_size, data.group_batches, rng)
        batches = batches[: self.steps - self.progress.step]
        watch = _Watch()
        self.model.train()
        self._measure_rounding()
        for number, batch in enumerate(batches, start=1):
            mine = share_of(batch, self.rank, self.world)
            loss = self._step([rows[row] for row in mine], mine)
            watch.add(loss, len(batch), sum(len(rows[row]) for row in batch))
            last = number == len(batches)
            if last or self._evaluation_is_due(number, len(batches)):
                self._evaluate_and_report(epoch, watch, checkpoint=last)
                if not last:
                    self._measure_rounding()
            elif number % _REPORT_EVERY_STEPS == 0:
                self.report(self._metrics(watch), None)

    def _measure_rounding(self) -> None:
        """Fit the scales to the weights as they are: a resumed run begins an epoch with those of the unbroken one."""
        if self.rounding is None:
            return
        from train.calibrate import sample_of

        def read(row: list[int]) -> None:
            with self.products:
                self.bare(**self._inputs([row]))

        self.rounding.measure(self.bare, [partial(read, row) for row in self.encode(sample_of(self.split.train.texts))])

    def _evaluation_is_due(self, number: int, batches: int) -> bool:
        # Not right before the one that ends the epoch.
        return number % self.evaluate_every == 0 and batches - number >= self.evaluate_every // 2

    def _step(self, rows: list[list[int]], batch: list[int]) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        parts = min(self.settings.accumulate, len(batch))
        for part in range(parts):
            chosen = slice(part, None, parts)
            # Workers exchange their gradients once a step, with the last part.
            with self._quiet() if part < parts - 1 else contextlib.nullcontext():
                loss = self._loss(rows[chosen], batch[chosen]) * (len(batch[chosen]) / len(batch))
                loss.backward()
            total += loss.detach()
        if self.used_rows:
            self.used_rows.clip(self.settings.clip_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self.bare.parameters(), self.settings.clip_norm)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1
        if self.average is not None and self.progress.step % self.settings.ema_every == 0:
            self.average.update_parameters(self.bare)
        return total

    def _loss(self, rows: list[list[int]], batch: list[int]) -> torch.Tensor:
        inputs = self._inputs(rows * 2 if self.settings.rdrop else rows)
        with self.products:
            if self.mixed is None:
                logits = self.model(**inputs).logits
            else:
                logits = torch.func.functional_call(self.model, self.mixed(), kwargs=inputs).logits
        labels = torch.from_numpy(self.split.train.labels[batch]).to(self.device)
        soft = torch.from_numpy(self.soft[batch]).to(self.device) if self.soft is not None else None
        return self.loss(logits, labels, soft)

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        no_sync = getattr(self.model, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()

    def _inputs(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        ids, mask = pad(rows, self.tokenizer.pad_token_id)
        return {
            "input_ids": torch.from_numpy(ids).to(self.device, non_blocking=True),
            "attention_mask": torch.from_numpy(mask).to(self.device, non_blocking=True),
        }

    def _metrics(self, watch: "_Watch") -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "steps": self.steps,
            "epoch": self.progress.step / self.steps * self.epochs,
            "learning_rate": max(self.schedule.get_last_lr()),
            "seconds": self.seconds(),
            "device": self._device_name(),
            **watch.read(),
            **self._gpu(),
        }

    def _gpu(self) -> dict[str, float]:
        """On a GPU, the most memory that was in use, in MiB, and the share of the last second in which it computed."""
        if self.device.type != "cuda":
            return {}
        found = {"gpu_memory_mib": torch.cuda.max_memory_allocated(self.device) / 2**20}
        # Asked of NVIDIA's management library, which containers and virtual devices may lack.
        with contextlib.suppress(Exception):
            found["gpu_utilisation"] = torch.cuda.utilization(self.device) / 100
        return found

    def seconds(self) -> float:
        """Time the run took so far, over all its sessions."""
        return self.progress.seconds + time.monotonic() - self.started

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} x {torch.get_num_threads()} CPU threads"

    def _evaluate_and_report(self, epoch: int, watch: "_Watch", *, checkpoint: bool) -> None:
        metrics = self._metrics(watch)
        weights = self._weights()
        moments = self._moments() if checkpoint else {}
        # Every worker must report as often as the others; the first one does the work and its figures count.
        if self.rank != 0:
            self.report(metrics, None)
            return
        logits = self._logits(weights, self.split.validation)
        found = score(softmax(logits), self.split.validation.labels, self.config.data.labels)
        metrics |= {"macro_recall": found.macro_recall, "macro_f1": found.macro_f1, "accuracy": found.accuracy}
        if not checkpoint:
            self.report(metrics, None)
        else:
            self.progress.end_epoch(epoch, found.macro_recall)
            with tempfile.TemporaryDirectory() as folder:
                self._save(Path(folder), weights, moments)
                self.report(metrics, Path(folder))
        watch.restart()

    def _weights(self) -> Any:
        """The model to evaluate and save; with sharding, all workers take part and the first one gets it."""
        if self.sharded:
            from train.sharding import whole_weights

            whole = whole_weights(self.bare)
            if self.twin is not None:
                self.twin.load_state_dict(whole)
            return self.twin
        averaged = self.average is not None and int(self.average.n_averaged) > 0
        return self.average.module if averaged and self.average is not None else self.bare

    @torch.inference_mode()
    def _logits(self, model: Any, texts: LabelledTexts) -> NDArray[np.float32]:
        rows = self.encode(texts.texts)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        logits = np.zeros((len(rows), len(self.config.data.labels)), dtype=np.float32)
        training = model.training
        model.eval()
        while order:
            size = max(_EVALUATION_TOKENS // len(rows[order[-1]]), 1)
            batch, order = order[-size:], order[:-size]
            with self.products:
                found = model(**self._inputs([rows[row] for row in batch])).logits
            logits[batch] = found.float().cpu().numpy()
        model.train(training)
        return logits

    def _moments(self) -> dict[str, Any]:
        if not self.sharded:
            return self.optimiser.state_dict()
        from train.sharding import whole_moments

        return whole_moments(self.bare, self.optimiser)

    def _save(self, folder: Path, weights: Any, moments: dict[str, Any]) -> None:
        weights.save_pretrained(folder / WEIGHTS)
        self.tokenizer.save_pretrained(folder / WEIGHTS)
        state = {
            "model": (self.twin if self.twin is not None else self.bare).state_dict(),
            "sharded": self.sharded,
            "average": self.average.state_dict() if self.average is not None else None,
            "optimiser": moments,
            "schedule": self.schedule.state_dict(),
            "progress": asdict(self.progress) | {"seconds": self.seconds()},
        }
        torch.save(state, folder / STATE)

    def resume(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`: same weights, moments, schedule and counters.

        Raises:
            ConfigurationError: the checkpoint is of a run with another `cluster.sharding`.
        """
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        if state["sharded"] != self.sharded:
            raise ConfigurationError("a run cannot be resumed with another cluster.sharding; give it another name")
        if self.sharded:
            from train.sharding import put_back

            put_back(self.bare, self.optimiser, state["model"], state["optimiser"])
        else:
            self.bare.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = _Progress(**state["progress"])


class _Watch:
    """Mean loss and speed since the last reading."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._texts = self._tokens = 0
        self._since = time.monotonic()

    def add(self, loss: torch.Tensor, texts: int, tokens: int) -> None:
        self._losses.append(loss)
        self._texts += texts
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """`loss` (mean), `texts_per_s` and `tokens_per_s`, padding aside, since the last call, which this one ends."""
        loss = float(torch.stack(self._losses).mean()) if self._losses else float("nan")
        seconds = max(time.monotonic() - self._since, 1e-9)
        speeds = {"texts_per_s": self._texts / seconds, "tokens_per_s": self._tokens / seconds}
        self._losses, self._texts, self._tokens = [], 0, 0
        self.restart()
        return {"loss": loss, **speeds}

    def restart(self) -> None:
        """Leave out the time since the last reading, in which no text was trained on."""
        self._since = time.monotonic()
