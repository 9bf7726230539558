"""The tensors of the Open Inference Protocol v2: requests read and answers written, in JSON and in its binary form.

Pure. The model takes one input, `text` (BYTES, [n] or [n, 1]), and gives `label` (BYTES, [n]), `confidence` (FP32, [n])
and `scores` (FP32, [n, labels]).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from overtone.errors import MalformedError
from overtone.text import has_lone_surrogate
from serve.bodies import FieldError, checked_texts, invalid, parse_json
from serve.longtext import LONG_TEXT_POLICIES, LongText, Scores

OUTPUTS = ("label", "confidence", "scores")
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Call:
    """A request for inference."""

    id: str | None
    texts: list[str]
    outputs: tuple[tuple[str, bool], ...]
    """The outputs asked for, and whether in binary."""
    long_text: LongText


def read_call(body: bytes, header_length: int | None) -> Call:
    """The request in `body`, of which the first `header_length` bytes are JSON and the rest is binary (None: no rest).

    Raises:
        MalformedError: the lengths do not fit the body, or its JSON is none.
        InvalidInputError: naming the field that is wrong.
    """
    if header_length is not None and header_length > len(body):
        raise MalformedError(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes.")
    content = parse_json(body if header_length is None else body[:header_length])
    binary = b"" if header_length is None else body[header_length:]
    if not isinstance(content, dict):
        raise invalid([FieldError("body", "must be a JSON object with the field inputs")])
    given = content.get("id")
    if given is not None and not isinstance(given, str):
        raise invalid([FieldError("id", "must be a string")])
    if given is not None and has_lone_surrogate(given):
        raise invalid([FieldError("id", "must not hold half of a surrogate pair (U+D800 to U+DFFF)")])
    parameters = _parameters(content, "parameters")
    texts = _texts(content.get("inputs"), binary)
    return Call(given, texts, _outputs(content.get("outputs"), parameters), _long_text(parameters))


def write_answer(
    call: Call, head: dict[str, Any], labels: Sequence[str], rows: list[Scores]
) -> tuple[bytes, int | None]:
    """The answer to `call`: `head` with the outputs of `rows`, and the length of its JSON if binary data follows."""
    scores = np.array(rows, dtype="<f4")
    best = scores.argmax(axis=1)
    values: dict[str, tuple[str, list[int], Any]] = {
        "label": ("BYTES", [len(rows)], [labels[index] for index in best]),
        "confidence": ("FP32", [len(rows)], scores.max(axis=1)),
        "scores": ("FP32", [len(rows), len(labels)], scores),
    }
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, is_binary in call.outputs:
        datatype, shape, value = values[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if is_binary:
            blobs.append(_packed(value) if datatype == "BYTES" else value.tobytes())
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = value if datatype == "BYTES" else value.reshape(-1).astype("f8").round(6).tolist()
        outputs.append(output)
    content = orjson.dumps(({"id": call.id} if call.id is not None else {}) | head | {"outputs": outputs})
    return content + b"".join(blobs), len(content) if blobs else None


def _texts(inputs: Any, binary: bytes) -> list[str]:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise invalid([FieldError("inputs", "must be a list of one input, named text")])
    tensor = inputs[0]
    if tensor.get("name") != "text":
        raise invalid([FieldError("inputs[0].name", "must be text, the only input of the model")])
    if tensor.get("datatype") != "BYTES":
        raise invalid([FieldError("inputs[0].datatype", "must be BYTES")])
    count = _count(tensor.get("shape"))
    size = _parameters(tensor, "inputs[0].parameters").get("binary_data_size")
    if size is None:
        if binary:
            raise MalformedError(f"{len(binary)} bytes follow the JSON, but no input has binary_data_size.")
        elements = _flat(tensor.get("data"), tensor["shape"])
    else:
        if not isinstance(size, int) or isinstance(size, bool) or size != len(binary):
            raise MalformedError(
                f"inputs[0] has binary_data_size {size!s:.20}, but {len(binary)} bytes follow the JSON."
            )
        if "data" in tensor:
            raise invalid([FieldError("inputs[0].data", "cannot be given beside binary_data_size")])
        elements = _unpacked(binary, count)
    if len(elements) != count:
        problem = f"says {count} elements, but there are {len(elements)}"
        raise invalid([FieldError("inputs[0].shape", problem, count, len(elements))])
    return checked_texts(elements, "inputs[0].data")


def _count(shape: Any) -> int:
    """The elements of a tensor of `shape`."""
    is_shape = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not is_shape or len(shape) not in {1, 2} or shape[0] < 1 or shape[1:] not in ([], [1]):
        raise invalid([FieldError("inputs[0].shape", "must be [n] or [n, 1], with n of at least 1")])
    count: int = shape[0]
    return count


def _flat(data: Any, shape: list[int]) -> list[Any]:
    """The elements of `data`, which may be nested as `shape` is, or flat."""
    if not isinstance(data, list):
        raise invalid([FieldError("inputs[0].data", "must be a list of strings")])
    if len(shape) == 2 and data and all(isinstance(item, list) and len(item) == 1 for item in data):
        return [item[0] for item in data]
    return data


def _unpacked(binary: bytes, count: int) -> list[str]:
    """The strings in `binary`, each behind its length in four bytes."""
    texts: list[str] = []
    start = 0
    while start < len(binary) and len(texts) <= count:
        begin = start + _LENGTH_BYTES
        start = begin + int.from_bytes(binary[start:begin], "little")
        if start > len(binary):
            raise MalformedError(f"inputs[0].data[{len(texts)}] ends beyond the end of the body.")
        try:
            texts.append(binary[begin:start].decode())
        except UnicodeDecodeError:
            raise MalformedError(f"inputs[0].data[{len(texts)}] is not UTF-8.") from None
    return texts


def _packed(values: Sequence[str]) -> bytes:
    encoded = [value.encode() for value in values]
    return b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in encoded)


def _outputs(asked: Any, parameters: dict[str, Any]) -> tuple[tuple[str, bool], ...]:
    default = _flag(parameters, "binary_data_output", "parameters", False)
    if asked is None or asked == []:
        return tuple((name, default) for name in OUTPUTS)
    if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
        raise invalid([FieldError("outputs", "must be a list of objects with a name")])
    outputs: dict[str, bool] = {}
    for index, item in enumerate(asked[: len(OUTPUTS) + 1]):
        name = item.get("name")
        if name not in OUTPUTS or name in outputs:
            problem = f"must be one of {', '.join(OUTPUTS)}, each at most once"
            raise invalid([FieldError(f"outputs[{index}].name", problem)])
        where = f"outputs[{index}].parameters"
        own = _parameters(item, where)
        if "classification" in own or "shared_memory_region" in own:
            raise invalid([FieldError(where, "asks for an extension that this server does not have")])
        outputs[name] = _flag(own, "binary_data", where, default)
    return tuple(outputs.items())


def _parameters(holder: dict[str, Any], field: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise invalid([FieldError(field, "must be an object")])
    return parameters


def _flag(parameters: dict[str, Any], name: str, field: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid([FieldError(f"{field}.{name}", "must be true or false")])
    return value


def _long_text(parameters: dict[str, Any]) -> LongText:
    value: LongText = parameters.get("long_text", "truncate")
    if value not in LONG_TEXT_POLICIES:
        raise invalid([FieldError("parameters.long_text", f"must be one of {', '.join(LONG_TEXT_POLICIES)}")])
    return value
