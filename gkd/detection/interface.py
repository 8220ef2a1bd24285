"""What a detector is, so that one task, one distiller and one configuration serve those of every library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gkd.errors import UserError

LIBRARIES = ("torchvision", "detectron2", "transformers")

Images = Sequence[Tensor]
"""Of every image [3, h_i, w_i] uint8, RGB, neither normalised nor padded, which each network does in its own way."""

Targets = Sequence[Mapping[str, Any]]
"""Of every image the ``boxes`` [n_i, 4] float (x1, y1, x2, y2) in pixels of the image as given, n_i may be 0; their ``labels`` [n_i] long,
counted from 0 in the order of the data's classes; the ``image_id`` (int) of the annotations, and the ``size`` (height, width) of the image
before it was resized. Where the data have them, ``masks`` [n_i, h_i, w_i] uint8 and ``keypoints`` [n_i, K, 3] (x, y, visibility)."""


class Detections(NamedTuple):
    """What was found in one image, best first.

    Shapes:
        - **boxes** [n, 4] (x1, y1, x2, y2) in pixels of the image as it was given; **scores** [n]; **labels** [n] long, in the order of the
          data's classes; **masks** [n, h, w] bool of a network that segments instances; **keypoints** [n, K, 3] (x, y, score) of one that
          finds them
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None


class Maps(dict[str, Tensor]):
    """Feature maps by level, over the padded batch of images as given.

    Attributes:
        native: The maps as the network's own heads read them: others only where the network resizes its images itself.
    """

    native: Mapping[str, Tensor]

    def __init__(self, maps: Mapping[str, Tensor], native: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(maps)
        self.native = self if native is None else native


@dataclass
class Output:
    """What one pass of a student in training gives.

    Attributes:
        losses: The library's own losses by its own names (``loss_classifier``, ..); their sum is the task's.
        features: Maps of the levels [B, C, h, w], from shallow to deep, as the heads saw them.
        image_size: Height and width of the padded batch that the maps cover.
        proposals: Of every image the proposals of a two-stage detector [n_i, 4], best first, in pixels, without gradient; None for one
            stage.
        dense_logits: Class scores of a one-stage detector at all its places, as of `Detector.dense_logits`; None for two stages.
        dense_locations: Its boxes there, as of `Detector.dense_locations`.
        regions: True boxes and mined background of every image, once a term has asked for them.
    """

    losses: dict[str, Tensor]
    features: Mapping[str, Tensor]
    image_size: tuple[int, int]
    proposals: list[Tensor] | None = None
    dense_logits: Tensor | None = None
    dense_locations: Tensor | None = None
    regions: list[Tensor] | None = None


@dataclass(frozen=True)
class DetectorNetwork:
    """How a detector is built, in words that every back end understands; the number of classes comes from the data.

    Args:
        architecture: ``'faster_rcnn'``, ``'mask_rcnn'``, ``'keypoint_rcnn'``, ``'retinanet'`` or ``'fcos'`` on a backbone; the name of
            another network of the library, as ``'ssdlite320_mobilenet_v3_large'`` of torchvision; or a function of your own,
            ``'package.module:factory'``. None: what the weights say, or else Faster R-CNN.
        backbone: ``'resnet18'``, ``'resnet34'``, ``'resnet50'``, ``'resnet101'``, ``'mobilenet_v2'`` or ``'mobilenet_v3_large'``, with a
            feature pyramid. None: what the weights say, or else ResNet-50.
        weights: Weights of the whole detector: a file, or a name that the library knows (``'DEFAULT'`` in torchvision,
            ``'detectron2://...'``). A teacher needs them. A dictionary gives them for each back end apart: ``{'detectron2': ..,
            'torchvision': ..}``.
        backbone_weights: ImageNet weights of the backbone: a file in torchvision's format or the name of published ones (``'DEFAULT'``);
            both back ends read them. A dictionary as above. Left out where ``weights`` are given.
        config: Detectron2 only: a yaml file or LazyConfig, or its name in the model zoo, which then says what is built instead of the two
            above.
        num_classes: Classes of the weights, without a background, where these are not the data's and the file does not say.
        options: Further arguments of the library: keyword arguments of torchvision's constructor, or ``'KEY.NAME': value`` of Detectron2's
            configuration. A dictionary of dictionaries by back end is taken apart as above.
        recipe: Gin file of a training that makes the weights, where the file is absent; `gkd train` runs it first.
    """

    architecture: str | None = None
    backbone: str | None = None
    weights: str | Mapping[str, str | None] | None = None
    backbone_weights: str | Mapping[str, str | None] | None = None
    config: str | None = None
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    def setting(self, name: Literal["weights", "backbone_weights", "options"], backend: str) -> Any:
        """One of the settings that may be given for each back end apart.

        Examples:
            >>> network = DetectorNetwork(weights={"detectron2": "detectron2://R-50.pkl"}, options={"trainable_layers": 3})
            >>> network.setting("weights", "torchvision"), network.setting("options", "torchvision")
            (None, {'trainable_layers': 3})
        """
        value = getattr(self, name)
        if isinstance(value, Mapping) and value and set(value) <= set(LIBRARIES):
            value = value.get(backend)
        return dict(value or {}) if name == "options" else value


class Detector(ABC):
    """One network of a library, called the way distillation needs it.

    It is no module: what is trained, saved and exported is `model`, an ordinary network of the library. Boxes are always in pixels of the
    images as given. As padding goes to the right and below, they are at the same place in the padded batch.

    Attributes:
        model: The library's network. A student's is in training mode when `forward` is called; the others work in either mode, and change
            it for no longer than the call.
        levels: Names of the feature maps, shallow to deep: ``p2`` .. ``p6`` for a map of stride 4 .. 64; one-stage detectors have ``p3`` ..
            ``p7``.
        two_stage: Whether there are proposals and `class_logits`; else there may be `dense_logits`.
        classes: Names of the classes that the network tells apart, in its own order; None where nobody says.
        labels: The network's number of every class of the data; None if it has other classes, so that its maps alone are of use.
        has_masks: Whether it segments instances.
        num_keypoints: Keypoints that it finds of an instance; 0 for none.
    """

    model: nn.Module
    levels: tuple[str, ...]
    two_stage: bool
    classes: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    has_masks: bool = False
    num_keypoints: int = 0

    @abstractmethod
    def image_size(self, images: Images) -> tuple[int, int]:
        """Height and width that the images are padded to, together, as this network does it."""

    @abstractmethod
    def forward(self, images: Images, targets: Targets) -> Output:
        """Losses and maps of a student from *one* pass of its backbone; the gradient flows through both. Images without boxes are
        allowed."""

    @abstractmethod
    def features(self, images: Images) -> Mapping[str, Tensor]:
        """Maps of all levels, from transform, backbone and pyramid alone: no head is called. Equal to those that the library computes."""

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Class scores before the softmax of given boxes, for distillation on proposals that student and teacher share.

        Args:
            features: All levels that the box head reads, of `forward` or `features`.
            boxes: Of every image [n_i, 4], in pixels.
            image_size: Height and width of the padded batch.

        Shapes:
            - **output** [sum n_i, K + 1]: the data's classes in their order, then the background, whatever order the library has

        Raises:
            UserError: If the network has one stage, or other classes than the data.
        """
        raise self._lacks("a box head on proposals")

    def mask_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Masks before the sigmoid in given boxes, each of its class.

        Args:
            features: As for `class_logits`.
            boxes: As there.
            labels: Class of every box, of the data.
            image_size: As there.

        Shapes:
            - **labels** [n] for all boxes of all images; **output** [n, m, m]

        Raises:
            UserError: If the network segments no instances.
        """
        raise self._lacks("a mask head on proposals")

    def dense_logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Class scores before the sigmoid at all places (and anchors) of a one-stage detector, by its classification head alone.

        Args:
            features: All levels that the head reads, of `features`.

        Shapes:
            - **output** [B, n, K], the data's classes in their order; places level by level, as the library counts them

        Raises:
            UserError: If the network has two stages, or other classes than the data.
        """
        raise self._lacks("scores at all places")

    def dense_locations(self, features: Mapping[str, Tensor]) -> Tensor:
        """What the regression head of a one-stage detector says of the sides of the box at every place, as the library has it.

        Args:
            features: As for `dense_logits`.

        Shapes:
            - **output** [B, n, 4 m], places as in `dense_logits`

        Raises:
            UserError: If the network has two stages.
        """
        raise self._lacks("a regression head at all places")

    def _lacks(self, what: str) -> UserError:
        return UserError(f"Expected a detector with {what} for this term (got {type(self.model).__name__}). Give the term the weight 0.")

    @abstractmethod
    def detect(self, images: Images) -> list[Detections]:
        """What the network finds in images as they are stored, in eval mode and without gradient: the library's own inference, which
        resizes as `describe` says."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed beside the weights to build the network again, set up for inference: the arguments of `Backend.rebuild`."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the network alone, atomically, so that the plain library reads it strictly (`load_state_dict`,
        `DetectionCheckpointer`)."""
