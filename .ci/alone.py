"""A newcomer's use of the wheel, outside the repository: train, predict, export, load elsewhere."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import gan_jax

assert not Path("experiments").exists()
assert importlib.util.find_spec("experiments") is None


def command(*words: str) -> None:
  """Runs `gan-jax WORDS`, the script that the wheel installs."""
  subprocess.run([Path(sys.executable).with_name("gan-jax"), *words], check=True)


# Pictures: about ten labelled digits per class, the rest unlabelled, and twenty that are never trained on.
digits = load_digits()
for i, (image, k) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
  folder = Path("pictures", str(k) if i < 100 else "unlabelled") if i < 580 else Path("new")
  folder.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / f"{i:03}.png")

command("check", "pictures")
command("train", "--dataset", "folder:pictures", "--steps", "40", "--folds", "2", "--workdir", "run")
result = json.loads(Path("run/result.json").read_text())
assert result["num_labels"] == 100, result
assert result["test_error"] < 60, result["test_error"]
assert "<!doctype html>" in Path("run/report.html").read_text()

command("predict", "run", "new", "--out", "new.csv")
with open("new.csv", newline="") as file:
  rows = list(csv.DictReader(file))
right = np.mean([int(row["label"]) == digits.target[int(row["file_name"][:3])] for row in rows])
assert len(rows) == 20
assert right > 0.5, right
command("sample", "run", "--num", "9", "--out", "samples.png")

before = gan_jax.load("run").predict(digits.images[580:600] / 16)
command("export", "run", "--out", "exported")
shutil.rmtree("run")
np.testing.assert_array_equal(gan_jax.load("exported").predict(digits.images[580:600] / 16), before)
print(f"the wheel alone: {result['test_error']:.2f} % error, {100 * right:.0f} % of new pictures right")
