"""A bundle as a folder of the Hugging Face kind, for peers that load nothing else."""

import json
import shutil
from pathlib import Path

from overtone.bundle import Bundle

_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def write_hub_folder(bundle: Bundle, folder: Path) -> Path:
    """Write config, tokenizer and model of `bundle` to `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle.model_path, folder / "model.onnx")
    shutil.copy(bundle.tokenizer_path, folder / "tokenizer.json")
    names = dict(enumerate(bundle.labels))
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
        "pad_token_id": 0,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": bundle.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        **_SPECIAL,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(_SPECIAL, indent=1) + "\n", encoding="utf-8")
    return folder
