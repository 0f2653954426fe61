"""What pyproject.toml cannot say: the config pages go into the wheel as ``moejax/configs``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moejax*"]), "moejax.configs"],
    package_dir={"moejax.configs": "configs"},
)
