"""Own boxes in COCO's form, own classes: a small detector is trained, evaluated, saved, and used as a plain torchvision model.

pip install 'gkd[detection]'
python examples/own_detector_data.py
"""

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from gkd.data import COCO
from gkd.detection import DetectorNetwork, load_detector
from gkd.engine import AdamW, RunFolder, Trainer
from gkd.tasks import Detection


def draw_images(root: Path, count: int) -> None:
    """Images with a red square or a blue disc, and labels.json: what an annotation program exports."""
    (root / "images").mkdir()
    images, annotations = [], []
    for number in range(count):
        left, top, side, kind = 8 + number * 7 % 40, 8 + number * 13 % 40, 32 + number % 3 * 8, number % 2
        picture = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if kind else draw.rectangle)([left, top, left + side, top + side], fill="blue" if kind else "red")
        picture.save(root / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 96})
        annotations.append({"id": number, "image_id": number, "category_id": kind + 1, "bbox": [left, top, side, side]})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
    (root / "labels.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    draw_images(root, 40)
    run = RunFolder(root / "run")
    task = Detection(
        DetectorNetwork("fcos", "resnet10", options={"fpn_channels": 64, "norm": "batch"}),
        data=COCO(str(root), train=("images", "labels.json"), test=0.2, min_size=96, max_size=96),
        batch_size=8,
        trainer=Trainer(epochs=2, optimizer=AdamW(lr=2e-3), device="cpu", loggers=(), log_every=4),
    )
    results = task.train(run)
    print(f"AP {results['final']['AP']:.1f} after {results['steps']} steps; more steps are needed for a good detector")
    model, about = load_detector(run.path)
    with torch.no_grad():
        (boxes,) = model([torch.rand(3, 96, 96)])
    print("classes", about["classes"], "and", len(boxes["scores"]), "boxes in an image of noise")
