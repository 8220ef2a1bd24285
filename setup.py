"""Lists the packages: those in gkd, and the recipes, which setup.cfg maps from another folder. All else is said in setup.cfg."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gkd", "gkd.*"]), "gkd.recipes"])
