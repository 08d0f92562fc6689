"""Trains the digits for 20 steps with what the wheel installs, and nothing of the repository."""

import dataclasses
import importlib.util
from pathlib import Path

import jax

from gan_jax import data, datasets, evaluate, recipes, train

assert not Path("experiments").exists()
assert importlib.util.find_spec("experiments") is None

digits = datasets.load("digits")
split = data.split_labels(digits.y_train, 5, seed=0)
images = data.to_device(digits, split)
hparams = dataclasses.replace(recipes.ssgan.tuned("conv", len(digits.x_train)), num_steps=20)
recipe = recipes.ssgan.build(hparams, digits.image_shape, digits.num_classes)
fit = train.fit(recipe, images, jax.random.key(0))
labelled = [(images.x_lab, images.y_lab)]
(found,) = evaluate.make_evaluate(recipe)(digits, [fit.state], labelled)
assert int(fit.state.step) == 20
assert not Path("metrics.jsonl").exists()
assert found.error < 60, found.error
print(f"the wheel alone, 20 steps on the digits: {found.error:.2f} % test error")
