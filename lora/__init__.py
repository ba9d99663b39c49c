"""What a LoRA adapter is, and what it does to a weight. Needs numpy, not torch.

``lora.formats.read.read_adapter`` reads one, ``lora.merging.fit`` finds its tensors in a base,
``lora.merging.merge.merge`` yields the tensors that it changes.
"""
