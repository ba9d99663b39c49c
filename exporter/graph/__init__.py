"""From a torch module to a dense ONNX graph whose weights keep their names: a pass a file."""
