"""The part of the packaging that pyproject.toml cannot express: config pages in the wheel.

They are installed as ``moejax/configs``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moejax*"]), "moejax.configs"],
    package_dir={"moejax.configs": "configs"},
)
