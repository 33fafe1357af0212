"""Import of weights (InsightFace's, any backbone's) and export (safetensors, ONNX, class centres).

May import ``train`` and the rooms below. Only ``cli`` may import it.
"""
