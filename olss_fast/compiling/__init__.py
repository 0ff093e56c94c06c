"""A network made exportable: its arguments as flat tensors, its shapes, its graph. Engines and ONNX share it."""
