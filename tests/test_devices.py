"""Devices and processes are set up before JAX starts, and left alone afterwards."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.config import configure_devices, default
from moejax.devices import backend_is_running
from moejax.errors import UserError

ROOT = Path(__file__).parent.parent


def test_devices_that_run_already_are_left_alone(eight_devices: list[jax.Device]):
    assert backend_is_running()
    config = default()
    config.mesh.cpu_devices = 3
    configure_devices(config)
    assert jax.devices() == eight_devices


@pytest.mark.usefixtures("eight_devices")
def test_joining_processes_after_the_devices_started_is_refused():
    config = default()
    config.distributed.mode = "explicit"
    with pytest.raises(UserError, match="comes too late"):
        configure_devices(config)


FRESH = """
import sys
from moejax.config import configure_devices, default, validate
from moejax.devices import backend_is_running
config = default()
config.mesh.expert = 4
validate(config)
configure_devices(config)
assert not backend_is_running()
import jax
assert jax.device_count() == 4, jax.devices()
heavy = {"grain", "orbax", "matplotlib", "tokenizers", "tensorboardX"} & set(sys.modules)
assert not heavy, heavy
"""


def test_fresh_process_gets_the_meshs_devices_and_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
