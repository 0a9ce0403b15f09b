"""A checkpoint as ONNX graphs and engines, or packed in fewer bits, published whole."""
