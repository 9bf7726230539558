"""A bundle with a torch form, so that the engine on torch can be measured with the weights of any bundle.

The weights of the bundle, dequantised, exported in fp32 as `python -m train` exports them. Needs the `train` extra.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.plain_model import CACHE, rebuild
from benchmarks.texts import synthetic_texts
from overtone.bundle import MODEL_FILE, Bundle, TextEncoder, load_bundle
from overtone.engine import classify_sorted, open_engine
from overtone.text import normalise

_TEXTS = 256
"""Few are needed: nothing is learned from them, and the temperature is not what is measured."""


def torch_bundle(bundle: Bundle) -> Bundle:
    """`bundle` if it has a torch form; else one of its weights in fp32 that has, made once.

    Raises:
        BundleError: the model of the bundle is of an architecture of which none can be made.
    """
    if bundle.torch is not None:
        return bundle
    CACHE.mkdir(mode=0o700, exist_ok=True)
    target = CACHE / f"{bundle.sha256[MODEL_FILE]}-torch"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            os.replace(_export(bundle, Path(scratch)), target)
    return load_bundle(target)


def _export(bundle: Bundle, scratch: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    from train.config import TrainConfig
    from train.data import LabelledTexts, Split
    from train.export import export_bundle

    weights = scratch / "weights"
    rebuild(bundle).save_pretrained(weights)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle.tokenizer_path), pad_token="[PAD]")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(weights)
    texts = tuple(map(normalise, synthetic_texts(_TEXTS)))
    engine = open_engine(bundle)
    scores = classify_sorted(engine, TextEncoder(bundle).encode(texts))
    engine.close()
    # Drawn by their scores: the best label of each would make the temperature that of a model that never errs.
    chances = np.random.default_rng(0).random((len(texts), 1))
    half = LabelledTexts(texts, (scores.cumsum(axis=1)[:, :-1] < chances).sum(axis=1))
    config = TrainConfig.model_validate(
        {
            "name": f"{bundle.name}-torch",
            "model": {"name": bundle.base_model or bundle.name, "max_length": bundle.max_length, "pooling": "mean"},
            "data": {"labels": bundle.labels},
            "export": {"precision": "fp32", "torch": True, "golden": [golden.text for golden in bundle.golden]},
        }
    )
    return export_bundle(weights, scratch / "bundle", config, Split(half, half), {}).bundle.path
