"""Which ublkpy this is: in a module of its own, because the package itself offers what stands on all others."""

__version__ = "0.1.0"
