"""Distance of generated images to real ones, in the feature space of a frozen network."""

import numpy as np
from jaxtyping import Float

from gan_jax import data
from gan_jax.dataset import Dataset
from gan_jax.metrics import frechet
from gan_jax.metrics.feature_extractor import FeatureExtractor
from gan_jax.types import InputError, Json


def generator_quality(
  extractor: FeatureExtractor,
  x: Float[np.ndarray, "n h w c"],
  training: frechet.Moments | None = None,
) -> Json:
  """Frechet distances to real images, and the classes of the generated ones.

  Images are rounded to bytes first, as real images are stored and generated ones are saved: the score must
  not depend on details that a file would not hold, nor change when images are saved.

  Args:
    extractor: from `load_feature_extractor`.
    x: images in [0, 1], `[N, H, W, C]`, N at least 256.
    training: from `training_moments`, of N images too: distances depend on the number.

  Returns:
    A flat dictionary:
      `frechet`: Fréchet distance of the features to those of the test images. It is not the FID, which is
        computed on Inception features.
      `frechet_<name of the extractor>_n<N>`: the same; numbers of another name are not comparable.
      `frechet_to_training_set`: with `training`, the distance to the training images, for choosing
        hyper-parameters, which the test images must not do.
      `frechet_replayed_training_set`: with `training`, the distance of the training images to the test
        images: what a generator that replays them would score.
      `class_shares`: share of the images in each class, according to the extractor.
      `class_entropy`: entropy of these shares in nats; ln K if all K classes are equally frequent.
      `classes_covered`: number of classes with at least a tenth of the share 1/K.

  Raises:
    InputError: too few images, a wrong shape, values outside [0, 1], or moments of another number.

  References:
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500 (the distance, on Inception features).
  """
  import scipy.special  # late: it takes 0.2 s

  frechet.check_num_images(len(x), len(extractor.test.mean))
  if not (x.min() >= 0 and x.max() <= 1):  # written so that NaN is rejected
    raise InputError("generated images must be finite and in [0, 1]")
  if training is not None and training.n != len(x):
    raise InputError(
      f"distances over {len(x)} and {training.n} images are not comparable: use equal numbers"
    )
  logits, features = extractor.predict(data.to_bytes(x))
  generated = frechet.moments(features)
  distance = frechet.frechet_distance(generated, extractor.test)
  quality = {extractor.metric(len(x)): distance, "frechet": distance}
  if training is not None:
    quality["frechet_to_training_set"] = frechet.frechet_distance(generated, training)
    quality["frechet_replayed_training_set"] = frechet.frechet_distance(training, extractor.test)
  counts = np.bincount(logits.argmax(axis=-1), minlength=extractor.num_classes)
  shares = counts / len(x)
  return quality | {
    "class_shares": shares.tolist(),
    "class_entropy": float(scipy.special.entr(shares).sum()),
    "classes_covered": int((shares >= 0.1 / extractor.num_classes).sum()),
  }


def training_moments(extractor: FeatureExtractor, dataset: Dataset, num: int) -> frechet.Moments:
  """The moments of `num` random training images of the whole dataset, each taken once.

  Raises:
    InputError: fewer than `num` training images, or too few for a distance.
  """
  if num > len(dataset.x_train):
    raise InputError(f"{dataset.name} has {len(dataset.x_train)} training images, fewer than {num}")
  rows = np.random.default_rng(0).choice(len(dataset.x_train), num, replace=False)
  return frechet.moments(extractor.predict(dataset.x_train[rows])[1])
