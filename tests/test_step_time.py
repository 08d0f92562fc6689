"""How the peers are timed. That they compute what we compute is in test_peers, which needs PyTorch."""

import os

import numpy as np
import pytest

from benchmarks import _recipes, step_time, tables
from benchmarks.peers import plain_jax
from gan_jax import data
from gan_jax.types import BatchSizes

DATASET = _recipes.random_images(18)


def test_the_plain_way_takes_the_step(tiny):
  """Its batches have the requested sizes and come from the data."""
  recipe = tiny.recipe(batch=BatchSizes(labelled=6, unlabelled=8, generated=4))
  batch = next(plain_jax.batches(recipe.batch, tiny.data, 0))
  assert [len(x) for x in (batch.x_lab, batch.y_lab, batch.x_unl, batch.x_unl_g)] == [6, 6, 8, 4]
  assert batch.num_generated == 4
  known = {
    x.tobytes(): y for x, y in zip(np.asarray(tiny.data.x_lab), np.asarray(tiny.data.y_lab), strict=True)
  }
  for x, y in zip(batch.x_lab, batch.y_lab, strict=True):
    assert known[data.to_bytes(x).tobytes()] == y
  gan = plain_jax.Gan(recipe, tiny.state(), tiny.data)
  gan.run(2)
  gan.synchronize()
  assert int(gan.state.step) == 2
  assert np.isfinite(gan.losses).all()
  assert len(gan.losses) == 2


def test_batch_sizes_change_in_proportion():
  sizes = lambda name, batch_size: _recipes.make(name, DATASET, batch_size).batch
  assert sizes("conv_ssgan", 128) == tuple(2 * num for num in sizes("conv_ssgan", None))
  assert sizes("article_gan", 32) == (0, 32, 32)
  assert sizes("conditional_r1", 32) == (32, 0, 32)


def test_labels_are_those_of_the_experiments():
  """Ten per class, and all of them for a class-conditional D."""
  num_labels = {
    name: len(_recipes.split(_recipes.make(name, DATASET), DATASET).indices) for name in _recipes.HPARAMS
  }
  assert num_labels == {
    "article_gan": 100,
    "feature_matching": 100,
    "conv_ssgan": 100,
    "conditional_r1": 500,
  }


def test_ratios_are_of_the_same_round_and_a_failure_is_a_line():
  found = {"rows": [1, 2, 3], "dataset": "digits", "note": "", "seconds_first": 1.0}
  found |= {"peak_memory_mb": 2.0, "memory_mb": 1.0, "device_memory_mb": None}
  found |= {"device": "cpu", "versions": {"python": "3", "jax": "0", "flax": "0"}, "commit": None}
  ours = step_time.Entry("ours", 1, rates=[10.0, 20.0, 60.0], found=found)
  peer = step_time.Entry("torch_eager", 1, rates=[5.0, 5.0, 20.0], found=found)
  broken = step_time.Entry("torch_compile", 1)
  broken.fail("no compiler")
  lines = [
    step_time.result(entry, [ours, peer, broken], "article_gan", None) for entry in (ours, peer, broken)
  ]
  assert lines[1]["ours_is_faster_by"] == {"median": 3.0, "smallest": 2.0, "largest": 4.0}
  assert "ours_is_faster_by" not in lines[0]
  assert lines[2]["not_run"] == "no compiler"
  assert "steps_per_second" not in lines[2]
  assert "| torch_compile | not run: no compiler |" in step_time.table(lines)
  lines += [{**lines[1], "contender": "plain_jax"}]
  row = tables.batch_sizes([line | {"batch_size": 64} for line in lines]).splitlines()[2]
  assert row.strip("†| ").split(" | ")[1:] == ["3.00", "not run", "3.00"]


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--seconds", "nan"], ["--recipes", "nothing"]])
def test_a_bad_flag_is_one_sentence(flags, capsys):
  with pytest.raises(SystemExit, match="2"):
    step_time.parse(flags)
  assert f"error: argument {flags[0]}: " in capsys.readouterr().err


def test_stored_results_are_not_replaced_unasked(capsys):
  with pytest.raises(SystemExit, match="2"):
    step_time.parse([])
  assert "step_time.jsonl exists: choose another --name" in capsys.readouterr().err
  assert step_time.parse(["--contenders", "ours", "--overwrite"]).name == "step_time"
  assert step_time.parse(["--contenders", "ours", "--name", "new"]).name == "new"


def test_a_worker_answers_every_command():
  task = {"contender": "ours", "recipe": "article_gan", "batch_size": 4, "replicates": 1, "random_side": 8}
  worker = step_time.Worker(task, env={"XLA_FLAGS": os.environ["XLA_FLAGS"]})
  try:
    assert worker.ready["rows"] == [0, 4, 4]
    assert worker.ask("run 2")["seconds"] > 0
    assert worker.ask("matmul")["matmul_flops_per_second"] > 0
    found = worker.ask("memory") | worker.ask("flops")
    assert found["device_memory_mb"] is None
    assert found["flops_per_step"] > 2 * 4 * 784  # at least the first layer's products
  finally:
    worker.close()


def test_a_worker_that_fails_says_why():
  task = {"contender": "ours", "recipe": "article_gan", "dataset": "mnist", "manual_dir": "nowhere"}
  with pytest.raises(step_time.WorkerError, match="is not a folder"):
    step_time.Worker(task)


def test_why_a_contender_did_not_run_is_its_error_and_not_the_hint_after_it(tmp_path):
  python = tmp_path / "python"
  python.write_text(
    "#!/bin/sh\nprintf 'Traceback\\ntorch.BackendError: no gradient\\nSet X=1 for more\\n' >&2\nexit 1\n"
  )
  python.chmod(0o755)
  with pytest.raises(step_time.WorkerError, match=r"torch\.BackendError: no gradient"):
    step_time.Worker({"contender": "torch_compile"}, str(python))
