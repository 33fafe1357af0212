"""Import of weights and of InsightFace's configs, and export (safetensors, ONNX, class centres).

May import ``train`` and the rooms below. Only ``cli`` may import it.
"""
