"""The bundle format: ``manifest`` says what is in it, ``staging`` changes it safely. No torch, no onnx."""
