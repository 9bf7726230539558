"""The torch form of a bundle: its model as plain tensors beside the ONNX graph, for `ENGINE=torch`. Optional.

    torch/config.json          the shape of the model, its temperature and the scores of the golden texts
    torch/model.safetensors    its weights in float32

It has a temperature and golden scores of its own, because the graph beside it may be quantised and gives others.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overtone.errors import BundleError

TORCH_FOLDER = "torch"
TORCH_CONFIG_FILE = f"{TORCH_FOLDER}/config.json"
TORCH_WEIGHTS_FILE = f"{TORCH_FOLDER}/model.safetensors"
TORCH_FILES = (TORCH_CONFIG_FILE, TORCH_WEIGHTS_FILE)
"""As the manifest of a bundle names them; a bundle has both or neither."""

Activation = Literal["gelu", "gelu_tanh", "relu", "tanh"]


class TorchForm(BaseModel):
    """`torch/config.json`: an encoder of the kind of BERT, with what reads a text's scores off its vectors.

    Widths are those of the tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: Annotated[int, Field(ge=1, le=1024)]
    heads: Annotated[int, Field(ge=1, le=1024)]
    activation: Activation
    """Between the two matrix products that follow attention."""
    epsilon: Annotated[float, Field(gt=0, lt=1)]
    """Added to variances by the layer norms."""
    pooling: Literal["first", "mean"]
    """The vector of a text: its first token's, or the mean of all."""
    head: Activation | None = None
    """After the layer between that vector and the last one; without, there is no such layer."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Logits are divided by it before the softmax."""
    golden: Annotated[tuple[tuple[Annotated[float, Field(ge=0, le=1)], ...], ...], Field(min_length=1)]
    """The scores, one a label, of each golden text of the bundle."""


def read_torch_form(path: Path, *, texts: int, labels: int) -> TorchForm:
    """The form in the file `path`, of a bundle with so many golden texts and labels.

    Raises:
        BundleError: naming the file and what is wrong with it.
    """
    try:
        form = TorchForm.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise BundleError(f"{path}: {where}: {first['msg']}") from error
    if len(form.golden) != texts:
        raise BundleError(f"{path}: golden has {len(form.golden)} rows for {texts} golden texts")
    for number, scores in enumerate(form.golden):
        if len(scores) != labels:
            raise BundleError(f"{path}: golden.{number} has {len(scores)} numbers for {labels} labels")
    return form
