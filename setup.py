"""Only the optional C extension, which does not exist yet; everything else is in pyproject.toml."""

from setuptools import setup

setup(ext_modules=[])
