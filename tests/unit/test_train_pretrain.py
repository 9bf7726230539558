"""Masked-language training on texts without labels: what is masked, what is learned, and what comes out."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from overtone.errors import ConfigurationError, DataError
from train.config import TrainConfig
from train.encoder import open_classifier, open_tokenizer
from train.pretrain import Pretraining, command, read_texts

WORDS = ("red", "green", "blue", "one", "two", "three", "sun", "moon", "rain", "snow")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads wait for each other at every step, which is long where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, make_moods: Callable[[Path, int], None]) -> Path:
    """An encoder, and texts in which each word follows from the one before."""
    folder = tmp_path_factory.mktemp("pretrain")
    make_moods(folder, 3)
    lines = [
        " ".join(WORDS[(start + step) % len(WORDS)] for step in range(length))
        for start in range(len(WORDS))
        for length in range(4, 10)
    ]
    (folder / "texts.txt").write_text("\n".join([*lines, "", "  "]) + "\n", encoding="utf-8")
    (folder / "run.yaml").write_text(
        f"name: moods\nmodel: {{name: {folder}/encoder, precision: fp32, max_length: 32}}\n"
        "optimiser: {epochs: 8, batch_size: 8, learning_rate: 0.02, layer_decay: 1.0}\n"
    )
    return folder


def config_of(workshop: Path, **optimiser: object) -> TrainConfig:
    model = {"name": str(workshop / "encoder"), "precision": "fp32", "max_length": 32}
    return TrainConfig.model_validate({"name": "moods", "model": model, "optimiser": {"batch_size": 8, **optimiser}})


def test_tokens_are_hidden_in_their_shares_and_special_ones_never(workshop: Path) -> None:
    run = Pretraining(config_of(workshop), read_texts(workshop / "texts.txt"), 0.15)
    special = run.tokenizer.all_special_ids
    ids = torch.randint(1000, 20_000, (400, 60), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = run.tokenizer.cls_token_id, run.tokenizer.sep_token_id
    shown, wanted = run._masked(ids, torch.Generator().manual_seed(2))

    guessed = wanted != -100
    assert guessed[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert not guessed[:, [0, -1]].any()
    assert torch.equal(wanted[guessed], ids[guessed])
    assert torch.equal(shown[~guessed], ids[~guessed])
    hidden = shown[guessed] == run.tokenizer.mask_token_id
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown[guessed] == ids[guessed]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not np.isin(ids[guessed].numpy(), special).any()


def test_what_follows_from_its_neighbours_is_learned_and_the_encoder_can_be_trained_on(workshop: Path) -> None:
    runner = CliRunner()
    app = Typer()
    app.command()(command)
    output = workshop / "read"
    arguments = ["--config", workshop / "run.yaml", "--texts", workshop / "texts.txt", "--output", output]
    said = runner.invoke(app, [str(part) for part in arguments])
    assert said.exit_code == 0, said.output
    told = said.output.split()
    before, after = (float(told[told.index(word) - 1]) for word in ("before,", "after,"))
    assert before > 0.8 * math.log(30_522)
    assert after < before - 3
    tuned = config_of(workshop).model_copy(
        update={"model": config_of(workshop).model.model_copy(update={"name": str(output)})}
    )
    classifier = open_classifier(tuned.model, ("a", "b"))
    assert open_tokenizer(tuned.model).mask_token == "[MASK]"
    fresh = open_classifier(config_of(workshop).model, ("a", "b"))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(classifier.state_dict()[name], fresh.state_dict()[name])

    again = runner.invoke(app, [str(part) for part in arguments])
    assert again.exit_code == 2
    assert "is there already" in " ".join(again.output.split())


def test_the_same_seed_gives_the_same_encoder(workshop: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        run = Pretraining(config_of(workshop, max_steps=3, epochs=1), read_texts(workshop / "texts.txt"), 0.15)
        run.train(lambda done, steps: None)
        found: dict[str, torch.Tensor] = run.model.state_dict()
        return found

    first, second = weights(), weights()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a\n" * 50, "holds 1 texts"), (b"\xff\n" * 50, r"not UTF-8 \(byte 0\)"), (None, "cannot be read")],
)
def test_texts_that_cannot_be_used(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_texts(path)


def test_a_tokenizer_without_a_mask_is_refused(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(config_of(workshop).model)
    tokenizer.mask_token = None
    monkeypatch.setattr("train.pretrain.open_tokenizer", lambda config: tokenizer)
    with pytest.raises(ConfigurationError, match="no token for a mask"):
        Pretraining(config_of(workshop), [f"text {number}" for number in range(30)], 0.15)
