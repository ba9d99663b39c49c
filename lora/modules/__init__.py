"""LoRA inside a torch model: its layers, the bottlenecks it is measured against, and PEFT's files. Needs torch."""
