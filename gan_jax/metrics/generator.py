"""How close generated images come to real ones, by the features of a frozen network."""

import numpy as np
from jaxtyping import Float

from gan_jax import data
from gan_jax.dataset import Dataset
from gan_jax.metrics import frechet
from gan_jax.metrics.feature_extractor import FeatureExtractor
from gan_jax.types import InputError, Json


def generator_quality(extractor: FeatureExtractor, x: Float[np.ndarray, "n h w c"]) -> Json:
  """Frechet distance to the test images, and the classes of the generated ones.

  The images are rounded to bytes first. Real images are stored so, and so are generated ones once they
  are saved: the measure must neither see what a file would not hold, nor change by saving.

  Args:
    extractor: from `load_feature_extractor`.
    x: images in [0, 1], `[N, H, W, C]`, N at least 256.

  Returns:
    A flat dictionary:
      `frechet_<name of the extractor>_n<N>`: Fréchet distance of the features to those of the test
        images. It is not the FID, which is computed on Inception features, and no number with another
        name compares with it.
      `class_shares`: share of the images in each class, by the extractor.
      `class_entropy`: entropy of these shares in nats; ln K where all K classes are equally frequent.
      `classes_covered`: how many classes have at least a tenth of the share 1/K.

  Raises:
    InputError: too few images, another shape, values outside [0, 1].

  References:
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500 (the distance, on Inception features).
  """
  frechet.check_num_images(len(x), len(extractor.test.mean))
  if not (x.min() >= 0 and x.max() <= 1):  # written such that NaN is refused
    raise InputError("generated images must be finite and in [0, 1]")
  logits, features = extractor.predict(data.to_bytes(x))
  counts = np.bincount(logits.argmax(axis=-1), minlength=extractor.num_classes)
  shares = counts / len(x)
  seen = shares[shares > 0]
  return {
    f"frechet_{extractor.name}_n{len(x)}": frechet.frechet_distance(
      frechet.moments(features), extractor.test
    ),
    "class_shares": shares.tolist(),
    "class_entropy": float((seen * np.log(1 / seen)).sum()),
    "classes_covered": int((shares >= 0.1 / extractor.num_classes).sum()),
  }


def replay_quality(extractor: FeatureExtractor, dataset: Dataset, num: int, *, seed: int = 0) -> Json:
  """The same for a generator that replays the training set: `num` random images of it, each once.

  The reference for the other rows: the score of `num` real images. It is no merit, because a replayed
  image is not a new one.

  Raises:
    InputError: fewer than `num` training images.
  """
  if num > len(dataset.x_train):
    raise InputError(f"{dataset.name} has {len(dataset.x_train)} training images, fewer than {num}")
  rows = np.random.default_rng(seed).choice(len(dataset.x_train), num, replace=False)
  return generator_quality(extractor, dataset.x_train[rows] / np.float32(255))
