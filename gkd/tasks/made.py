"""Weights that a recipe makes, where they are not there yet."""

from __future__ import annotations

from pathlib import Path

from gkd.errors import UserError


class AbsentWeightsError(UserError):
    """Weights are not there, and a recipe says how they are made: `gkd train` does so and goes on.

    Args:
        weights: The absent file.
        recipe: Gin file of the training whose student has these weights.
    """

    def __init__(self, weights: str, recipe: str) -> None:
        super().__init__(
            f"Expected the weights {weights} (got no such file). Make them: gkd train --gin {recipe} --output {Path(weights).parent}"
        )
        self.weights, self.recipe = weights, recipe


def check_weights(weights: str | None, recipe: str | None) -> None:
    """Raises where weights are absent that a recipe makes.

    Raises:
        AbsentWeightsError: If so.
        UserError: If there is a recipe, but no file for its weights.
    """
    if recipe is None:
        return
    if weights is None:
        raise UserError(f"Expected a file for the weights that the recipe {recipe} makes (got none). Set weights of the network.")
    if not Path(weights).is_file():
        raise AbsentWeightsError(weights, recipe)
