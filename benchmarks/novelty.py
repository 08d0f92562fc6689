"""Can the discriminator detect out-of-distribution (OOD) images? AUROC against the test images.

python -m benchmarks.novelty --foreign folder:sign_digits mnist --name foreign -- --steps 800

Methods of the study with 50 labels of the digits, all of them in every step. Two scores should be higher
for test images than for OOD images: the real logit, `logsumexp(l)`, and the highest class probability.
OOD images (`--foreign`) are the test images of other datasets, in grey and resized to the digits, and
noise: every pixel comes from another test image, so that single pixels carry no information. One line per
method and split.

Everything after the bare `--` is passed to the study.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import _runs
from experiments import label_study
from gan_jax import cli, data, evaluate, losses, metrics, parsing, pictures, provenance, steps, train

METHODS = (
  "supervised_augmented",
  "fixmatch_ema",
  "adamatch",
  "vat",
  "feature_matching",
  "gan_consistency",
  "gan_vat",
  "gan_undecided",
  "bad_generator",
)
SCORES = ("real_logit", "confidence")


def main() -> None:
  parser = _runs.parser(__doc__, "novelty")
  parser.add_argument("--foreign", nargs="*", default=["mnist"], help="datasets, see --dataset (mnist)")
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of the study")
  parser.add_argument("--splits", type=int, nargs="+", default=[20, 21, 22, 23, 24], help="split seeds")
  parser.add_argument("--data-dir", help="where tfds keeps its datasets")
  parser.add_argument("--manual-dir", help="a folder with MNIST's original files")
  _runs.add_run_flags(parser)
  args = parser.parse_args()
  config = parsing.parse(label_study.Config, ["--dataset", "digits", *args.flags])
  default, unused = label_study.Config(), ("budgets", "splits", "methods", "tune")
  if any(getattr(config, name) != getattr(default, name) for name in unused):
    parser.error("the study's budgets, splits and methods do not apply here: name them before the bare --")
  digits = cli.load(config.data)
  test = evaluate.with_test_set(digits)
  rng = np.random.default_rng(0)
  short = [name.rpartition(":")[2].rstrip("/").rpartition("/")[2] for name in args.foreign]
  if len({*short, "noise"}) <= len(short):
    parser.error("--foreign: two datasets have the same last part of their paths, by which they are listed")
  foreign = {
    name: foreign_images(path, digits.image_shape, args)
    for name, path in zip(short, args.foreign, strict=True)
  }
  foreign["noise"] = rng.permuted(test.x_test, axis=0)
  results = []
  for method in args.methods:
    recipe = label_study.make_recipe(config, digits, method)
    classify = jax.jit(steps.make_classifier(recipe.d))
    for seed in args.splits:
      split = data.split_labels(digits.y_train, 5, seed)
      images = data.to_device(digits, split)
      key = jax.random.fold_in(jax.random.key(config.train.seed), seed)
      state = train.fit(recipe, images, key, verbose=False).state
      read = partial(metrics.predict, partial(classify, state))
      own, _ = read(test.x_test)
      rows = {name: areas(own, read(x)[0]) for name, x in foreign.items()}
      results.append(
        {
          "dataset": digits.name,
          "num_labels": len(split.indices),
          "flags": parsing.flags_of_recipe(config),
          "method": method,
          "split_seed": seed,
          "label_split_sha256": split.sha256,
          "steps": recipe.num_steps,
          "test_error": metrics.error_percent(own, test.y_test),
          "auroc": rows,
          **provenance.environment(),
        }
      )
      print(method, seed, results[-1]["test_error"], rows, flush=True)
  _runs.finish(args.name, results, table)


def areas(own: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
  """The area under the ROC curve of each score, in [0, 1], from the logits of test and OOD images."""
  own_or_foreign = np.repeat([1, 0], [len(own), len(foreign)])
  scores = {
    "real_logit": lambda logits: np.asarray(losses.real_logit(logits)),
    "confidence": lambda logits: np.asarray(losses.class_probs(logits)).max(axis=-1),
  }
  logits = np.concatenate([own, foreign])
  return {name: float(roc_auc_score(own_or_foreign, score(logits))) for name, score in scores.items()}


def foreign_images(name: str, image_shape: tuple[int, int, int], args) -> np.ndarray:
  """Test images of another dataset, or its training images if it has none: grey, resized to ours."""
  height, width, _ = image_shape
  flags = cli.DataFlags(dataset=name, data_dir=args.data_dir, manual_dir=args.manual_dir)
  if name.startswith("folder:"):
    flags = dataclasses.replace(flags, image_size=height)
  dataset = evaluate.with_test_set(cli.load(flags, needs_test=False))
  x = dataset.x_test if len(dataset.x_test) else dataset.x_train
  grey = [np.asarray(Image.fromarray(each.squeeze()).convert("L")) for each in x]
  return np.stack([pictures.resize(Image.fromarray(each), (height, width), "crop") for each in grey])[
    ..., None
  ]


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per method, with means over splits; two columns per kind of OOD images."""
  kinds, rows = list(results[0]["auroc"]), []
  for method in dict.fromkeys(result["method"] for result in results):
    found = [result for result in results if result["method"] == method]
    means = [
      _runs.mean_std([each["auroc"][kind][score] for each in found]) for kind in kinds for score in SCORES
    ]
    rows.append([method, _runs.mean_std([each["test_error"] for each in found]), *means])
  header = ["method", "test error, %", *(f"{kind}: {score}" for kind in kinds for score in SCORES)]
  return _runs.with_environment(_runs.markdown(header, rows), results)


if __name__ == "__main__":
  _runs.cli(main)
