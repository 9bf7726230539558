"""The baseline of the engine is the same model, quantised by others' defaults."""

import numpy as np
import onnx
import torch

from benchmarks.plain_model import plain_model, rebuild
from overtone.bundle import TextEncoder, load_bundle, probabilities
from overtone.engine import open_engine


def test_the_rebuilt_model_agrees_with_the_bundle_it_was_made_from() -> None:
    bundle = load_bundle()
    model, engine = rebuild(bundle), open_engine(bundle)
    for ids in TextEncoder(bundle).encode([golden.text for golden in bundle.golden[:3]]):
        batch = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits.numpy()
        # The bundle quantises what flows between the layers, the rebuilt model does not.
        np.testing.assert_allclose(probabilities(logits, bundle.temperature), engine.classify([ids]), atol=0.05)


def test_the_plain_model_is_quantised_and_has_no_fused_operator() -> None:
    kinds = {node.op_type for node in onnx.load(plain_model(load_bundle())).graph.node}
    assert "DynamicQuantizeLinear" in kinds
    assert not {"Attention", "QAttention", "QEmbedLayerNormalization"} & kinds
