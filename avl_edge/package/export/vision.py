"""``vision.onnx``: CLIP's tower and LLaVA's projector, pixels to the decoder's image features."""

from __future__ import annotations

import math

from ...model.clip_config import ClipSpec
from ...model.families.llava import LlavaSpec
from .bindings import FEATURES, PIXELS
from .graph import Graph
from .layers import activation, layer_norm, linear


def build_vision(graph: Graph, spec: LlavaSpec) -> None:
    """Add the nodes from ``pixels`` to ``features``; only the layers that the features asked for need."""
    vision = spec.vision
    tokens, size = 1 + vision.patches, vision.hidden_size
    states = [layer_norm(graph, "vision.pre_layrnorm", _embed(graph, vision), size, vision.norm_eps)]
    for layer in range(max(spec.feature_layers)):
        graph.scope = f"vision.{layer}/"
        states.append(_layer(graph, vision, f"vision.encoder.layers.{layer}", states[-1]))
    graph.scope = "projector/"
    chosen = [states[layer] for layer in spec.feature_layers]
    features = chosen[0] if len(chosen) == 1 else graph.add("Concat", *chosen, axis=-1)
    width = size * len(chosen)
    if spec.drop_class_token:
        whole = graph.add("Reshape", features, graph.constant([-1, tokens, width]))
        patches = graph.add("Slice", whole, graph.constant([1]), graph.constant([tokens]), graph.constant([1]))
        features = graph.add("Reshape", patches, graph.constant([-1, width]))
    hidden = spec.text.hidden_size
    features = linear(graph, "projector.linear_1", features, hidden, width, bias=spec.projector_bias)
    features = activation(graph, spec.projector_activation, features)
    features = linear(graph, "projector.linear_2", features, hidden, hidden, bias=spec.projector_bias)
    graph.add("Reshape", features, graph.constant([-1, spec.tokens_per_image, hidden]), name=FEATURES)


def _embed(graph: Graph, spec: ClipSpec) -> str:
    """Patches and class token with their positions, ``[images * tokens, size]``."""
    size, patch = spec.hidden_size, spec.patch_size
    # In float32, as the pixels are: this opset has no convolution in bfloat16, and it is a small part of the work.
    kernel = "vision.embeddings.patch_embedding.weight"
    graph.tensor(kernel, graph.take(kernel, size, 3, patch, patch), "float32")
    grid = graph.add("Conv", PIXELS, kernel, kernel_shape=[patch, patch], strides=[patch, patch])
    flat = graph.add("Reshape", graph.narrow(grid), graph.constant([0, size, spec.patches]))
    patches = graph.add("Transpose", flat, perm=[0, 2, 1])
    # The class token is the same for every image: it rides on its position, above a row of zeros.
    positions = graph.take("vision.embeddings.position_embedding.weight", spec.patches + 1, size).clone()
    positions[0] += graph.take("vision.embeddings.class_embedding", size)
    padded = graph.add("Pad", patches, graph.constant([0, 1, 0, 0, 0, 0]))
    placed = graph.add("Add", padded, graph.tensor("vision.embeddings.positions_and_class", positions))
    return graph.add("Reshape", placed, graph.constant([-1, size]))


def _layer(graph: Graph, spec: ClipSpec, name: str, x: str) -> str:
    size, inner = spec.hidden_size, spec.intermediate_size
    normed = layer_norm(graph, f"{name}.layer_norm1", x, size, spec.norm_eps)
    x = graph.add("Add", x, _attention(graph, spec, f"{name}.self_attn", normed))
    normed = layer_norm(graph, f"{name}.layer_norm2", x, size, spec.norm_eps)
    up = activation(graph, spec.activation, linear(graph, f"{name}.mlp.fc1", normed, inner, size, bias=True))
    return graph.add("Add", x, linear(graph, f"{name}.mlp.fc2", up, size, inner, bias=True))


def _attention(graph: Graph, spec: ClipSpec, name: str, x: str) -> str:
    size, dim = spec.hidden_size, spec.hidden_size // spec.heads
    shape = graph.constant([-1, 1 + spec.patches, spec.heads, dim])
    query, key, value = (
        graph.add("Reshape", linear(graph, f"{name}.{part}_proj", x, size, size, bias=True), shape) for part in "qkv"
    )
    query = graph.add("Mul", query, graph.constant(1 / math.sqrt(dim), graph.dtype))
    logits = graph.add(
        "MatMul", graph.add("Transpose", query, perm=[0, 2, 1, 3]), graph.add("Transpose", key, perm=[0, 2, 3, 1])
    )
    weights = graph.add("Softmax", logits, axis=-1)
    attended = graph.add("MatMul", weights, graph.add("Transpose", value, perm=[0, 2, 1, 3]))
    flat = graph.add("Reshape", graph.add("Transpose", attended, perm=[0, 2, 1, 3]), graph.constant([-1, size]))
    return linear(graph, f"{name}.out_proj", flat, size, size, bias=True)
