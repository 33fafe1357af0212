"""The classes nearest to an image: python nearest.py IMAGE [HOW_MANY]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

folder = Path(__file__).parent
about = json.loads((folder / "export.json").read_text())["input"]
size, count = about["size"], int(sys.argv[2]) if len(sys.argv) > 2 else 5
image = Image.open(sys.argv[1]).convert(about["mode"]).resize((size, size), Image.Resampling.BILINEAR)
pixels = np.asarray(image, np.float32).reshape(size, size, -1).transpose(2, 0, 1) / 127.5 - 1
embedding = onnxruntime.InferenceSession(folder / "backbone.onnx").run(None, {"images": pixels[None]})[0][0]
centers = np.load(folder / "class_centers.npy", mmap_mode="r")  # [classes, D], or [classes, sub-centers, D]
cosines = (centers @ (embedding / np.linalg.norm(embedding))).reshape(len(centers), -1).max(1)
table = (folder / "classes.jsonl").read_text(encoding="utf-8").split("\n")
for i in np.argsort(-cosines)[:count]:
    print(f"{cosines[i]:.4f}  {''.join(filter(str.isprintable, json.loads(table[i])['name']))}  (class {i})")
