"""Classifiers of other libraries by name, each library in one file that imports it only when it is asked for."""
