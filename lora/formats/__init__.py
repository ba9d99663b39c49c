"""Reading adapters: a module per format, each into the normal form of ``lora.adapter``.

``read`` finds which one it is.
"""
