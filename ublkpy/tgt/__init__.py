"""The targets, and what those of others are made of."""

from ublkpy.tgt.load import find, names

__all__ = ["find", "names"]
