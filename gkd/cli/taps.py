"""Lists the places of a network that distillation can look at: module paths and the shapes of their maps for one image."""

from __future__ import annotations

import argparse

from gkd.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "name", metavar="NAME", help="network, such as resnet56, torchvision:resnet18, timm:vit_tiny_patch16_224, my_nets:small"
    )
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=3, help="channels of the image (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="classes of the network (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each place."""
    from gkd.models import build_classifier, list_taps

    for name in ("size", "channels", "classes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"Expected --{name} of at least 1 (got {getattr(arguments, name)})")
    model = build_classifier(arguments.name, num_classes=arguments.classes)
    try:
        taps = list_taps(model, (arguments.channels, arguments.size, arguments.size))
    except RuntimeError as error:
        size = f"{arguments.channels} x {arguments.size} x {arguments.size}"
        raise UserError(f"Expected {arguments.name} to take an image of {size} (got: {error}). Give --size and --channels.") from error
    width = max((len(tap.path) for tap in taps), default=0)
    for tap in taps:
        print(f"{tap.path:{width}}  {' x '.join(map(str, tap.shape))}")
