"""Weights that come in (InsightFace's, any backbone's) and go out (safetensors, ONNX, class centres).

Imported by cli only; imports train and everything below.
"""
