"""Only what pyproject.toml cannot express: the C core is built by cffi."""

import sysconfig

from setuptools import setup

# Up to 3.14, a Python without a GIL has no limited API; from then on it has one of its own (PEP 803).
is_limited = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["ublkpy/uring/build_ffi.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if is_limited else {},
)
