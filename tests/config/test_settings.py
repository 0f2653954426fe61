"""Results depend on the config: settings of JAX in the environment have no effect, or are kept."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moejax.config import default, settings
from moejax.job.launch import configure_devices

ROOT = Path(__file__).parents[2]

OTHER: dict[str, Any] = {
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_threefry_gpu_kernel_lowering": True,
    "jax_random_seed_offset": 3,
    "jax_high_dynamic_range_gumbel": True,
    "jax_enable_custom_prng": True,
    "jax_legacy_prng_key": "error",
    "jax_enable_x64": True,
    "jax_explicit_x64_dtypes": "error",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_softmax_custom_jvp": True,
    "jax_allow_f16_reductions": False,
    "jax_disable_jit": True,
    "jax_no_tracing": True,
    "jax_no_execution": True,
    "jax_custom_vjp3": True,
    "jax_remat3": True,
    "jax_scan3": True,
    "jax_error_checking_behavior_nan": "raise",
    "jax_error_checking_behavior_divide": "raise",
    "jax_error_checking_behavior_oob": "raise",
    "jax_transfer_guard": "disallow",
    "jax_transfer_guard_host_to_device": "log",
    "jax_transfer_guard_device_to_device": "log",
    "jax_transfer_guard_device_to_host": "log",
    "jax_default_matmul_precision": "bfloat16",
}
"""Another value of each setting that is fixed."""


def numbers() -> list[Any]:
    key = jax.random.key(5)
    x = jax.random.normal(key, (3, 5)) * jnp.ones(5, jnp.int32)
    return [jax.random.key_data(key).tolist(), x.tolist(), str(x.dtype)]


def test_environment_settings_have_no_effect_and_are_reported(capsys):
    assert OTHER.keys() == settings.FIXED.keys() | {settings.PRECISION}
    before = {name: getattr(jax.config, name) for name in OTHER}
    expected = numbers()
    try:
        for name, value in OTHER.items():
            jax.config.update(name, value)
        configure_devices(default())
        assert {name: getattr(jax.config, name) for name in OTHER} == before
        assert numbers() == expected
    finally:
        settings.fix()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(OTHER)
    assert "moejax: warning: JAX_DEFAULT_PRNG_IMPL=rbg has no effect: a run always has" in said[0]
    assert "set model.matmul_precision" in said[-1]


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL"])
def test_a_variable_that_jax_cannot_read_is_reported_in_one_line(variable):
    """JAX reads them at import, which happens before the command line runs."""
    env = {**os.environ, variable: "maybe"}
    code = "import moejax"
    for command, status in ((["-m", "moejax", "gates"], 2), (["-c", code], 1)):
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True
        )
        *before, last = done.stderr.splitlines()
        assert done.returncode == status and variable.lower() in last.lower()
        assert "maybe" in last and last.endswith("correct the environment variable, or unset it")
        assert bool(before) == (status == 1), "a program that imports the library sees where"


def test_the_precision_of_matmuls_is_a_field_of_the_config(capsys):
    config = default()
    config.model.matmul_precision = "highest"
    jax.config.update(settings.PRECISION, "highest")  # as the environment may say too
    try:
        settings.fix(config)
        assert getattr(jax.config, settings.PRECISION) == "highest"
        settings.fix(default())
        assert getattr(jax.config, settings.PRECISION) is None
    finally:
        jax.config.update(settings.PRECISION, None)
    assert len(capsys.readouterr().err.splitlines()) == 1  # of the second


def test_variables_that_change_how_programs_are_compiled_are_kept(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # has no effect
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "x")  # changes no number
    found = settings.environment()
    assert found["XLA_FLAGS"] == "--xla_a" and found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert not {"JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"} & found.keys()
    settings.warn_of_changes({"environment": found | {"XLA_FLAGS": "--xla_b"}})
    settings.warn_of_changes({})  # of a run from before they were kept
    (line,) = capsys.readouterr().err.splitlines()
    assert "XLA_FLAGS='--xla_a' here and '--xla_b' when the run was started" in line


@pytest.mark.slow
def test_a_run_is_bit_equal_under_other_environment_variables(tmp_path):
    """Trained and evaluated under each other's environment; noise of the gate included."""
    plain = {name: value for name, value in os.environ.items() if name.lower() not in OTHER}
    odd = plain | {name.upper(): str(value) for name, value in OTHER.items()}
    odd |= {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}

    def moejax(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moejax", *args]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    rows = []
    for name, env, other in (("plain", plain, odd), ("odd", odd, plain)):
        folder = tmp_path / name
        trained = moejax(
            env, "train", "--config=configs/lm.py:size=debug,gate=shazeer", f"--workdir={folder}",
            "--config.mesh.expert=1", "--config.train.eval_rows=16", "--config.train.steps=3",
            "--config.report.probe_rows=0",
        )  # fmt: skip
        assert trained.stderr.count("has no effect") == (len(OTHER) if name == "odd" else 0)
        rows.append((folder / "metrics.jsonl").read_bytes())
        evaluated = moejax(other, "eval", f"--workdir={folder}")
        assert json.loads(evaluated.stdout) == json.loads(rows[-1].splitlines()[-1])
    assert rows[0] == rows[1]
