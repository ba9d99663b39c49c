"""The bundle: what is in it (``manifest``), in which layout (``layout``), what its adapters change (``changes``), and
changing it safely (``staging``).

No torch, no onnx: an embedding process reads bundles through these modules.
"""
