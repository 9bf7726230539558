"""`python -m train.pretrain`: an encoder that has read texts of its future kind, which nobody need label.

Masked-language training (Devlin et al. 2019, "BERT") goes on from the encoder of a configuration, in this process, on a
GPU where there is one. What comes out is a folder that `model.name` takes ("task-adaptive pre-training", Gururangan et
al. 2020, "Don't Stop Pretraining").
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from overtone.errors import ConfigurationError, DataError
from overtone.logging import configure
from overtone.settings import load_settings
from overtone.text import normalise
from train.config import TrainConfig, load_config
from train.data import length_grouped, pad
from train.encoder import encoder_of, open_guesser, open_tokenizer
from train.exits import as_exit_code
from train.optimiser import learning_rate_factor, parameter_groups, products_in, trained_attention, usable_device
from train.progress import Counted, counted

_IGNORED = -100
"""The target, by torch's convention, of a token that is not to be guessed."""
_MASKED, _RANDOM = 0.8, 0.1
"""Of the tokens to be guessed: the share behind the mask, and that behind another token; the rest is shown."""
_HELD_OUT = 0.05
_MOST_HELD_OUT = 1000
_FEWEST_TEXTS = 20

Rows = Sequence[list[int]]


def read_texts(path: Path) -> list[str]:
    """The texts of `path`, one a line in UTF-8, normalised, each once; lines without a word are passed over.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or holds too few texts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start})") from None
    texts = list(dict.fromkeys(text for line in lines if (text := normalise(line))))
    if len(texts) < _FEWEST_TEXTS:
        raise DataError(f"{path}: holds {len(texts)} texts; at least {_FEWEST_TEXTS} are needed")
    return texts


class Pretraining:
    """One masked-language run, in this process."""

    def __init__(self, config: TrainConfig, texts: Sequence[str], share: float) -> None:
        """Open the encoder of `config` to guess `share` of the tokens of `texts`.

        Raises:
            ConfigurationError: the encoder cannot be read, or its tokenizer knows no mask.
        """
        self._settings, self._share = config.optimiser, share
        self._device = usable_device()
        self._products = products_in(config.model.precision, self._device)
        torch.manual_seed(self._settings.seed)
        self._rng = random.Random(self._settings.seed)
        self.tokenizer = open_tokenizer(config.model)
        if self.tokenizer.mask_token_id is None:
            raise ConfigurationError(f"model.name={config.model.name}: its tokenizer has no token for a mask")
        self.model = open_guesser(config.model, attention=trained_attention(self._device)).to(self._device)
        rows = encoder_of(self.tokenizer, config.model.max_length)(texts)
        self._rng.shuffle(rows)
        held_out = min(max(round(len(rows) * _HELD_OUT), 1), _MOST_HELD_OUT)
        self._apart, self._rows = rows[:held_out], rows[held_out:]
        self._group = config.data.group_batches

    def train(self, progress: Counted) -> None:
        """Every epoch of the configuration."""
        size, epochs = self._settings.batch_size, self._settings.epochs
        steps = -(-len(self._rows) // size) * epochs
        steps = min(steps, self._settings.max_steps or steps)
        optimiser = torch.optim.AdamW(parameter_groups(self.model, self._settings), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_factor(self._settings, steps))
        self.model.train()
        done = 0
        while done < steps:
            for batch in length_grouped([len(row) for row in self._rows], size, self._group, self._rng)[: steps - done]:
                self._loss([self._rows[row] for row in batch]).backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)
                done += 1
                progress(done, steps)

    @torch.inference_mode()
    def loss_apart(self) -> float:
        """Mean loss, in nats a token, on texts that are kept apart; they are masked alike at every call."""
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        rows, size = sorted(self._apart, key=len), self._settings.batch_size
        losses = [float(self._loss(rows[at : at + size], generator)) for at in range(0, len(rows), size)]
        return sum(losses) / len(losses)

    def save(self, output: Path) -> None:
        """Write the encoder, without the head that guesses tokens, and its tokenizer into the folder `output`."""
        self.model.base_model.save_pretrained(output)
        self.tokenizer.save_pretrained(output)

    def _loss(self, rows: Rows, generator: torch.Generator | None = None) -> Tensor:
        ids, mask = (torch.from_numpy(part) for part in pad(rows, self.tokenizer.pad_token_id))
        shown, wanted = self._masked(ids, generator)
        inputs = {"input_ids": shown.to(self._device), "attention_mask": mask.to(self._device)}
        with self._products:
            logits = self.model(**inputs).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.to(self._device).flatten())

    def _masked(self, ids: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """What is shown in place of `ids`, and what is to be guessed, both [rows, tokens]."""
        special = torch.from_numpy(np.isin(ids.numpy(), self.tokenizer.all_special_ids))
        chosen = (torch.rand(ids.shape, generator=generator) < self._share) & ~special
        if not chosen.any():
            chosen[:, 1] = True  # of a short batch something must be guessed
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        shown = ids.masked_fill(chosen & (fate < _MASKED), self.tokenizer.mask_token_id)
        shown = torch.where(chosen & (fate >= 1 - _RANDOM), others, shown)
        return shown, ids.masked_fill(~chosen, _IGNORED)


def command(
    config: Annotated[
        Path, typer.Option(help="Training file; of it count `model`, `optimiser` and `data.group_batches`.")
    ],
    texts: Annotated[Path, typer.Option(help="A text a line, in UTF-8.")],
    output: Annotated[Path, typer.Option(help="New folder for the encoder, which `model.name` takes.")],
    share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the tokens that are to be guessed.")] = 0.15,
    assign: Annotated[list[str] | None, typer.Option("--set", help="Override a value: section.name=value.")] = None,
) -> None:
    """Train an encoder on texts without labels."""
    with as_exit_code(ConfigurationError) as console:
        settings = load_settings()
        configure("train", settings.log_level, settings.log_format)
        chosen = load_config(config, settings, assign or [])
        if output.exists():
            raise ConfigurationError(f"{output}: is there already; name a new folder")
        found = read_texts(texts)
        console.print(f"{len(found)} texts")
        run = Pretraining(chosen, found, share)
        before = run.loss_apart()
        with counted(console, "guessing tokens") as progress:
            run.train(progress)
        after = run.loss_apart()
        run.save(output)
        console.print(f"loss on texts kept apart: {before:.3f} before, {after:.3f} after, nats a token")
        console.print(f"encoder written to {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(command)
