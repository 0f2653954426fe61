"""Saves and restores on real files, and every way the files can be damaged."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from moejax.errors import UserError
from moejax.train.checkpoint import restore
from moejax.train.checkpoint.checkpointer import Checkpointer, restore_subtree

ROOT = Path(__file__).parents[2]


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(step: int, mesh=None, *spec):
    """All kinds of leaves; with a mesh, the matrices are laid out by `spec`."""
    key = jax.random.key(step)
    state = {
        "params": {
            "w": jax.random.normal(key, (16, 64)),
            "blocks": [jax.random.normal(key, (4, 8)).astype(jnp.bfloat16), jnp.full(3, -0.0)],
        },
        "opt": (jax.random.normal(key, (40, 128)), jnp.arange(4) > 1, jnp.zeros((0, 3))),
        "key": jax.random.split(key, 3),
        "legacy_key": jax.random.PRNGKey(step),
        "step": jnp.int32(step),
    }
    if mesh is None:
        return state
    split = NamedSharding(mesh, PartitionSpec(*spec))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.device_put(x, split if x.ndim == 2 and x.size else whole), state
    )


def describe(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(x: jax.Array) -> tuple:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), x.shape, np.asarray(jax.random.key_data(x)).tobytes()
    return str(x.dtype), x.shape, np.asarray(x).tobytes()


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and (
        [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]
    )


def save_steps(directory: Path, *steps: int, keep: int = 9) -> Path:
    with Checkpointer(directory, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"step was": step})
    return directory


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A workdir with checkpoints 1 and 2; tests work on copies."""
    return save_steps(tmp_path_factory.mktemp("run") / "checkpoints", 1, 2)


@pytest.fixture
def two(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path: Path, bit: int = 2) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1 << bit
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# ---------------------------------------------------------------- saving and restoring


def test_a_state_saved_on_one_mesh_comes_back_bit_equal_on_others(tmp_path):
    saved = make_state(5, mesh_of(1, 4), "a", "b")
    assert len(saved["opt"][0].addressable_shards) == 4
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, saved, {"data": "abc", "sizes": (1, 2), "nan": float("inf")})
    for template in (make_state(0, mesh_of(2, 2), "b", "a"), make_state(0)):
        restored = Checkpointer(tmp_path / "checkpoints").restore(describe(template))
        assert restored is not None and restored.step == 5
        assert restored.meta == {"data": "abc", "sizes": [1, 2], "nan": float("inf")}
        assert same(restored.state, saved)
        for got, want in zip(
            jax.tree.leaves(restored.state), jax.tree.leaves(template), strict=True
        ):
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_a_leaf_without_a_sharding_goes_to_the_default_device(two):
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    restored = Checkpointer(two).restore(template)
    assert restored is not None and same(restored.state, make_state(2))
    assert restored.state["params"]["w"].sharding == SingleDeviceSharding(jax.devices()[0])


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (500, 1000))}
    before = np.array(state["w"])

    @partial(jax.jit, donate_argnums=0)
    def update(state):
        return jax.tree.map(lambda x: -x, state)

    update.lower(state).compile()
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(11):
            state = update(state)
        checkpoints.wait()
        restored = checkpoints.restore(describe(state))
    assert restored is not None
    np.testing.assert_array_equal(np.asarray(restored.state["w"]), before)
    np.testing.assert_array_equal(np.asarray(state["w"]), -before)


def test_the_first_of_differing_copies_is_saved_with_a_warning(tmp_path, capsys):
    sharding = NamedSharding(mesh_of(2, 4), PartitionSpec("b"))
    devices = sharding.addressable_devices_indices_map((8, 6))
    blocks = [jax.device_put(np.full((2, 6), d.id, np.float32), d) for d in devices]
    state = {"w": jax.make_array_from_single_device_arrays((8, 6), sharding, blocks)}
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        assert "at step 1 devices hold different copies of w:" in capsys.readouterr().err
        restored = checkpoints.restore(describe(state))
        assert restored is not None
        checkpoints.save(2, restored.state, {})
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(np.asarray(restored.state["w"])[:, 0], [0, 0, 1, 1, 2, 2, 3, 3])


def test_the_newest_checkpoints_are_kept_and_each_can_be_restored(tmp_path):
    directory = save_steps(tmp_path / "checkpoints", 1, 2, 3, 10, keep=2)
    checkpoints = Checkpointer(directory)
    assert checkpoints.steps() == [3, 10]
    restored = checkpoints.restore(describe(make_state(0)), step=3)
    assert restored is not None and restored.step == 3 and same(restored.state, make_state(3))
    with pytest.raises(UserError, match="no checkpoint of step 2 in .*; steps there: 3, 10"):
        checkpoints.restore(describe(make_state(0)), step=2)


def test_saving_an_existing_step_does_nothing(two):
    with Checkpointer(two) as checkpoints:
        assert checkpoints.save(2, make_state(7), {}) is False
        restored = checkpoints.restore(describe(make_state(0)))
    assert restored is not None and same(restored.state, make_state(2))


def test_no_checkpoint_at_all_is_none_and_creates_nothing(tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    assert checkpoints.restore(describe(make_state(0))) is None
    assert checkpoints.steps() == [] and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- damage


def test_a_flipped_bit_that_orbax_restores_silently_is_found(two, capsys):
    flip_bit(largest_file(two / "2" / "state" / "ocdbt.process_0"))
    template = describe(make_state(0))
    how = ocp.ArrayRestoreArgs(sharding=template["opt"][0].sharding)
    request = ocp.args.PyTreeRestore(
        {"opt/0": template["opt"][0]}, restore_args={"opt/0": how}, partial_restore=True
    )
    silent = ocp.PyTreeCheckpointHandler().restore(epath.Path(two / "2" / "state"), args=request)
    assert bits(silent["opt/0"]) != bits(make_state(2)["opt"][0])

    restored = Checkpointer(two).restore(template)
    assert restored is not None and restored.step == 1 and same(restored.state, make_state(1))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "checkpoint 2" in said and "array opt/0 (float32[40,128]) does not match" in said
    assert "trying the one before" in said
    assert (two.parent / "checkpoints_bad" / "2-0" / "meta").is_dir()
    assert Checkpointer(two).steps() == [1]


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_damage_to_any_one_file_never_yields_a_wrong_state(damage, two, tmp_path):
    files = [path.relative_to(two / "2") for path in (two / "2").rglob("*") if path.is_file()]
    template, states = describe(make_state(0)), {step: make_state(step) for step in (1, 2)}
    stepped_back = 0
    for n, file in enumerate(files):
        copy = Path(shutil.copytree(two, tmp_path / str(n) / "checkpoints"))
        damage(copy / "2" / file)
        restored = Checkpointer(copy).restore(template)
        assert restored is not None
        assert same(restored.state, states[restored.step]), file
        assert restored.meta == {"step was": restored.step}
        assert Checkpointer(copy).steps() == ([1, 2] if restored.step == 2 else [1])
        stepped_back += restored.step == 1
    assert 4 <= stepped_back < len(files)  # some files are not needed to read the arrays


@pytest.mark.parametrize(
    "breaking, reason",
    [
        (lambda step: truncate(step / "meta" / "metadata"), "its manifest cannot be read"),
        (lambda step: shutil.rmtree(step / "meta"), "its manifest cannot be read"),
        (lambda step: shutil.rmtree(step / "state"), "array key cannot be read"),
        (lambda step: shutil.rmtree(step / "state" / "d"), "array key cannot be read"),
        (
            lambda step: truncate(largest_file(step / "state" / "ocdbt.process_0")),
            "array opt/0 cannot be read",
        ),
        (lambda step: (shutil.rmtree(step), step.mkdir()), "its manifest cannot be read"),
        (
            lambda step: (step / "meta" / "metadata").write_text(
                (step / "meta" / "metadata").read_text().replace('"step was": 2', '"step was": 3')
            ),
            "its manifest does not match its digest",
        ),
        (
            lambda step: shutil.copytree(step.parent / "1", step, dirs_exist_ok=True),
            "its manifest belongs to step 1",
        ),
    ],
)
def test_a_corrupt_checkpoint_is_named_moved_aside_and_skipped(breaking, reason, two, capsys):
    breaking(two / "2")
    restored = Checkpointer(two).restore(describe(make_state(0)))
    assert restored is not None and restored.step == 1 and same(restored.state, make_state(1))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moejax:")]
    assert len(said) == 1 and "checkpoint 2" in said[0] and reason in said[0]
    assert [path.name for path in (two.parent / "checkpoints_bad").iterdir()] == ["2-0"]


def test_training_resumes_from_the_step_before_and_saves_the_lost_step_again(two):
    with Checkpointer(two) as checkpoints:
        for n in range(2):
            flip_bit(largest_file(two / "2" / "state" / "ocdbt.process_0"))
            restored = checkpoints.restore(describe(make_state(0)))
            assert restored is not None and restored.step == 1
            assert checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
            assert (two.parent / "checkpoints_bad" / f"2-{n}").is_dir()
        restored = checkpoints.restore(describe(make_state(0)))
    assert restored is not None and restored.step == 2 and same(restored.state, make_state(2))


def test_a_run_with_only_corrupt_checkpoints_never_starts_at_step_0(two):
    for step in ("1", "2"):
        truncate(two / step / "meta" / "metadata")
    for _ in range(2):  # the second time there are no steps left, only the ones moved aside
        with pytest.raises(UserError, match="no usable checkpoint .*checkpoints_bad"):
            Checkpointer(two).restore(describe(make_state(0)))
    shutil.rmtree(two.parent / "checkpoints_bad")
    assert Checkpointer(two).restore(describe(make_state(0))) is None


def test_a_requested_corrupt_step_is_an_error_and_stays(two):
    truncate(two / "2" / "meta" / "metadata")
    with pytest.raises(UserError, match="checkpoint 2 in .* is damaged: its manifest"):
        Checkpointer(two).restore(describe(make_state(0)), step=2)
    assert Checkpointer(two).steps() == [1, 2]


def test_late_writes_of_an_abandoned_save_print_no_tracebacks(tmp_path, monkeypatch):
    """As tensorstore's threads raise them when a disk is full: of no object, the loop closed."""
    shown: list[Any] = []
    show = shown.append
    monkeypatch.setattr(sys, "__unraisablehook__", show)
    monkeypatch.setattr(sys, "unraisablehook", show)
    save_steps(tmp_path / "checkpoints", 1)
    late, other = RuntimeError("Event loop is closed"), RuntimeError("other")
    for error, of in ((late, None), (late, "a finalizer"), (other, None)):
        raised: Any = SimpleNamespace(exc_type=RuntimeError, exc_value=error, object=of)
        sys.unraisablehook(raised)
    assert [(x.exc_value, x.object) for x in shown] == [(late, "a finalizer"), (other, None)]


def test_a_folder_in_the_place_of_a_manifest_counts_as_corrupt(two, capsys):
    path = two / "2" / "meta" / "metadata"
    path.unlink()
    path.mkdir()
    restored = Checkpointer(two, read_only=True).restore(describe(make_state(0)))
    assert restored is not None and restored.step == 1
    assert "IsADirectoryError" in capsys.readouterr().err
    (two.parent / "checkpoints_bad").write_text("")
    with pytest.raises(UserError, match="checkpoints_bad cannot be written: File exists"):
        Checkpointer(two).restore(describe(make_state(0)))


def test_a_reader_moves_nothing(two, capsys):
    truncate(two / "2" / "meta" / "metadata")
    reader = Checkpointer(two, read_only=True)
    restored = reader.restore(describe(make_state(0)))
    assert restored is not None and restored.step == 1
    assert "skipped" in capsys.readouterr().err
    assert reader.steps() == [1, 2] and not (two.parent / "checkpoints_bad").exists()
    truncate(two / "1" / "meta" / "metadata")
    with pytest.raises(UserError, match="no usable checkpoint"):
        reader.restore(describe(make_state(0)))
    assert reader.steps() == [1, 2]
    with pytest.raises(ValueError, match="read only"):
        reader.save(3, make_state(3), {})


@pytest.mark.parametrize(
    "trouble",
    [
        MemoryError("out of memory"),
        PermissionError(13, "Permission denied"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of device memory"),
        ValueError("RESOURCE_EXHAUSTED: Error opening file: Too many open files"),
    ],
)
def test_an_error_of_the_machine_does_not_reject_a_good_checkpoint(trouble, two, monkeypatch):
    def fail(*_):
        raise trouble

    of_files = isinstance(trouble, OSError | ValueError)
    kind = UserError if of_files else type(trouble)
    said = f"{two}/2/state: array .*{str(trouble)[-10:]}.*; fix that" if of_files else None
    with monkeypatch.context() as patch, pytest.raises(kind, match=said):
        patch.setattr(restore, "_read_onto_devices", fail)
        Checkpointer(two).restore(describe(make_state(0)))
    restored = Checkpointer(two).restore(describe(make_state(0)))
    assert restored is not None and restored.step == 2


# ---------------------------------------------------------------- another config


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: {**s, "params": {**s["params"], "w": jnp.zeros((16, 32))}},
            r"params/w is float32\[16,64\] in the checkpoint and float32\[16,32\] here",
        ),
        (
            lambda s: {**s, "params": {**s["params"], "w": jnp.zeros((16, 64), jnp.bfloat16)}},
            r"params/w is float32\[16,64\] in the checkpoint and bfloat16\[16,64\] here",
        ),
        (lambda s: {**s, "new": jnp.zeros(2)}, r"new is absent in the .* and float32\[2\] here"),
        (lambda s: {k: v for k, v in s.items() if k != "step"}, r"step is int32\[\] in .* absent"),
        (
            lambda s: {**s, "key": jax.random.split(jax.random.key(0, impl="rbg"), 3)},
            r"key is key<fry>\[3\] in the checkpoint and key<rbg>\[3\] here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_the_users_mistake_and_stays(change, message, two):
    with pytest.raises(UserError, match=message):
        Checkpointer(two).restore(describe(change(make_state(0))))
    assert Checkpointer(two).steps() == [1, 2]
    assert not (two.parent / "checkpoints_bad").exists()


# ---------------------------------------------------------------- failing and killed saves


@contextmanager
def limit(kind: int, value: int):
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("room", [100_000, 10])  # the arrays do not fit; not even the metadata does
def test_a_full_disk_is_one_clear_error_and_the_checkpoint_before_stays(room, two):
    big = {"w": jax.random.normal(jax.random.key(0), (300, 1000))}
    with Checkpointer(two) as checkpoints:
        with (
            limit(resource.RLIMIT_FSIZE, room),
            pytest.raises(UserError, match=r"checkpoint 3 could not be .*checkpoints: .*File too"),
        ):
            checkpoints.save(3, big, {})
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        restored = checkpoints.restore(describe(make_state(0)))
        assert restored is not None and restored.step == 2
        assert checkpoints.save(4, make_state(4), {})  # there is room again
    assert sorted(path.name for path in two.iterdir()) == ["2", "4"]


def test_files_of_a_killed_save_are_no_checkpoint_and_are_removed(two):
    left = Path(shutil.copytree(two / "2", two / "3.orbax-checkpoint-tmp"))
    with Checkpointer(two) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        restored = checkpoints.restore(describe(make_state(0)))
        assert restored is not None and restored.step == 2
        assert checkpoints.save(3, make_state(3), {})
    assert not left.exists() and Checkpointer(two).steps() == [2, 3]


KILLED = """
import os, signal, sys
import jax
from moejax.train.checkpoint.checkpointer import Checkpointer

checkpoints = Checkpointer(sys.argv[1])
state = {"w": jax.random.normal(jax.random.key(0), (2000, 1000))}
checkpoints.save(1, {"w": state["w"] + 1}, {})
checkpoints.wait()
checkpoints.save(2, {"w": state["w"] + 2}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_the_checkpoint_before(tmp_path):
    directory = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory)], cwd=ROOT, env=plain_environment()
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in directory.iterdir() if path.name.startswith("2.")], (
        "killed too late"
    )
    state = {"w": jax.random.normal(jax.random.key(0), (2000, 1000))}
    with Checkpointer(directory) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(describe(state))
        assert restored is not None and restored.step == 1
        np.testing.assert_array_equal(np.asarray(restored.state["w"]), np.asarray(state["w"] + 1))


def plain_environment() -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------- warm start


def test_a_warm_start_takes_the_params_of_the_newest_good_checkpoint(two, capsys):
    template = describe(make_state(0, mesh_of(2, 2), "a", "b"))["params"]
    started = restore_subtree(two, template)
    assert started.step == 2 and same(started.state, make_state(2)["params"])
    assert started.state["w"].sharding == template["w"].sharding

    flip_bit(largest_file(two / "2" / "state" / "ocdbt.process_0"))  # in opt/0, which is not read
    assert restore_subtree(two, template).step == 2
    assert restore_subtree(two, describe(make_state(0))["opt"], "opt").step == 1
    assert "checkpoint 2" in capsys.readouterr().err
    assert Checkpointer(two).steps() == [1, 2]


def test_a_warm_start_that_does_not_fit_or_finds_nothing_is_the_users_mistake(two, tmp_path):
    template = {**make_state(0)["params"], "w": jnp.zeros((16, 65))}
    with pytest.raises(UserError, match=r"params/w is float32\[16,64\] .* float32\[16,65\] here"):
        restore_subtree(two, describe(template))
    with pytest.raises(UserError, match="no checkpoint to start from in .*/none: found none"):
        restore_subtree(tmp_path / "none", describe(template))


# ---------------------------------------------------------------- JAX's preemption service


def test_a_resumed_run_that_is_preempted_saves_and_keeps_only_the_newest(two, monkeypatch):
    """Orbax subtracts the times of the last two checkpoints then, and knows only one of them."""
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: True)
    with Checkpointer(two, keep=2) as checkpoints:
        restored = checkpoints.restore(describe(make_state(0)))
        assert restored is not None and restored.step == 2
        for step in (3, 4):
            assert checkpoints.save(step, make_state(step), {})
    assert checkpoints.steps() == [3, 4]
    with Checkpointer(two, keep=2) as checkpoints:
        restored = checkpoints.restore(describe(make_state(0)))
        assert restored is not None and same(restored.state, make_state(4))


# ---------------------------------------------------------------- several processes

PROCESS = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from moejax.train.checkpoint import restore
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.checkpoint.manifest import Damaged

port, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=60)
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def layout(*spec):
    whole = NamedSharding(mesh, PartitionSpec())
    return {"w": NamedSharding(mesh, PartitionSpec(*spec)), "step": whole}

def make(step):
    return {"w": jax.random.normal(jax.random.key(step), (16, 64)), "step": jnp.int32(step)}

checkpoints = Checkpointer(directory, keep=3)
on_mesh = jax.jit(make, static_argnums=0, out_shardings=layout("a", "b"))
for step in (1, 2, 3):
    assert checkpoints.save(step, on_mesh(step), {})
checkpoints.wait()
assert checkpoints.steps() == [1, 2, 3]

read = restore._read_arrays
def fails_on_one_process(folder, leaves):
    if rank == 1 and folder.parent.name == "3":
        raise Damaged("only process 1 sees this")
    return read(folder, leaves)
restore._read_arrays = fails_on_one_process

template = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(lambda: make(0)), layout("b"),
)
restored = checkpoints.restore(template)
assert checkpoints.steps() == [1, 2]
equal = jax.jit(lambda a: jnp.all(a["w"] == make(2)["w"]))(restored.state)
print(f"process {rank}: step {restored.step}, equal {bool(equal)}", flush=True)
checkpoints.close()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_agree_on_the_step_although_one_sees_the_damage(tmp_path, free_port):
    directory = tmp_path / "checkpoints"
    environment = {**plain_environment(), "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(free_port), str(rank), str(directory)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (out, err) in enumerate(said):
        assert f"process {rank}: step 2, equal True" in out, err
    assert "checkpoint 3" in said[0][1] and "only process 1 sees this" in said[0][1]
    assert "is damaged" not in said[1][1]  # the first process speaks for all
    # One process reads what two have written.
    state = {"w": jax.random.normal(jax.random.key(2), (16, 64)), "step": jnp.int32(2)}
    restored = Checkpointer(directory).restore(describe(state))
    assert restored is not None and same(restored.state, state)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
