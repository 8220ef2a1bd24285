"""Annotations of other programs: normalised so that a perfect detector gets AP 100, or refused by a message that names both places."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from gkd.data import COCO, VOC, YOLO, DetectionData
from gkd.data.annotations import flip_pairs, normalise
from gkd.detection.interface import Detections
from gkd.tasks.precision import evaluate_detector

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

SIZE = (60, 80)
BOXES = {1: [(0, [10, 5, 30, 20]), (1, [40, 10, 39, 48])], 2: [(1, [3, 4, 50, 40])], 3: [(0, [1, 2, 12, 9]), (0, [20, 20, 40, 32])], 4: []}
NAMES = ("cat", "dog")


class Oracle:
    """A perfect detector: finds the true boxes of the batch that is read."""

    has_masks, num_keypoints = False, 0

    def __init__(self) -> None:
        self.targets: list = []

    def remember(self, batches):
        for batch in batches:
            self.targets = batch[1]
            yield batch

    def detect(self, images):
        return [Detections(target["boxes"], torch.ones(len(target["boxes"])), target["labels"]) for target in self.targets]


def numbers_of(oracle: Oracle, data: DetectionData) -> dict:
    return evaluate_detector(oracle, data, "test", lambda: oracle.remember(data.batches("test", 3, resized=False)))


def judged(data: DetectionData) -> dict:
    return numbers_of(Oracle(), data)


def plain() -> dict:
    """Annotations as they should be."""
    annotations = [
        {"image_id": image, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "id": 10 * image + place}
        for image, objects in BOXES.items()
        for place, (label, box) in enumerate(objects)
    ]
    return {
        "images": [{"id": image, "file_name": f"{image}.png", "height": SIZE[0], "width": SIZE[1]} for image in BOXES],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for image in BOXES:
        Image.new("RGB", SIZE[::-1], (image, 2, 3)).save(folder / f"{image}.png")
    return folder


def coco(images: Path, tmp_path: Path, content: dict, **options) -> COCO:
    (tmp_path / "labels.json").write_text(json.dumps(content))
    part = (str(images), "labels.json")
    return COCO(tmp_path, train=part, test=part, num_workers=0, **{"min_size": 90, "max_size": 200, **options})


def from_zero(content):
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number


def unique_in_an_image_only(content):
    for annotation in content["annotations"]:
        annotation["id"] %= 10


def without(*keys):
    def change(content):
        for annotation in content["annotations"]:
            for key in keys:
                del annotation[key]

    return change


def null(*keys):
    def change(content):
        for annotation in content["annotations"]:
            annotation |= dict.fromkeys(keys)

    return change


def ids_in_text(content):
    for annotation in content["annotations"]:
        annotation |= {"category_id": str(annotation["category_id"]), "image_id": f"{annotation['image_id']}", "iscrowd": "0"}


def named_ids(content):
    for record in content["categories"]:
        record["id"] = f"class-{record['name']}"
    for record in content["images"]:
        record["id"] = record["file_name"]
    for annotation in content["annotations"]:
        annotation["category_id"] = f"class-{NAMES[annotation['category_id'] - 1]}"
        annotation["image_id"] = f"{annotation['image_id']}.png"


def categories_from_zero(content):
    for record in content["categories"]:
        record["id"] -= 1
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1


def numbers_as_floats(content):
    for annotation in content["annotations"]:
        annotation |= {"category_id": float(annotation["category_id"]), "area": 0, "iscrowd": False}


def unknown_sizes(content):
    for image in content["images"]:
        image |= {"height": None, "width": 0}


def boxes_that_nobody_can_find(content):
    for number, box in enumerate(([5, 5, 0, 7], [90, 5, 10, 5], [0, 0, 1e-9, 30], [5, 5, -3, 4])):
        content["annotations"].append({"id": 900 + number, "image_id": 1, "category_id": 1, "bbox": box})


def outlines_alone(content):
    for annotation in content["annotations"]:
        left, top, width, height = annotation.pop("bbox")
        annotation["segmentation"] = [[left, top, left + width, top, left + width, top + height, left, top + height]]


CHANGES = [
    from_zero,
    unique_in_an_image_only,
    without("area", "iscrowd"),
    null("area", "iscrowd", "segmentation", "id"),
    without("id"),
    ids_in_text,
    named_ids,
    categories_from_zero,
    numbers_as_floats,
    unknown_sizes,
    boxes_that_nobody_can_find,
    outlines_alone,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_perfect_detector_gets_100(change, images, tmp_path):
    content = plain()
    change(content)
    data = coco(images, tmp_path, content)
    record = judged(data)
    assert {name: record[name] for name in ("AP", "AP50", "AP75", "AP/cat", "AP/dog")} == dict.fromkeys(
        ("AP", "AP50", "AP75", "AP/cat", "AP/dog"), pytest.approx(100)
    )
    assert data.classes == NAMES
    objects = data.annotations("test")["annotations"]
    assert [one["id"] for one in objects] == [1, 2, 3, 4, 5]
    # Small, medium and large objects are told apart by the area, also where the file has none.
    assert [one["area"] for one in objects] == [600, 1872, 2000, 108, 1280]
    assert [one["iscrowd"] for one in objects] == [0] * 5


def double_image_id(content):
    content["images"][1]["id"] = 1


def double_file(content):
    content["images"][1]["file_name"] = "./1.png"


def double_category(content):
    content["categories"].append({"id": "2", "name": "owl"})


def double_name(content):
    content["categories"].append({"id": 3, "name": "dog"})


def nameless(content):
    content["categories"][0]["name"] = None


def no_file_name(content):
    content["images"][0]["file_name"] = None


def no_box(content):
    content["annotations"][0]["bbox"] = None


def three_numbers(content):
    content["annotations"][0]["bbox"] = [1, 2, 3]


def text_in_a_box(content):
    content["annotations"][0]["bbox"] = [1, 2, 3, "wide"]


def infinite(content):
    content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_image_id, r"images of different ids .*\(got 1 for 1.png and 2.png\)"),
        (double_file, r"every file once .*\(got ./1.png for the image ids 1 and 2\)"),
        (double_category, r"categories of different ids .*\(got 2 for 'dog' and 'owl'\)"),
        (double_name, r"categories of different names .*\(got 'dog' for the ids 2 and 3\)"),
        (nameless, "an id and a name of every category"),
        (no_file_name, "an id and a file_name of every image"),
        (no_box, r"a bbox \[x, y, width, height\] in annotation 10 of 1.png .*\(got None\)"),
        (three_numbers, r"a bbox .*\(got \[1, 2, 3\]\)"),
        (text_in_a_box, r"a finite number as bbox of annotation 10 of 1.png .*\(got 'wide'\)"),
        (infinite, r"a finite number as bbox .*\(got nan\)"),
    ],
)
def test_contradictions_are_refused(change, message, images, tmp_path):
    content = plain()
    change(content)
    with pytest.raises(ValueError, match=message):
        coco(images, tmp_path, content)


def test_normalising_changes_nothing_that_is_given():
    content = plain()
    before = copy.deepcopy(content)
    normalise(content, "here")
    assert content == before


def test_only_images_that_were_read_are_judged(images, tmp_path):
    for image in BOXES:
        (tmp_path / f"{image}.png").write_bytes((images / f"{image}.png").read_bytes() if image != 2 else b"no image")
    data = coco(tmp_path, tmp_path, plain(), skip_unreadable=True)
    assert judged(data)["AP"] == pytest.approx(100)
    assert len(data.unreadable) == 1


def test_classes_are_chosen_in_their_order(images, tmp_path):
    data = coco(images, tmp_path, plain(), classes=["dog"])
    assert (data.classes, data.category_ids, data.num_samples("train"), data.num_samples("test")) == (("dog",), (2,), 2, 4)
    assert judged(data)["AP"] == pytest.approx(100)
    both = coco(images, tmp_path, plain(), classes=["dog", "cat"])
    assert both.samples("test")[0].labels.tolist() == [1, 0]
    assert judged(both)["AP/cat"] == pytest.approx(100)
    with pytest.raises(ValueError, match=r"classes, each once, .*\(got \['dgo'\]; near is dog\)"):
        coco(images, tmp_path, plain(), classes=["dgo"])


def test_one_folder_and_one_json(images, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(plain()))
    part = (str(images), "labels.json")
    data = COCO(tmp_path, train=part, test=0.25, holdout=1, num_workers=0, skip_empty=False)
    ids = [{sample.image_id for sample in data.samples(split)} for split in ("train", "val", "test")]
    assert [len(each) for each in ids] == [2, 1, 1]
    assert set().union(*ids) == set(BOXES)
    again = COCO(tmp_path, train=part, test=0.25, holdout=1, num_workers=0, skip_empty=False)
    assert [{sample.image_id for sample in again.samples(split)} for split in ("train", "val", "test")] == ids
    own = COCO(tmp_path, train=part, val=part, test=part, num_workers=0)
    assert [own.num_samples(split) for split in ("train", "val", "test")] == [3, 4, 4]


def write_voc(root: Path) -> None:
    base = root / "own"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    names = []
    for image, objects in BOXES.items():
        name = f"photo {image}"
        names.append(name)
        written = "".join(
            f"<object><name>{NAMES[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in objects
        )
        size = "<size><width>0</width><height>0</height></size>" if image == 1 else "<size><width>80</width><height>60</height></size>"
        filename = "<filename>elsewhere.PNG</filename>" if image == 3 else ""
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{filename}{size}{written}</annotation>")
        suffix = {1: f"{name}.JPG", 2: f"{name}.png", 3: "elsewhere.PNG", 4: f"{name}.jpeg"}[image]
        kind = "JPEG" if image in (1, 4) else "PNG"
        Image.new("RGB", SIZE[::-1], (image, 2, 3)).save(base / "JPEGImages" / suffix, format=kind)
    (base / "ImageSets" / "Main" / "all.txt").write_text("\ufeff" + "\n".join(names) + "\n\n", encoding="utf-8")


def write_yolo(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "images").mkdir(parents=True)
        (root / part / "labels").mkdir(parents=True)
        for image, objects in BOXES.items():
            Image.new("RGB", SIZE[::-1], (image, 2, 3)).save(root / part / "images" / f"{image}.png")
            lines = [f"{label} {(x + w / 2) / 80} {(y + h / 2) / 60} {w / 80} {h / 60}" for label, (x, y, w, h) in objects]
            if lines:
                (root / part / "labels" / f"{image}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']\n")


@pytest.fixture(scope="module")
def copies(tmp_path_factory, images) -> dict[str, DetectionData]:
    """The same data in three formats."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("coco", "voc", "yolo")}
    write_voc(roots["voc"])
    write_yolo(roots["yolo"])
    options = {"num_workers": 0, "min_size": 90, "max_size": 200, "metric": "coco"}
    return {
        "coco": coco(images, roots["coco"], plain(), metric="coco"),
        "voc": VOC(roots["voc"], train="own/all", test="own/all", classes=NAMES, **options),
        "yolo": YOLO(roots["yolo"], **options),
    }


class Sloppy(Oracle):
    """Misses the first object of an image, and moves the others by a pixel or two."""

    def detect(self, images):
        return [
            Detections(one.boxes[1:] + 2.0 * torch.arange(len(one.boxes))[1:, None], one.scores[1:] * 0.5, one.labels[1:])
            for one in super().detect(images)
        ]


def test_three_formats_of_the_same_data_give_the_same_numbers(copies):
    for oracle, low, high in ((Oracle(), 99.99, 100.01), (Sloppy(), 1, 70)):
        records = [numbers_of(oracle, data) for data in copies.values()]
        assert low < records[0]["AP"] < high
        assert {"AP", "AP50", "AP75", "APs", "APm", "AP/dog"} <= set(records[0])
        assert records[1] == pytest.approx(records[0], abs=1e-6)
        assert records[2] == pytest.approx(records[0], abs=1e-6)


def test_every_metric_is_there_for_every_format(copies):
    for data in copies.values():
        for metric in ("voc", "voc07"):
            data.metric = metric
            record = judged(data)
            assert {name: record[name] for name in ("AP", "AP50", "AP75", "AP50/cat", "AP50/dog")} == dict.fromkeys(
                ("AP", "AP50", "AP75", "AP50/cat", "AP50/dog"), pytest.approx(100)
            )
            assert {"APs", "APm", "APl"} <= set(record)
        data.metric = "coco"
    with pytest.raises(ValueError, match=r"metric among 'coco', 'voc', 'voc07' \(got 'cocoo'\)"):
        DetectionData({}, lambda source: torch.zeros(3, 8, 8), metric="cocoo")


def test_eleven_points_by_hand():
    from gkd.tasks.precision import voc_metrics

    # Of two objects the first answer finds one, the second is wrong, the third finds the other: precision 1 up to recall 1/2, 2/3 up to 1.
    truth = {
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, "bbox": [20 * n, 0, 10, 10]} for n in (1, 2)],
    }
    answers = [{"image_id": 1, "category_id": 1, "bbox": [20 * n, 0, 10, 10], "score": 1 - n / 10} for n in (1, 2)]
    answers.insert(1, {"image_id": 1, "category_id": 1, "bbox": [90, 0, 10, 10], "score": 0.85})
    assert voc_metrics(truth, answers)["AP50"] == pytest.approx(100 * (1 / 2 + 1 / 3))
    assert voc_metrics(truth, answers, eleven_points=True)["AP50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


class WithoutTheDifficultOne(Oracle):
    """Finds all but the first object of the first image."""

    def detect(self, images):
        return [
            Detections(*(column[1:] for column in (one.boxes, one.scores, one.labels))) if target["image_id"] == 1 else one
            for one, target in zip(super().detect(images), self.targets, strict=True)
        ]


def test_difficult_objects_count_nowhere_in_cocos_numbers(images, tmp_path):
    content = plain()
    content["annotations"][0]["difficult"] = 1
    data = coco(images, tmp_path, content)
    record = numbers_of(WithoutTheDifficultOne(), data)
    assert record["AP"] == pytest.approx(100)
    assert judged(data)["AP"] == pytest.approx(100)


def test_voc_sets_and_names(tmp_path):
    write_voc(tmp_path)
    base = tmp_path / "own" / "ImageSets" / "Main"
    (base / "dog_all.txt").write_text("photo 1  1\nphoto 2 -1\nphoto 3  0\n")
    data = VOC(tmp_path, train="own/dog_all", test=["own/all"], classes=NAMES, num_workers=0)
    assert [Path(sample.source).name for sample in data.samples("train")] == ["photo 1.JPG", "photo 2.png", "elsewhere.PNG"]
    assert data.samples("train")[0].size == SIZE
    assert VOC(tmp_path, train="own/all", test="own/all", val="own/all", classes=NAMES, num_workers=0).num_samples("val") == 4
    # Of VOC's own classes, those not asked for are left out; others must be named.
    dogs = VOC(tmp_path, train="own/all", test="own/all", classes="dog", num_workers=0)
    assert (dogs.classes, dogs.num_samples("train")) == (("dog",), 2)
    text = (tmp_path / "own/Annotations/photo 1.xml").read_text()
    (tmp_path / "own/Annotations/photo 1.xml").write_text(text.replace("<name>cat", "<name>lynx"))
    with pytest.raises(ValueError, match=r"got 'lynx'.*VOC\.classes.*VOC\.ignore"):
        VOC(tmp_path, train="own/all", test="own/all", classes=NAMES, num_workers=0)
    assert len(VOC(tmp_path, train="own/all", test="own/all", classes=NAMES, ignore=["lynx"], num_workers=0).samples("test")[0].boxes) == 1
    (base / "latin.txt").write_bytes(b"photo \xe9\n")
    with pytest.raises(ValueError, match=r"an image set, text in UTF-8, at .*latin.txt"):
        VOC(tmp_path, train="own/latin", test="own/all", classes=NAMES)


def test_yolo_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"description of the data at .*data.yaml \(got no such file"):
        YOLO(tmp_path)
    write_yolo(tmp_path)
    yaml, labels = tmp_path / "data.yaml", tmp_path / "train" / "labels" / "1.txt"
    text, lines = yaml.read_text(), labels.read_text()
    for wrong, message in (
        (text.replace("nc: 2", "nc: 3"), r"names of the classes from 0 on, .*nc=3"),
        (text.replace("../val", "nowhere"), "a folder of images, or a text file that lists some, for val"),
        (text.replace("val:", "valid:"), r"train, and val or test, .*\(got train, valid, nc, names\)"),
        ("- 1\n- 2\n", r"names, train and val .*\(got list\)"),
        ("a: [\n", "Expected a yaml file"),
    ):
        yaml.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            YOLO(tmp_path)
    yaml.write_text(text)
    for wrong in ("5 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 a b c d", "0.5 0.5 0.5 0.1 0.1"):
        labels.write_text(lines + wrong)
        with pytest.raises(ValueError, match=r"a class below 2 and 4 numbers, or an outline, in line 3 of .*1.txt"):
            YOLO(tmp_path)
    labels.write_text(lines)
    for path in (tmp_path / "val" / "labels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"images with text files of their objects \(got 4 images, and no file such as .*val/labels/1.txt"):
        YOLO(tmp_path)


def test_yolo_lists_outlines_and_parts(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "train" / "labels" / "2.txt").write_text("1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n")
    (tmp_path / "list.txt").write_text("train/images/1.png\ntrain/images/2.png\n")
    (tmp_path / "data.yaml").write_text("train: list.txt\nval: [val/images]\ntest: train/images\nnames: {0: cat, 1: dog}\n")
    data = YOLO(tmp_path / "data.yaml", num_workers=0)
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [2, 4, 4]
    torch.testing.assert_close(data.samples("train")[1].boxes, torch.tensor([[8.0, 6.0, 40.0, 30.0]]))


def test_keypoints_change_places_in_a_mirror_image():
    assert flip_pairs(["nose", "left_eye", "right_eye", "left_ear", "tail"]) == [0, 2, 1, 3, 4]
