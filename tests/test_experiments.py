import json
from pathlib import Path

import pytest

from experiments import mnist_conditional, mnist_gan, mnist_low_data, mnist_ssgan, transfer

CONTRACT = {
  *("experiment", "dataset", "num_labels", "label_split_sha256", "seed", "steps", "seconds_train"),
  *("seconds_total", "device", "versions", "commit"),
  *("test_error", "supervised_test_error", "probe_test_error"),
}


@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_mnist_ssgan_takes_two_steps(network, tmp_path):
  config = mnist_ssgan.Config(
    dataset="digits", network=network, steps=2, labels_per_class=5, workdir=str(tmp_path / "run")
  )
  result = mnist_ssgan.main(config)
  assert result.keys() >= CONTRACT
  assert result == json.loads((tmp_path / "run" / "result.json").read_text())
  assert (result["num_labels"], result["steps"], result["interrupted"]) == (50, 2, False)
  for name in ("test_error", "supervised_test_error", "probe_test_error"):
    assert 0 <= result[name] <= 100
  files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
  wanted = {
    *("config.json", "labels.json", "metrics.jsonl", "result.json", "report.html"),
    *("samples/last.png", "learning_curves.png", "confusion.png"),
  }
  assert wanted <= files
  assert any(name.startswith("checkpoints/2/") for name in files)


@pytest.fixture
def quick_judge(monkeypatch, tmp_path):
  """A feature_extractor of digits that has hardly been trained, kept in the test's own folder."""
  monkeypatch.setattr("gan_jax.metrics.feature_network.default_steps", lambda num_images: 2)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def two_steps(module, tmp_path, **flags) -> dict:
  shared = {"dataset": "digits", "steps": 2, "workdir": str(tmp_path / "run")}
  result = module.main(module.Config(**shared | flags))
  assert result.keys() >= CONTRACT
  assert result == json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["experiment"] == module.__name__.rpartition(".")[2]
  assert (tmp_path / "run" / "report.html").exists()
  return result


GENERATOR = {"frechet", "frechet_replayed_training_set", "classes_covered", "class_entropy", "alarms"}


def test_mnist_gan_takes_two_steps(tmp_path, quick_judge):
  result = two_steps(mnist_gan, tmp_path, rotation=1.0, num_scored=300)
  assert result.keys() >= GENERATOR
  assert any(name.startswith("frechet_digits-") and name.endswith("_n300") for name in result)
  (row, *_) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert row.keys() >= {"d/r1", "d/rotation", "g/rotation", "diagnostics/real_logit_gap", "diagnostics/share_9"}


@pytest.mark.parametrize("labels_per_class", [None, 5])
def test_mnist_conditional_takes_two_steps(labels_per_class, tmp_path, quick_judge):
  flags = {"network": "mlp", "labels_per_class": labels_per_class, "num_scored": 300}
  result = two_steps(mnist_conditional, tmp_path, **flags)
  assert result.keys() >= {*GENERATOR, "class_agreement"}
  assert result["num_labels"] == (1139 if labels_per_class is None else 50)
  assert (tmp_path / "run" / "confusion.png").exists()


def test_mnist_low_data_takes_two_steps(tmp_path, quick_judge):
  flags = {"network": "mlp", "percents": (50.0,), "augments": ("fixed", "adaptive"), "num_scored": 300}
  result = two_steps(mnist_low_data, tmp_path, **flags)
  assert list(result["cells"]) == ["50-percent-fixed", "50-percent-adaptive"]
  assert {cell["num_images"] for cell in result["cells"].values()} == {570}


def test_transfer_takes_two_steps_and_resumes(tmp_path, quick_judge, capsys):
  flags = {"source": "digits", "pretrain_steps": 2, "splits": 1, "image_size": 8, "freeze_d": 1}
  result = two_steps(transfer, tmp_path, **flags)
  assert "D's head is new: 10 classes here, 1 there" in capsys.readouterr().err
  assert len(result["fine_tuned_test_errors"]) == len(result["scratch_test_errors"]) == 1
  lines = (tmp_path / "run" / "split-0" / "metrics.jsonl").read_text().splitlines()
  terms = {key for line in lines for key in json.loads(line)}
  assert "d/supervised" in terms
  assert not terms & {"d/adversarial", "d/consistency", "d/class_balance"}  # labels alone, as its control has
  before = (tmp_path / "run" / "split-0" / "result.json").stat().st_mtime_ns
  again = two_steps(transfer, tmp_path, **flags, resume=True)
  assert again["fine_tuned_test_errors"] == result["fine_tuned_test_errors"]
  assert (tmp_path / "run" / "split-0" / "result.json").stat().st_mtime_ns == before


def test_every_experiment_has_a_docstring_with_its_command():
  for path in Path(mnist_ssgan.__file__).parent.glob("[!_]*.py"):
    text = path.read_text()
    assert f"python -m experiments.{path.stem}" in text.split('"""')[1], path.name
