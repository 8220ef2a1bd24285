"""A little data set in COCO's form with boxes, masks and keypoints: rectangles and triangles on a plain ground."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

KEYPOINTS = ("left_foot", "right_foot", "top")
SIZE = 64


def write_shapes(root: Path, num_train: int = 4, num_test: int = 2) -> Path:
    """Writes ``annotations/{instances,person_keypoints}_{train,val}2017.json`` and the images; every image has two shapes."""
    chance = np.random.default_rng(0)
    categories = [{"id": 1, "name": "box"}, {"id": 3, "name": "roof"}]
    points = [{**category, "keypoints": list(KEYPOINTS), "skeleton": []} for category in categories]
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train2017", num_train), ("val2017", num_test)):
        (root / part).mkdir()
        images, objects = [], []
        for number in range(1, count + 1):
            image = Image.new("RGB", (SIZE, SIZE), (40, 40, 40))
            for which, left in enumerate((4, 36)):
                x, y, side = left + int(chance.integers(0, 4)), int(chance.integers(4, 30)), 22
                outline = (
                    [x, y + side, x + side, y + side, x + side, y, x, y]
                    if which == 0
                    else [x, y + side, x + side, y + side, x + side // 2, y]
                )
                ImageDraw.Draw(image).polygon(outline, fill=(200, 60, 60) if which == 0 else (60, 60, 220))
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": number,
                        "category_id": categories[which]["id"],
                        "bbox": [x, y, side, side],
                        "area": side * side / (1 + which),
                        "iscrowd": 0,
                        "segmentation": [outline],
                        "keypoints": [x, y + side, 2, x + side, y + side, 2, x + side // 2, y, 2],
                        "num_keypoints": 3,
                    }
                )
            image.save(root / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE})
        content = {"images": images, "annotations": objects}
        for kind, listed in (("instances", categories), ("person_keypoints", points)):
            (root / "annotations" / f"{kind}_{part}.json").write_text(json.dumps({**content, "categories": listed}))
    return root
