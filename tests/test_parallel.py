import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FULL, WEAK

from gan_jax import (
  augment,
  classify,
  cli,
  losses,
  networks,
  objectives,
  parallel,
  parsing,
  processes,
  replicates,
  train,
)
from gan_jax.types import BatchSizes, InputError

RELATIVISTIC = objectives.gan(losses.relativistic, penalty="r1_r2", gamma=0.1)


def conv(norm_d, norm_g):
  return {
    "g": networks.ConvGenerator((8, 8, 1), width=8, latent_size=4, norm=norm_g),
    "d": networks.ConvDiscriminator(3, width=8, num_features=8, norm=norm_d),
  }


CASES = {
  "whole recipe": {"objective": FULL, "augment": WEAK, **conv("layer", "shift")},
  "pairs, R1 and R2, spectral and batch norm": {"objective": RELATIVISTIC, **conv("spectral", "shift")},
  "noise, weight norm and ADA": {
    "objective": objectives.gan(),
    "network": "mlp",
    # Wide enough that the noise, which every device draws for all images, costs less than the rest.
    "d": networks.MLPDiscriminator(3, widths=(32, 8)),
    "augment": augment.Adaptive((WEAK,), num_images=40, horizon=1),  # active from the second step on
    "sizes": BatchSizes(0, 16, 8),
  },
}


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_compute_what_one_does(case, make_tiny):
  """A mesh, and pmap, up to rounding. With SGD, because Adam hides a constant factor in the gradient."""
  changes = dict(CASES[case])
  tiny = make_tiny(tx=optax.sgd(0.05), network=changes.pop("network", "conv"))
  num_unlabelled = 8 if changes["objective"] is RELATIVISTIC else 16  # pairs need equal numbers
  sizes = changes.pop("sizes", BatchSizes(8, num_unlabelled, 8))
  recipe = tiny.recipe(batch=sizes, **changes)
  start = recipe.init_state(jax.random.key(0), tiny.data)
  devices = jax.devices()
  args, num = (start, tiny.data), np.int32(3)
  compiled = jax.jit(recipe.make_multi_step(3)).lower(*args, num).compile()
  flops, (expected, metrics) = compiled.cost_analysis()["flops"], compiled(*args, num)
  mesh = jax.jit(parallel.over_devices(recipe, devices).make_multi_step(3))
  pmap = jax.pmap(parallel.over_axis(recipe).make_multi_step(3), parallel.AXIS, in_axes=(0, 0, None))
  each = tuple(replicates.stack([tree] * 8) for tree in args)
  for program, arguments in ((mesh, parallel.replicated(args, devices)), (pmap, each)):
    lowered = program.lower(*arguments, num)
    compiled = lowered.compile()
    found, metrics_found = compiled(*arguments, num)
    if program is pmap:
      for leaf in jax.tree.leaves((found.g.params, found.d.params, metrics_found)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
      found, metrics_found = replicates.pick((found, metrics_found), 0)
    assert len(devices) == 8
    if program is mesh:
      assert compiled.cost_analysis()["flops"] < flops / 4  # each device computes a part
    else:
      assert "all_gather" in lowered.as_text()
    for _before, a, b in zip(*map(jax.tree.leaves, (start, expected, found)), strict=True):
      if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        np.testing.assert_allclose(b, a, atol=1e-6)
    moved = [
      not np.array_equal(a, b)
      for a, b in zip(*map(jax.tree.leaves, (start.d.params, found.d.params)), strict=True)
    ]
    assert np.mean(moved) > 0.9
    for name in metrics:
      np.testing.assert_allclose(metrics_found[name], metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


@dataclasses.dataclass(frozen=True)
class Toy:
  """A network of one layer."""

  axis_name: str | None = None

  def apply(self, variables, x):
    return jnp.tanh(x @ variables["params"])


def test_a_mean_for_each_device_is_another_loss():
  """The square of a mean, and a penalty: the classic pmap gets them wrong, ours gets them right."""
  w, x = jax.random.normal(jax.random.key(0), (3,)), jax.random.normal(jax.random.key(1), (8, 3))

  def loss(w, x, net):
    slopes = jax.grad(lambda x: net.apply({"params": w}, x).sum())(x)
    return jnp.square(net.apply({"params": w}, x).mean()) + jnp.square(slopes).sum(axis=-1).mean()

  expected = jax.grad(loss)(w, x, Toy())
  pmap = lambda fn, x: jax.pmap(fn, parallel.AXIS)(jnp.broadcast_to(w, (8, 3)), x)
  ours = pmap(lambda w, x: jax.grad(loss)(w, x, parallel._Part(Toy())), jnp.broadcast_to(x, (8, 8, 3)))
  classic = pmap(lambda w, x: jax.lax.pmean(jax.grad(loss)(w, x, Toy()), parallel.AXIS), x.reshape(8, 1, 3))
  np.testing.assert_allclose(ours, np.broadcast_to(expected, (8, 3)), rtol=1e-5)
  assert not np.allclose(classic[0], expected, rtol=0.1)


def test_what_pmap_cannot_split(tiny):
  args = tuple(replicates.stack([tree] * 8) for tree in (tiny.state(), tiny.data))
  recipe = parallel.over_axis(tiny.recipe())
  multi_step = jax.pmap(recipe.make_multi_step(1), parallel.AXIS, in_axes=(0, 0, None))
  with pytest.raises(InputError, match="6 images cannot be split evenly over 8 devices"):
    jax.eval_shape(multi_step, *args, 1)
  with pytest.raises(InputError, match="object has no axis_name"):
    parallel.over_axis(tiny.recipe(g=object()))


WORKER = """
import dataclasses, signal, sys
from pathlib import Path
import conftest, jax, optax
from gan_jax import cli, data, program, train, types

jax.config.update("jax_num_cpu_devices", 1)

@dataclasses.dataclass(frozen=True)
class Config:
  folder: str = ""
  processes: cli.ProcessFlags = cli.ProcessFlags()

class Source:
  def __init__(self, x):
    self.x, self.shape, self.reads = x, x.shape, []

  def __len__(self):
    return len(self.x)

  def __getitem__(self, rows):
    self.reads.append(len(rows))
    return self.x[rows]

def main(config):
  try:
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("SIGTERM is lost before training")
  except types.Stopped:
    pass
  tiny = conftest.Tiny(tx=optax.sgd(0.01))
  source = Source(tiny.dataset.x_train)
  streamed = data.to_device(dataclasses.replace(tiny.dataset, x_train=source, workers=1), tiny.split)
  source.reads.clear()

  def fit(num_steps, name, images):
    recipe, key = tiny.recipe(num_steps=num_steps), jax.random.key(0)
    devices = cli.devices(None, recipe)
    folder = Path(config.folder) / name
    kwargs = {"workdir": folder, "devices": devices, "checkpoint_every": 10, "steps_per_dispatch": 10}
    train.fit(recipe, images, key, **kwargs)

  fit(4, "done", streamed)
  assert source.reads == [6] * 4, source.reads  # a half of each step's twelve
  fit(10**9, "killed", tiny.data)

program.run(main, Config)
"""


def test_two_processes_compute_what_one_does_and_a_killed_one_ends_the_other(make_tiny, tmp_path):
  """Over loopback, with each process streaming its half of the images. One process with two devices resumes
  from the checkpoint. With SGD, because Adam magnifies the rounding of small gradients."""
  tiny = make_tiny(tx=optax.sgd(0.01))
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
  flags = ["--folder", str(tmp_path), "--coordinator", f"localhost:{port}", "--num-processes", "2"]
  for name in ("done", "killed"):
    (tmp_path / name).mkdir()
  both = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER, *flags, "--process-id", str(i)],
      env=env,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  fit = lambda num_steps, **kwargs: train.fit(
    tiny.recipe(num_steps=num_steps), tiny.data, jax.random.key(0), verbose=False, **kwargs
  )
  try:
    expected = fit(4).state
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed" / "checkpoints").glob("*0"))) < 2 and time.monotonic() < end:
      assert both[0].poll() is None, both[0].communicate()[1]
      time.sleep(0.1)
    both[1].kill()
    _, said = both[0].communicate(timeout=60)
    assert both[0].returncode == 1
    assert f"error: {processes.LOST}" in said
    assert "process 0 of 2, 2 devices in all" in said
    _, said = both[1].communicate()
    assert "train 4/4" not in said  # only the first process prints
  finally:
    for process in both:
      process.kill()
      process.wait()
  rows = (tmp_path / "done" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [1, 4]
  saved = fit(4, workdir=tmp_path / "done", resume=True)
  assert saved.first_step_at is None  # all steps were already done
  for a, b in zip(jax.tree.leaves(expected.ema), jax.tree.leaves(saved.state.ema), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)
  last = max(int(path.name) for path in (tmp_path / "killed" / "checkpoints").glob("*0"))
  more = fit(last + 2, workdir=tmp_path / "killed", resume=True, devices=jax.devices()[:2])
  assert int(more.state.step) == last + 2


def test_processes_of_other_keys_are_not_the_same(monkeypatch):
  """Each would make its own parameters and batches, but share gradients."""
  own = iter(jax.random.key(seed) for seed in (0, 1))
  digests = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  gather = lambda digest: digests.append(digest) or np.array([digests[0], digest])
  monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
  processes.check_same("flags", {"key": next(own), "x": np.ones(3)})
  with pytest.raises(InputError, match="process 1 has different flags, images or networks"):
    processes.check_same("flags", {"key": next(own), "x": np.ones(3)})


def test_several_processes_need_one_folder():
  """By default its name is the time at which each of them starts."""
  config = classify.Config(processes=cli.ProcessFlags(coordinator="auto"))
  with pytest.raises(InputError, match="need --workdir, a folder that all of them share"):
    parsing.check(config)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ({"process_id": 0}, "need --coordinator"),
    (
      {"coordinator": "auto", "num_processes": 2, "process_id": 2},
      "--process-id 2 must be less than --num-processes 2",
    ),
    ({"coordinator": "auto", "num_processes": 0}, "--num-processes must be at least 1"),
  ],
)
def test_flags_of_no_processes(flags, words):
  with pytest.raises(InputError, match=words):
    cli.ProcessFlags(**flags).check()


def test_a_coordinator_that_cannot_be_used():
  with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as busy:
    address = f"localhost:{busy.getsockname()[1]}"
    with pytest.raises(
      InputError, match=rf"port of --coordinator {address} cannot be used \(Address already in use\)"
    ):
      processes.initialize(address, 2, 0)
  with pytest.raises(InputError, match=r"did not answer within 1 s \(Connection refused\)"):
    processes.initialize(address, 2, 1, timeout=1)
  for address in ("here", "here:70000"):
    with pytest.raises(InputError, match=f"{address} must be HOST:PORT or auto"):
      processes.initialize(address, 2, 0)


def test_fit_over_devices_saves_what_one_device_goes_on_with(make_tiny, tmp_path):
  """Four steps on two devices, resumed on one, against four steps on one: equal up to rounding."""
  tiny = make_tiny(tx=optax.sgd(0.01))
  recipe = tiny.recipe(num_steps=4)  # one for both: it keeps its program
  fit = functools.partial(train.fit, images=tiny.data, key=jax.random.key(0), verbose=False)
  expected = fit(recipe).state
  half = dataclasses.replace(recipe, num_steps=2)
  first = fit(half, workdir=tmp_path, devices=jax.devices()[:2]).state
  assert len(first.step.sharding.device_set) == 1  # for evaluation: on two, each would do all the work
  found = fit(recipe, workdir=tmp_path, resume=True).state
  assert int(found.step) == 4
  for a, b in zip(jax.tree.leaves(expected.ema), jax.tree.leaves(found.ema), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)


def test_a_batch_that_cannot_be_split(tiny):
  recipe = tiny.recipe(batch=BatchSizes(50, 64, 32))
  assert [parallel.most_devices(recipe.batch, num) for num in (1, 3, 8)] == [1, 2, 2]
  assert [parallel.most_devices(BatchSizes(48, 96, 24), 8, num) for num in (2, 3, 5)] == [8, 6, 5]
  with pytest.raises(
    InputError,
    match=r"50 labelled images per step cannot be split evenly over 8 devices: .* of 8, or --devices 2$",
  ):
    parallel.over_devices(recipe, jax.devices())
