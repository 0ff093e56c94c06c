"""A network, its guidance and a plan as one ONNX model."""
