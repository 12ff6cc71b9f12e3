"""The operators of Mamba in PyTorch and in ONNX, for anybody's model. It knows nothing of sentiment."""
