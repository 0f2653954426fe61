"""Eight virtual CPU devices and checked shapes for every test.

Set before any test module imports moejax: the import hook of jaxtyping checks the annotations of
public signatures with beartype, under pytest only.
"""

import importlib.metadata
import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile much and run little: LLVM's optimisations cost twice the time of everything else,
# and XLA:CPU's emitters of fusions a third of what is left. XLA ends a process whose flags it does
# not know; libtpu and jaxlib 0.12 do not know the second.
FLAGS = "--xla_backend_optimization_level=0"
OLDER = importlib.metadata.version("jaxlib").startswith("0.10.")
if OLDER and importlib.util.find_spec("libtpu") is None:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

# No test, and no process of one, reads or writes the user's compiled programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from jaxtyping import install_import_hook

# moejax.types and moejax.train hold pytrees, whose leaves may be shapes, shardings or stacked.
CHECKED = (
    "analysis.statistics", "data", "dispatch", "experts", "gating", "kernels", "layers", "losses",
    "reference",
)  # fmt: skip
install_import_hook([f"moejax.{module}" for module in CHECKED], "beartype.beartype")

import jax
import pytest

from tests.mappings import forget_programs_if_many


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Free programs between modules, where they have become many."""
    yield
    forget_programs_if_many()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "quick(n): of a parametrised test, cases after the first n fast ones are slow"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark cases slow that ``quick`` leaves out."""
    fast: dict[tuple[str, str], int] = {}
    for item in items:
        mark = item.get_closest_marker("quick")
        if mark is not None and item.get_closest_marker("slow") is None:
            name = str(item.path), getattr(item, "originalname", item.name)
            fast[name] = fast.get(name, 0) + 1
            if fast[name] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> list[jax.Device]:
    """Started before any test: a run in this process would start as many as its own mesh has."""
    devices = jax.devices()
    assert len(devices) == 8, "tests need 8 virtual CPU devices; unset JAX_NUM_CPU_DEVICES"
    return devices


def pytest_make_parametrize_id(config, val, argname: str) -> str | None:
    """Names bytes by their argument: a test has one name in every worker, and one to print.

    Bytes may hold the time at which they were made, as those of gzip do; xdist refuses a suite
    whose workers name its tests differently.
    """
    return argname if isinstance(val, bytes) else None
