"""Builds the images, installs the operator, serves a model and asks it something."""
