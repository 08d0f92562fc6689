import json
from pathlib import Path

import pytest

from experiments import mnist_ssgan

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


def test_every_experiment_has_a_docstring_with_its_command():
  for path in Path(mnist_ssgan.__file__).parent.glob("[!_]*.py"):
    text = path.read_text()
    assert f"python -m experiments.{path.stem}" in text.split('"""')[1], path.name
