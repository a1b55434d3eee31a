"""Only what pyproject.toml cannot express: the C core is built by cffi."""

from setuptools import setup

setup(
    cffi_modules=["ublkpy/uring/build_ffi.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
