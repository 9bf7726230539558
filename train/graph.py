"""Changes to the graph of an exported model that ONNX Runtime does not make by itself.

All of them are for a CPU, and measured: docs/decisions/0007-engine-graph-and-scales.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

OPSET = 24
"""The first with the input of `Attention` for the lengths of padded rows."""

MASK_INPUT = "attention_mask"
"""The input of a model that is 1 for tokens and 0 for padding."""

_CONTRIB = "com.microsoft"
_TOKENWISE = frozenset(
    {"Add", "Cast", "Gelu", "LayerNormalization", "MatMul", "MatMulIntegerToFloat", "Mul", "QuantizeLinear"}
)
"""Operators that make each token's numbers from that token's alone, where whatever else they read is constant."""
_PRODUCTS = frozenset({"MatMul", "MatMulIntegerToFloat"})
_MAKE_LENGTHS = ("EmbedLayerNormalization", "ReduceSum")


@dataclass(frozen=True, slots=True)
class Scale:
    """How float32 becomes uint8: `round(x / step) + zero`."""

    step: float
    zero: int


def split_attention(model: Any) -> int:
    """Replace fused `Attention` by three matrix products and the standard operator; how many were replaced.

    The fused kernel multiplies by the head, each time packing its input anew, and copies heads together at the end.
    A node whose mask is not the length of each row stays as it is.
    """
    from onnx import helper

    graph = model.graph
    constants = _Constants(model)
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    nodes: list[Any] = []
    lengths: dict[str, str] = {}
    replaced = 0
    for node in graph.node:
        if not _has_lengths(node, made_by):
            nodes.append(node)
            continue
        source, weight, bias, mask = list(node.input)[:4]
        if mask not in lengths:
            lengths[mask] = f"{mask}_int64"
            nodes.append(helper.make_node("Cast", [mask], [lengths[mask]], to=7))
        heads = next(one.i for one in node.attribute if one.name == "num_heads")
        parts = zip("qkv", np.split(constants[weight], 3, axis=1), np.split(constants[bias], 3), strict=True)
        outputs = []
        for part, matrix, vector in parts:
            name = f"{node.output[0]}_{part}"
            inputs = [source, constants.add(f"{name}_weight", matrix)]
            nodes.append(helper.make_node("MatMul", inputs, [f"{name}_product"], name=f"{name}_product"))
            inputs = [f"{name}_product", constants.add(f"{name}_bias", vector)]
            nodes.append(helper.make_node("Add", inputs, [name], name=name))
            outputs.append(name)
        inputs = [*outputs, "", "", "", lengths[mask]]
        name = f"{node.output[0]}_attention"
        nodes.append(
            helper.make_node("Attention", inputs, [node.output[0]], name=name, q_num_heads=heads, kv_num_heads=heads)
        )
        replaced += 1
    if replaced:
        _replace_nodes(graph, nodes)
        _set_opset(model)
    return replaced


def quantised_tensors(model: Any) -> list[str]:
    """The names of the float tensors that the graph quantises as they come."""
    return [node.input[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"]


def freeze_scales(model: Any, scales: Mapping[str, Scale]) -> None:
    """Quantise every tensor of `quantised_tensors` by the scale it has in `scales`, the same for every batch.

    `MatMulInteger` and what scales its result become one node, with the bias in it.
    """
    from onnx import helper

    constants = _Constants(model)
    frozen = {node.output[1]: node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"}
    for node in frozen.values():
        scale = scales[node.input[0]]
        constants.add(node.output[1], np.float32(scale.step))
        constants.add(node.output[2], np.uint8(scale.zero))
    products = {chain.nodes[0].output[0]: chain for chain in _products(model.graph, constants, frozen)}
    dropped = {output for chain in products.values() for node in chain.nodes for output in node.output}
    nodes: list[Any] = []
    for node in model.graph.node:
        name = node.output[0]
        if node.op_type == "DynamicQuantizeLinear":
            inputs = [node.input[0], *node.output[1:]]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [name], name=f"{name}_node"))
        elif name in products:
            chain = products[name]
            inputs = [node.input[0], node.input[1], chain.scale, chain.weight_scale, node.input[2], "", chain.bias]
            output = chain.nodes[-1].output[0]
            made = helper.make_node("MatMulIntegerToFloat", inputs, [output], name=f"{output}_node", domain=_CONTRIB)
            nodes.append(made)
        elif name not in dropped:
            nodes.append(node)
    _replace_nodes(model.graph, nodes)


def pack_rows(model: Any) -> int:
    """Let nothing but attention see padding; into how many attentions rows are unpacked.

    Between them the tokens of all rows lie side by side, [tokens, width], so that padding costs no matrix product. The
    places to pack from and to unpack to come from the mask, once a batch. Call it last: it knows the operators of
    `freeze_scales`. A model with an attention that is not told lengths stays as it is.
    """
    from onnx import helper

    graph = model.graph
    constants = _Constants(model)
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    if not attentions or any(node.domain or len(node.input) < 7 for node in attentions):
        return 0
    made_by = {output: node for node in graph.node for output in node.output}
    fixed = _fixed(graph)
    source = attentions[0].input[0]
    while source in made_by and made_by[source].op_type in _TOKENWISE:
        source = _followed(made_by[source], fixed)
    packing = _Packing(constants, width=_width(attentions[0], constants, fixed, made_by))
    packed = {source: f"{source}_packed"}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "Attention":
            for place in range(3):
                node.input[place] = packing.unpack(packed[node.input[place]], nodes)
            packed[node.output[0]] = f"{node.output[0]}_packed"
            nodes.append(node)
            packing.pack(node.output[0], packed[node.output[0]], nodes)
            continue
        is_tokenwise = node.op_type in _TOKENWISE and all(
            name in packed or name in fixed or not name for name in node.input
        )
        for place, name in enumerate(node.input):
            if name in packed:
                node.input[place] = packed[name] if is_tokenwise else packing.unpack(packed[name], nodes)
        if is_tokenwise and any(name in packed.values() for name in node.input):
            for place, name in enumerate(node.output):
                packed[name] = node.output[place] = f"{name}_packed"
        nodes.append(node)
        if source in node.output:
            packing.pack(source, packed[source], nodes)
    places = [helper.make_node(kind, inputs, [output]) for kind, inputs, output in packing.places]
    _replace_nodes(graph, [*places, *nodes])
    return len(attentions)


def _fixed(graph: Any) -> set[str]:
    """The names of what is the same for every batch: an exporter keeps constants that are alike once, by `Identity`."""
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.op_type == "Identity" and node.input[0] in fixed):
            fixed.update(node.output)
    return fixed


def _followed(node: Any, fixed: set[str]) -> str:
    """The input of `node` that differs between batches: a sum may name its constant first."""
    return next((str(name) for name in node.input if name not in fixed), str(node.input[0]))


def _width(attention: Any, constants: "_Constants", fixed: set[str], made_by: Mapping[str, Any]) -> int:
    """Of the tokens that go into `attention`: the columns of the matrix that makes its first input."""
    name = attention.input[0]
    while not (made_by[name].op_type in _PRODUCTS and made_by[name].input[1] in constants):
        name = _followed(made_by[name], fixed)
    return int(constants[made_by[name].input[1]].shape[1])


class _Packing:
    """The nodes that pack and unpack."""

    def __init__(self, constants: "_Constants", *, width: int) -> None:
        flat = constants.add("packing_flat", np.array([-1], dtype=np.int64))
        first = constants.add("packing_first", np.array(0, dtype=np.int64))
        one = constants.add("packing_one", np.array(1, dtype=np.int64))
        self._rows = constants.add("packing_rows", np.array([-1, width], dtype=np.int64))
        self._unpacked: dict[str, str] = {}
        self.places = (
            ("Reshape", [MASK_INPUT, flat], "packing_mask"),
            ("NonZero", ["packing_mask"], "packing_found"),
            ("Reshape", ["packing_found", flat], "packing_from"),
            ("CumSum", ["packing_mask", first], "packing_count"),
            # Padding reads the token before it, which nothing looks at.
            ("Sub", ["packing_count", one], "packing_place"),
            ("Shape", [MASK_INPUT], "packing_shape"),
            ("Reshape", ["packing_place", "packing_shape"], "packing_to"),
        )
        """Operator, inputs and output of what finds the places of tokens, in order."""

    def pack(self, name: str, output: str, nodes: list[Any]) -> None:
        """`name`, [rows, longest, width], as `output`, [tokens, width]."""
        from onnx import helper

        nodes.append(helper.make_node("Reshape", [name, self._rows], [f"{name}_rows"]))
        nodes.append(helper.make_node("Gather", [f"{name}_rows", "packing_from"], [output], axis=0))

    def unpack(self, name: str, nodes: list[Any]) -> str:
        """The name of `name` as [rows, longest, width]."""
        from onnx import helper

        if name not in self._unpacked:
            self._unpacked[name] = f"{name}_unpacked"
            nodes.append(helper.make_node("Gather", [name, "packing_to"], [self._unpacked[name]], axis=0))
        return self._unpacked[name]


@dataclass(frozen=True, slots=True)
class _Product:
    """`MatMulInteger` -> `Cast` -> `Mul` by the scales of both sides -> `Add` of the bias."""

    nodes: tuple[Any, ...]
    scale: str
    weight_scale: str
    bias: str


def _products(graph: Any, constants: "_Constants", frozen: Mapping[str, Any]) -> Iterator[_Product]:
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "MatMulInteger" or constants[node.input[3]].any():
            continue
        (cast,) = users[node.output[0]]
        (scaling,) = users[cast.output[0]]
        by = made_by[scaling.input[1]]
        scale, weight_scale = by.input if by.input[0] in frozen else reversed(by.input)
        (after, *others) = users[scaling.output[0]]
        bias = next((name for name in after.input if name in constants), "") if after.op_type == "Add" else ""
        if others or not bias or constants[bias].ndim != 1:
            yield _Product((node, cast, scaling), scale, weight_scale, "")
        else:
            yield _Product((node, cast, scaling, after), scale, weight_scale, bias)


class _Constants:
    """The constants of a graph by name, as arrays."""

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._tensors[name])

    def add(self, name: str, value: Any) -> str:
        """Add a constant; its name."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        self._graph.initializer.append(tensor)
        self._tensors[name] = tensor
        return name


def _has_lengths(node: Any, made_by: Mapping[str, str]) -> bool:
    if node.op_type != "Attention" or node.domain != _CONTRIB or len(node.input) < 4 or any(node.input[4:]):
        return False
    return made_by.get(node.input[3]) in _MAKE_LENGTHS


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Make `nodes` those of `graph`, without the ones and the constants that nothing reads any more."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    # The shapes written down for tensors that are gone would be checked.
    del graph.value_info[:]


def _set_opset(model: Any) -> None:
    for entry in model.opset_import:
        if entry.domain in {"", "ai.onnx"}:
            entry.version = max(entry.version, OPSET)
    model.ir_version = max(model.ir_version, 10)
