"""A checkpoint as ONNX graphs and engines, published whole."""
