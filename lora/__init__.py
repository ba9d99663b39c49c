"""What a LoRA adapter is, and what it does to a weight. Needs numpy, not torch.

``lora.peft.read_adapter`` reads one, ``lora.merge.merge`` yields the tensors that it changes.
"""
