"""From a base and its adapters to a bundle of dense ONNX graphs. The modules import torch only to trace."""
