"""Exporting a network: its arguments as flat tensors, its shapes, its graph. Shared by engines and ONNX."""
