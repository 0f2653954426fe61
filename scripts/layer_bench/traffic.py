"""Bytes that tokens cause on the wire, on eight virtual devices: python traffic.py prints JSON.

A process of its own, because the number of devices is fixed when JAX starts. Of each send, what a
device keeps for itself is left out, and so is it in the minimum: k copies per remote token. Sends
are those to the experts; what comes back is as much, without the routing that dropless_once sends.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

DEVICES = 8
_ALL_TO_ALL = re.compile(r"= (.+?) all-to-all(?:-start)?\(")
_FLOATS = re.compile(r"f32\[([0-9,]+)\]")


def measure(names: list[str]) -> list[dict]:
    """The rows of `rows`, computed in a process with eight devices."""
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
    }
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def all_to_all_floats(text: str) -> int:
    """Float32 elements that one device gets from all-to-alls in a program without loops."""
    return sum(
        math.prod(map(int, dims.split(",")))
        for line in text.splitlines()
        for match in [_ALL_TO_ALL.search(line)]
        if match
        for dims in _FLOATS.findall(match[1])
    )


def rows(names: list[str]) -> list[dict]:
    """One row per shape and transport: bytes sent to other devices over the minimum."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from moejax.mesh import batch_spec, make_mesh
    from scripts.layer_bench.layers import IMPLS, kept_pairs, route
    from scripts.layer_bench.problems import SHAPES, make_problem

    mesh = make_mesh({"expert": DEVICES})
    found = []
    for shape in map(SHAPES.__getitem__, names):
        problem = make_problem(shape)
        expert_TK = route(problem.x_TD, problem.params["router_DE"], shape.k)[0]
        home_T1 = np.arange(shape.T)[:, None] // (shape.T // DEVICES)
        remote_TK = np.asarray(expert_TK) // (shape.E // DEVICES) != home_T1
        for name in ("cells-1.0", "cells-1.25"):
            tokens = NamedSharding(mesh, batch_spec(mesh.abstract_mesh))
            specs = {n: P("expert") if n != "router_DE" else P() for n in problem.params}
            x_TD = jax.ShapeDtypeStruct(problem.x_TD.shape, problem.x_TD.dtype, sharding=tokens)
            params = {
                n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs[n]))
                for n, a in problem.params.items()
            }
            with jax.set_mesh(mesh):
                layer = jax.jit(IMPLS[name].build(shape))
                text = layer.lower(x_TD, params).compile().as_text() or ""
            # There and back are two all-to-alls of the same size.
            sent = all_to_all_floats(text) / 2 * DEVICES * (DEVICES - 1) / DEVICES
            minimum = shape.T * shape.k * shape.D * (DEVICES - 1) / DEVICES
            kept = kept_pairs(expert_TK, shape, IMPLS[name].capacity_factor)
            found.append(_row(shape, name, sent, minimum, 1 - float(kept.mean())))
        found += _dropless_rows(shape, expert_TK, mesh, int(remote_TK.sum()))
    return found


def _dropless_rows(shape, expert_TK, mesh, remote_pairs: int) -> list[dict]:
    """Those of both dropless transports, from the sizes of their slices to each device."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from moejax.dispatch import exchange, pack

    def send_sizes(expert_tK, *, once: bool):
        weight_tK = jax.numpy.ones(expert_tK.shape)
        if once:
            own = shape.E // DEVICES
            _, size = pack.plan_visits(expert_tK, weight_tK, shards=DEVICES, own=own)
        else:
            rows = expert_tK.size
            _, size = pack.plan_sorted(expert_tK, weight_tK, num_experts=shape.E, rows=rows)
        site = exchange.Site(shards=DEVICES, expert_axis="expert")
        return exchange.plan_traffic(size, site).there_send

    found = []
    # Beside a row dropless_once sends k experts and k weights.
    for name, width in (("dropless", shape.D), ("dropless_once", shape.D + 2 * shape.k)):
        plan = functools.partial(send_sizes, once=name == "dropless_once")
        with jax.set_mesh(mesh):
            run = jax.shard_map(plan, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
            send_SSe = np.asarray(jax.jit(run)(expert_TK)).reshape(DEVICES, DEVICES, -1)
        to_others = send_SSe.sum() - np.trace(send_SSe.sum(axis=-1))
        found.append(_row(shape, name, int(to_others) * width, remote_pairs * shape.D, 0.0))
    return found


def _row(shape, name: str, sent: float, minimum: float, dropped: float) -> dict:
    """``sent`` and ``minimum`` in float32 elements, one way, over all devices."""
    return {
        "kind": "traffic",
        "shape": shape.name,
        "impl": name,
        "devices": DEVICES,
        "bytes_one_way": int(4 * sent),
        "bytes_over_minimum": float(sent / minimum),
        "dropped": dropped,
    }


if __name__ == "__main__":
    print(json.dumps(rows(sys.argv[1:])))
