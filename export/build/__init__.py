"""From a separator to checked ONNX graphs."""
