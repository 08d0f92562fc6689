import dataclasses
import errno
import gc
import importlib.machinery
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import mnist_low_data, mnist_ssgan
from gan_jax import classify, cli, data, output, parsing, program, recipes
from gan_jax.datasets import Dataset
from gan_jax.types import BatchSizes, InputError

BAD = [
  ({"steps": 0}, "--steps must be at least 1, not 0"),
  ({"labels_per_class": 0}, "--labels-per-class must be at least 1, not 0"),
  ({"batch_size": -1}, "--batch-size must be at least 1"),
  ({"image_size": 0}, "--image-size must be at least 1"),
  ({"fit": "pad"}, "--fit pad needs --image-size"),
  ({"num_images": 0}, "--num-images must be at least 1"),
  ({"folds": 1}, "--folds must be at least 2, or 0 for none: a single fold would leave out every label"),
  ({"frechet": True, "adversarial": 0.0}, "--frechet needs a generator"),
  (
    {"dataset": "folder:x", "manual_dir": "y"},
    "--manual-dir is for tfds datasets, but folder:x is your own",
  ),
  ({"hold_out": -1}, "--hold-out must not be negative"),
  ({"checkpoint_every": 0}, "--checkpoint-every must be at least 1"),
  ({"split_seed": -1}, "must not be negative"),
  ({"seed": -1}, "--seed must not be negative"),
  ({"class_balance": (1.0, -1.0)}, "--class-balance must not be negative"),
  ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, not nan"),
  ({"class_balance": (1.0, float("inf"))}, "--class-balance must be a finite number, not inf"),
  ({"seed": 2**32}, "--seed must be at most 4,294,967,295, not 4,294,967,296"),
  ({"split_seed": 2**32}, "--split-seed must be at most 4,294,967,295"),
  ({"steps": 2**31}, "--steps must be at most 2,147,483,647"),
  ({"resume": True}, "--resume needs --workdir"),
  ({"resume": True, "overwrite": True, "workdir": "x"}, "choose one"),
  ({"freeze_d": -1}, "--freeze-d must not be negative"),
  ({"freeze_d": 1}, "it would freeze random layers"),
  ({"freeze_d": 1, "init_from": "x", "init_parts": "g"}, "it would freeze random layers"),
  ({"init_parts": "g"}, "--init-parts needs --init-from"),
  ({"init_from": "x"}, "--init-from x is not the folder of a run"),
]


@pytest.mark.parametrize(("flags", "words"), BAD)
def test_bad_flags(flags, words):
  with pytest.raises(InputError, match=words):
    parsing.check(parsing.with_flags(mnist_ssgan.Config(), **flags))


def test_flags_are_found_in_whatever_group_they_are():
  config = parsing.with_flags(mnist_ssgan.Config(), steps=3, network="mlp", workdir="x")
  assert (config.train.steps, config.network, config.run.workdir) == (3, "mlp", "x")
  flags = parsing.flags_of(config)
  assert (flags["steps"], flags["network"], flags["seed"]) == (3, "mlp", 0)
  with pytest.raises(TypeError, match="no such flag: percents"):
    parsing.with_flags(config, percents=(1.0,))


@pytest.mark.parametrize(
  ("module", "changes"),
  [
    (mnist_ssgan, {}),
    (
      mnist_ssgan,
      {
        "dataset": "folder:my <pictures>; rm",
        "labels_per_class": None,
        "exclude_labelled": True,
        "class_balance": (0.0, 0.5),
        "consistency": 0.0,
        "hold_out": 5,
        "manual_dir": "a b",
      },
    ),
    (mnist_low_data, {"augments": ("none",), "percents": (5.0, 12.5)}),
  ],
)
def test_a_run_is_repeated_by_its_command(module, changes):
  """Parsing it gives the same configuration, without the folder of the first run."""
  config = parsing.with_flags(module.Config(), **changes)
  run = parsing.with_flags(config, workdir="here", overwrite=True)
  words = shlex.split(parsing.command("python -m experiments.x", run))
  assert words[:3] == ["python", "-m", "experiments.x"]
  assert parsing._parse(module.Config, words[3:]) == config
  assert len(words) == 3 or changes


def run(monkeypatch, *flags, module=mnist_ssgan) -> int:
  """Runs the command line in this process; returns its exit code."""
  monkeypatch.setattr(sys, "argv", ["test", *flags])
  with pytest.raises(SystemExit) as stopped:
    program.run(module.main, module.Config)
  return stopped.value.code  # pyright: ignore


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (("--steps", "0"), "error: --steps must be at least 1, not 0"),
    (("--steps", "x"), "error: --steps: must be {None}|INT, not ['x']"),
    (("--learning-rat", "1"), "--learning-rat, 1; perhaps you meant --learning-rate {None}|FLOAT"),
    (("--network", "x"), "error: invalid choice 'x' for argument '--network'"),
    (
      ("--dataset", "digits", "--batch-size", "2147483647"),
      "is free: choose a smaller --image-size or --batch-size",
    ),
    (("--dataset", "digits", "--image-size", "100000"), "1,797 images of 100000x100000 take 16,735.9 GB"),
    (
      ("--dataset", "digits", "--labels-per-class", "all", "--exclude-labelled"),
      "--exclude-labelled leaves no images, as all 1,198 have labels",
    ),
    (("--dataset", "nope"), "error: unknown dataset 'nope'"),
    (("--dataset", "cifar10"), "pip install -e '.[tf]'"),
    (("--dataset", "digits", "--image-size", "4", "--network", "conv"), "images of 4x4 are too small"),
  ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(flags, sentence, monkeypatch, capsys, tmp_path):
  assert run(monkeypatch, *flags) == 2
  said = capsys.readouterr().err
  assert sentence in said
  assert len([line for line in said.splitlines() if not line.startswith("reading ")]) == 1
  assert not list(tmp_path.rglob("config.json"))


def test_a_file_that_cannot_be_written_is_known_before(tmp_path):
  output.check_file(tmp_path / "new" / "file")
  output.check_file(Path("/dev/null"))
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").touch()
  for path in (tmp_path, tmp_path / "file" / "below", tmp_path / ("x" * 300)):
    with pytest.raises(InputError, match=r"is a folder|cannot be written: (Not a|File name)"):
      output.check_file(path)


def test_an_unknown_flag_is_refused(monkeypatch, capsys):
  for flags in (["--no-such-flag"], ["--norm", "batch"]):  # a flag of another experiment
    assert run(monkeypatch, *flags) == 2
    assert flags[0] in capsys.readouterr().err


def test_the_devices_of_the_flag(tiny):
  recipe = tiny.recipe(batch=BatchSizes(8, 16, 8))
  assert cli.devices(None, recipe) == cli.devices(1, recipe) == []
  assert cli.devices(4, recipe) == jax.devices()[:4]
  for num, words in (
    (9, "--devices 9 is more than the 8 available: .* XLA_FLAGS=.*=9"),
    (3, "cannot be split evenly over 3 devices"),
  ):
    with pytest.raises(InputError, match=words):
      cli.devices(num, recipe)


def test_the_command_itself():
  command = [sys.executable, "-m", "experiments.mnist_ssgan", "--steps", "0"]
  result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
  assert (result.returncode, result.stderr) == (2, "error: --steps must be at least 1, not 0\n")


ENDS = [
  (signal.SIGINT, 130, "stopped at once"),
  (signal.SIGTERM, 143, "stopped by SIGTERM"),
  (signal.SIGHUP, 129, "stopped by SIGHUP"),
]


@pytest.fixture
def main_of(monkeypatch, capsys):
  """Runs a function as a command's main, with the default handlers; returns its exit code and output."""

  def run(main):
    monkeypatch.setattr(sys, "argv", ["test"])
    chosen = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    chosen[signal.SIGHUP] = signal.SIG_DFL
    before = {signum: signal.signal(signum, handler) for signum, handler in chosen.items()}
    try:
      with pytest.raises(SystemExit) as stopped:
        program.run(main, mnist_ssgan.Config)
      assert {signum: signal.getsignal(signum) for signum in chosen} == chosen
    finally:
      for signum, handler in before.items():
        signal.signal(signum, handler)
    return stopped.value.code, capsys.readouterr().err

  return run


def in_the_collector(signum):
  """Raises in a callback of the garbage collector: JAX has one that runs throughout a compilation."""

  def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signum)

  gc.callbacks.append(callback)
  gc.collect()


def in_a_weak_reference(signum):
  value = set()
  reference = weakref.ref(value, lambda _: signal.raise_signal(signum))
  del value
  assert reference() is None


@pytest.mark.parametrize(("signum", "code", "said"), ENDS)
@pytest.mark.parametrize("lose", [signal.raise_signal, in_the_collector, in_a_weak_reference])
def test_a_signal_outside_of_training_is_a_sentence(lose, signum, code, said, main_of):
  """Also where Python ignores exceptions and would lose it."""
  before = sys.unraisablehook

  def main(config):
    lose(signum)
    for _ in range(2000):  # Python checks for signals between its own instructions
      time.sleep(0.01)
    return {}

  assert main_of(main) == (code, f"{said}\n")
  assert sys.unraisablehook is before


def test_a_damaged_compile_cache_is_made_again(tmp_path, monkeypatch):
  """JAX detects the damage, but would recompile at every start. One that may only be read stays."""
  options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: jax.config.values[name] for name in options}
  x = np.ones((3, 3), np.float32)

  def compiled():
    assert float(jax.jit(lambda x: (x @ x).sum()).lower(x).compile()(x)) == 27
    (path,) = (tmp_path / "xla").glob("*-cache")
    return path

  try:
    for name, value in zip(options, (str(tmp_path / "xla"), 0), strict=True):
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    path = compiled()
    content = path.read_bytes()
    with warnings.catch_warnings():
      program.replace_damaged(tmp_path / "xla")
      for damaged in (b"", content[:-9], content[:60] + b"XX" + content[62:], bytes(len(content))):
        path.write_bytes(damaged)
        assert len(compiled().read_bytes()) > 100
        assert path.read_bytes() != damaged
      path.write_bytes(b"")
      with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
        assert compiled().read_bytes() == b""
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_too_little_memory_of_the_device_is_a_sentence(main_of):
  code, said = main_of(lambda config: jax.block_until_ready(jnp.zeros(2**46)))
  assert code == 2
  hint = "choose a smaller --batch-size or --image-size, or --stream yes"
  assert said == f"error: the device has too little memory: {hint}\n"


def test_help_names_the_module_that_was_started(monkeypatch, capsys):
  started = importlib.machinery.ModuleSpec("experiments.mnist_ssgan", None)
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", started)
  assert run(monkeypatch, "--help") == 0
  assert capsys.readouterr().out.startswith("usage: python -m experiments.mnist_ssgan [-h]")


def test_a_closed_folder_or_a_full_disk_is_a_sentence(monkeypatch, capsys):
  for number, told in ((errno.EACCES, 2), (errno.ENOSPC, 2), (errno.EBADF, None)):

    def main(config, number=number):
      raise OSError(number, os.strerror(number), "here/x.json")

    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(SystemExit if told else OSError) as stopped:
      program.run(main, mnist_ssgan.Config)
    assert getattr(stopped.value, "code", None) == told
  said = capsys.readouterr().err.splitlines()
  assert said == [
    "error: here/x.json cannot be used: Permission denied",
    "error: here/x.json cannot be used: No space left on device",
  ]


def test_a_reader_who_leaves_early_sees_no_traceback():
  """As with `| head`: for the help, and for output that a command writes in one piece."""
  write = "lambda config: print('x' * 10**6) or {}"
  for main, flags in (("mnist_ssgan.main", "['--help']"), (write, "[]")):
    code = f"from experiments import mnist_ssgan; from gan_jax import program\nmain = {main}\n"
    code += f"program.run(main, mnist_ssgan.Config, flags={flags}, description='x')"
    pipe, root = subprocess.PIPE, Path(cli.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, cwd=root) as process:
      process.stdout.close()
      said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


@pytest.mark.parametrize(
  ("shell", "code", "said"),
  [
    ("> /dev/full", 2, b": No space left on device\n"),
    (">&-", 0, b""),
  ],
)
def test_output_that_cannot_be_written_is_no_traceback(shell, code, said):
  code_of = (
    "from experiments import mnist_ssgan; from gan_jax import program\nmain = lambda c: print(1) or {}\n"
  )
  code_of += "program.run(main, mnist_ssgan.Config, flags=[], description='x')"
  command = f"exec {shlex.join([sys.executable, '-c', code_of])} {shell}"
  root = Path(cli.__file__).parents[1]
  found = subprocess.run(command, shell=True, executable="/bin/sh", stderr=subprocess.PIPE, cwd=root)
  assert (found.returncode, found.stderr.count(b"\n")) == (code, len(said) and 1)
  assert found.stderr.endswith(said)


def test_resume_takes_the_stored_flags_and_refuses_others(tmp_path):
  stored = parsing.with_flags(mnist_ssgan.Config(), labels_per_class=5, workdir="here", overwrite=True)
  output.write_json(tmp_path / "config.json", {"config": parsing.flags_of(stored)})
  config = parsing.resumed(mnist_ssgan.Config, tmp_path, ["--workdir", "here", "--resume"])
  assert (config.labels.labels_per_class, config.run.overwrite) == (5, False)
  parsing.check(config)
  with pytest.raises(InputError, match="started with --labels-per-class 5, not 6"):
    parsing.resumed(
      mnist_ssgan.Config, tmp_path, ["--workdir", "here", "--resume", "--labels-per-class", "6"]
    )
  with pytest.raises(InputError, match="holds no run"):
    parsing.resumed(mnist_ssgan.Config, tmp_path / "nowhere", [])
  with pytest.raises(InputError, match="not the configuration of this experiment"):
    parsing.resumed(mnist_low_data.Config, tmp_path, [])


@pytest.mark.parametrize(
  "wrong", [{"steps": "12"}, {"steps": 1.5}, {"percents": [1, "a"]}, {"augments": 3}]
)
def test_stored_flags_of_another_type_are_a_sentence(wrong, tmp_path):
  stored = parsing.flags_of(mnist_low_data.Config())
  assert wrong.keys() <= stored.keys()
  output.write_json(tmp_path / "config.json", {"config": stored | wrong})
  with pytest.raises(InputError, match="not the configuration of this experiment"):
    parsing.resumed(mnist_low_data.Config, tmp_path, [])


def test_a_resumed_run_knows_its_flags_of_many_values(tmp_path):
  config = mnist_low_data.Config(percents=(5.0, 50.0), augments=("fixed",))
  output.write_json(tmp_path / "config.json", {"config": parsing.flags_of(config)})
  assert parsing.resumed(mnist_low_data.Config, tmp_path, []) == config


def test_what_a_run_starts_from_is_one_of_its_flags(tmp_path):
  stored = parsing.with_flags(mnist_ssgan.Config(), init_from="source", freeze_d=2, workdir="here")
  output.write_json(tmp_path / "config.json", {"config": parsing.flags_of(stored)})
  config = parsing.resumed(mnist_ssgan.Config, tmp_path, ["--workdir", "here", "--resume"])
  parsing.check(config)  # a run that has begun does not need its source
  assert (config.transfer.init_from, config.transfer.freeze_d) == ("source", 2)
  for flag, value in (("--init-from", "elsewhere"), ("--init-parts", "d"), ("--freeze-d", "1")):
    with pytest.raises(InputError, match=f"started with {flag} .*, not {value}"):
      parsing.resumed(mnist_ssgan.Config, tmp_path, ["--resume", flag, value])


def test_the_groups_are_frozen_values():
  groups = [value for value in vars(mnist_ssgan.Config()).values() if dataclasses.is_dataclass(value)]
  assert groups
  assert all(map(hash, groups))


@pytest.mark.parametrize(
  ("given", "num_steps", "expected"), [(None, 10_000, 1000), (None, 1000, 250), (None, 2, 1), (7, 1000, 7)]
)
def test_short_runs_are_saved_before_their_end(given, num_steps, expected):
  assert cli.LoopFlags(checkpoint_every=given).steps_between_checkpoints(num_steps) == expected


def test_tensorboard_is_missed_before_anything_is_trained(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(InputError, match="--tensorboard needs tensorboardX: pip install"):
    parsing.check(mnist_ssgan.Config(loop=cli.LoopFlags(tensorboard=True)))


def test_class_balance_that_cannot_work_is_said(capsys):
  """More classes than unlabelled images a step."""
  y = np.arange(80) % 80
  x = np.zeros((80, 1, 4, 1), np.uint8)
  dataset = Dataset("many", x, y, x[:0], y[:0], tuple(map(str, range(80))))
  split = data.split_labels(y, None, 0)
  recipe = recipes.ssgan.build(recipes.ssgan.Hparams(network="mlp", num_unlabelled=79), (1, 4, 1), 80)
  run: Any = SimpleNamespace(dataset=dataset, path="here")
  classify._announce(run, recipe, split, 0)
  assert "class balance compares 79 unlabelled images a step with 80 classes" in capsys.readouterr().err
  classify._announce(run, dataclasses.replace(recipe, batch=BatchSizes(50, 80, 32)), split, 0)
  assert "class balance" not in capsys.readouterr().err
