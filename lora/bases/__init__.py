"""Reading base models: safetensors checkpoints, bitsandbytes 4-bit, GGUF. ``opening`` finds which one it is."""
