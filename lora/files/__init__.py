"""Files on the disk: safetensors by mapping and as a stream, copies with patches, and writing that leaves nothing
half-written.
"""
