"""Files on the disk: safetensors mapped and streamed, copies with patches, nothing half-written."""
