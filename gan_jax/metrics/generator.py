"""Distance of generated images to real ones, in the feature space of a frozen network."""

import numpy as np
import scipy.special
from jaxtyping import Float

from gan_jax import data
from gan_jax.dataset import Dataset
from gan_jax.metrics import frechet
from gan_jax.metrics.feature_extractor import FeatureExtractor
from gan_jax.types import InputError, Json


def generator_quality(extractor: FeatureExtractor, x: Float[np.ndarray, "n h w c"]) -> Json:
  """Frechet distance to the test images, and the classes of the generated ones.

  Images are rounded to bytes first, as real images are stored and generated ones are saved: the score must
  not depend on details that a file would not hold, nor change when images are saved.

  Args:
    extractor: from `load_feature_extractor`.
    x: images in [0, 1], `[N, H, W, C]`, N at least 256.

  Returns:
    A flat dictionary:
      `frechet`: Fréchet distance of the features to those of the test images. It is not the FID, which is
        computed on Inception features.
      `frechet_<name of the extractor>_n<N>`: the same; numbers of another name are not comparable.
      `class_shares`: share of the images in each class, according to the extractor.
      `class_entropy`: entropy of these shares in nats; ln K if all K classes are equally frequent.
      `classes_covered`: number of classes with at least a tenth of the share 1/K.

  Raises:
    InputError: too few images, a wrong shape, or values outside [0, 1].

  References:
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500 (the distance, on Inception features).
  """
  frechet.check_num_images(len(x), len(extractor.test.mean))
  if not (x.min() >= 0 and x.max() <= 1):  # written so that NaN is rejected
    raise InputError("generated images must be finite and in [0, 1]")
  logits, features = extractor.predict(data.to_bytes(x))
  counts = np.bincount(logits.argmax(axis=-1), minlength=extractor.num_classes)
  shares = counts / len(x)
  distance = frechet.frechet_distance(frechet.moments(features), extractor.test)
  return {
    extractor.metric(len(x)): distance,
    "frechet": distance,
    "class_shares": shares.tolist(),
    "class_entropy": float(scipy.special.entr(shares).sum()),
    "classes_covered": int((shares >= 0.1 / extractor.num_classes).sum()),
  }


def replay_quality(extractor: FeatureExtractor, dataset: Dataset, num: int) -> Json:
  """`generator_quality` of a generator that replays the training set: `num` random images, each once.

  A reference for other generators: the score of `num` real images. The score is no merit, because replayed
  images are not new.

  Raises:
    InputError: fewer than `num` training images.
  """
  if num > len(dataset.x_train):
    raise InputError(f"{dataset.name} has {len(dataset.x_train)} training images, fewer than {num}")
  rows = np.random.default_rng(0).choice(len(dataset.x_train), num, replace=False)
  return generator_quality(extractor, dataset.x_train[rows] / np.float32(255))
