"""Block devices in user space for Linux, in Python, at native speed."""

__version__ = "0.1.0"
