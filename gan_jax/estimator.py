"""The semi-supervised GAN as a scikit-learn classifier."""

import functools
import json
import warnings
from numbers import Integral
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, UInt8
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from gan_jax import checkpoint, data, networks, recipes, train
from gan_jax.model import Model
from gan_jax.pictures import Scaling, scaled
from gan_jax.recipes import policies, ssgan


class SemiSupervisedGAN(TransformerMixin, ClassifierMixin, BaseEstimator):
  """A classifier from few labels and many images, see `recipes.ssgan`.

  `X` holds images, `[N, H, W]` or `[N, H, W, C]` with 1 or 3 channels, or vectors `[N, F]`, such as
  embeddings from any pretrained model. `y` is -1 for unlabelled rows, as in scikit-learn's semi-supervised
  classifiers (with string labels, its dtype must be object); labelled images are also used as unlabelled
  ones.

  Training images in bytes are used as they are. Other numbers are scaled to bytes: images by the training
  set's smallest and largest value, vectors as in `pictures.Scaling`. Values outside are clipped, and new
  images or vectors, of any dtype, must be on the same scale.

  Args:
    network: any of `networks.PAIRS`, or `auto`: see `networks.suited`.
    image_shape: height, width and optionally channels of the images in the rows of a flat `X`.
    num_steps: training steps; None: the number tuned for this many images.
    learning_rate: peak learning rate of D; None: the tuned one.
    adversarial: weight of D's adversarial loss; 0 trains without a generator; None: the tuned one.
    consistency: weight of consistency; None: the tuned one.
    vat: weight of virtual adversarial training; 0 for none; None: the tuned one, 1 in place of
      consistency without augmentation, except with mlp.
    augmentation: augmentation of D's inputs: a name in `recipes.policies.POLICIES`, False for none, or True
      for the policy that suits the images, see `recipes.policies.suited`, if the recipe has augmentation.
    random_state: seed of the initial parameters and all other randomness.
    verbose: whether to show the progress of training.

  Attributes:
    classes_: the K classes, `[K]`.
    n_features_in_: size of the second axis of `X`, by scikit-learn's definition.
    n_iter_: number of training steps done.
    model_: a `gan_jax.Model` for the vectors, or for the images as bytes, `[N, H, W, C]`.
  """

  def __init__(
    self,
    *,
    network: networks.Pair | Literal["auto"] = "auto",
    image_shape: tuple[int, ...] | None = None,
    num_steps: int | None = None,
    learning_rate: float | None = None,
    adversarial: float | None = None,
    consistency: float | None = None,
    vat: float | None = None,
    augmentation: bool | policies.Name = True,
    random_state: Any = None,
    verbose: bool = False,
  ):
    self.network = network
    self.image_shape = image_shape
    self.num_steps = num_steps
    self.learning_rate = learning_rate
    self.adversarial = adversarial
    self.consistency = consistency
    self.vat = vat
    self.augmentation = augmentation
    self.random_state = random_state
    self.verbose = verbose

  def fit(self, X: Any, y: Any) -> "SemiSupervisedGAN":
    """Trains on images or vectors, `[N, ...]`, and their classes `[N]`, -1 for unlabelled ones.

    Raises:
      ValueError: there is no label or a single class, -1 is text, a label is None or empty, the images have
        no 1 or 3 channels or a shape that the network does not take, training diverged, or scikit-learn
        refuses the input.
    """
    vars(self).pop("_averages", None)  # a failed fit must not leave the previous model in place
    X, y = validate_data(self, X, y, allow_nd=True, ensure_min_samples=2)
    values = y.tolist()
    if any(isinstance(value, str | bytes) and value in ("-1", b"-1") for value in values):
      raise ValueError(
        "y holds the text -1: to mix names with -1 for no label, pass the number -1 and dtype object"
      )
    for empty in (None, ""):
      if empty in values:
        raise ValueError(f"y holds {empty!r}: mark images without a label by -1")
    labelled = np.array([value != -1 for value in values])
    if not labelled.any():
      raise ValueError("y has no label: every value is -1")
    check_classification_targets(y[labelled].astype(str) if y.dtype == object else y[labelled])
    self.classes_, y_lab = np.unique(y[labelled], return_inverse=True)
    if len(self.classes_) < 2:
      raise ValueError(
        f"y has only one class, {self.classes_.tolist()[0]!r}: -1 is no class but means no label"
      )
    self._learn_scale(X)
    x = self._to_images(X)
    recipe = self._recipe(x, y_lab)
    images = data.DeviceData.from_arrays(x[labelled], y_lab, x)
    seed = check_random_state(self.random_state).randint(2**31)
    fit = train.fit(recipe, images, jax.random.key(seed), verbose=self.verbose)
    if fit.interrupted:
      warnings.warn("training was interrupted: the classifier is only partly trained", stacklevel=2)
    self.n_iter_ = int(fit.state.step)
    self._described = recipes.describe(recipe)
    self._averages = jax.tree.map(np.asarray, checkpoint.averages(fit.state))
    return self

  def predict_proba(self, X: Any) -> Float[np.ndarray, "n k"]:
    """Class probabilities in the order of `classes_`, `[N, K]`."""
    probs = self.model_.predict(self._checked(X)).astype(np.float64)
    return probs / probs.sum(axis=1, keepdims=True)

  def predict(self, X: Any) -> np.ndarray:
    """The most probable classes, `[N]`."""
    probs = self.predict_proba(X)
    return self.classes_[probs.argmax(axis=1)]

  def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
    """Accuracy on the rows that have a label.

    Raises:
      ValueError: no row has one.
    """
    labelled = np.array([value != -1 for value in np.asarray(y).tolist()], bool)
    if not labelled.any():
      raise ValueError("no accuracy without labels: every value of y is -1")
    weight = None if sample_weight is None else np.asarray(sample_weight)[labelled]
    return super().score(_safe_indexing(X, np.flatnonzero(labelled)), np.asarray(y)[labelled], weight)

  def transform(self, X: Any) -> Float[np.ndarray, "n f"]:
    """Features of the discriminator, `[N, F]`."""
    return self.model_.features(self._checked(X))

  def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
    """Generated images or vectors, in the shape and on the scale of `X`, `[n_samples, ...]`."""
    check_is_fitted(self, "_averages")
    seed = check_random_state(random_state).randint(2**31)
    x = self.model_.sample(n_samples, seed=seed).reshape(n_samples, *self._row_shape)
    return (self._low + x * (self._high - self._low)).astype(x.dtype)

  @property
  def model_(self) -> Model:
    check_is_fitted(self, "_averages")
    names = tuple(map(str, self.classes_))
    # Vectors have one low and high each; images are in bytes.
    scaling = Scaling(tuple(self._low), tuple(self._high)) if self._low.ndim else None
    averages = jax.device_put(self._averages)  # once, not for each batch
    return Model(recipes.rebuild(self._described), averages, names, scaling=scaling)

  def __sklearn_tags__(self):
    tags = super().__sklearn_tags__()
    tags.transformer_tags.preserves_dtype = []  # features are float32
    return tags

  def _learn_scale(self, X: np.ndarray) -> None:
    self._row_shape = X.shape[1:]
    if self._of_vectors(X):
      scaling = Scaling.of(X)
      low, high = scaling.low, scaling.high
    elif X.dtype == np.uint8:
      low, high = 0, 255
    else:
      low, high = X.min(), X.max()
    self._low, self._high = np.asarray(low, np.float64), np.asarray(high, np.float64)

  def _of_vectors(self, X: np.ndarray) -> bool:
    return X.ndim == 2 and self.image_shape is None

  def _to_images(self, X: np.ndarray) -> UInt8[np.ndarray, "n h w c"]:
    """Images as bytes; vectors become images of one row."""
    X = scaled(X, self._low, self._high)
    shape = self.image_shape
    if shape is None:
      shape = self._row_shape if X.ndim > 2 else (1, X.shape[1])
    if np.ndim(shape) != 1 or len(shape) not in (2, 3) or np.prod(shape) != np.prod(self._row_shape):
      raise ValueError(f"X of shape {X.shape} does not hold images of shape {shape}")
    if len(shape) == 3 and shape[2] not in (1, 3):
      raise ValueError(f"images of shape {(*shape,)} have no 1 or 3 channels: put the channels last")
    return X.reshape(len(X), *shape, *([1] if len(shape) == 2 else []))

  def _checked(self, X: Any) -> UInt8[np.ndarray, "n h w c"]:
    check_is_fitted(self, "_averages")
    X = validate_data(self, X, allow_nd=True, reset=False)
    if X.shape[1:] != self._row_shape:
      raise ValueError(f"X has rows of shape {X.shape[1:]}, but those in training had {self._row_shape}")
    return self._to_images(X)

  def _recipe(self, x: np.ndarray, y_lab: np.ndarray) -> recipes.Recipe:
    if self.network != "auto" and self.network not in networks.PAIRS:
      raise ValueError(f"unknown network {self.network}: choose from auto, {', '.join(networks.PAIRS)}")
    if self.num_steps is not None and not (isinstance(self.num_steps, Integral) and self.num_steps >= 1):
      raise ValueError(f"num_steps must be a whole number of at least 1, not {self.num_steps}")
    network: Any = None if self.network == "auto" else self.network
    policy: Any = self.augmentation or "none"
    policy = bool(policy) if isinstance(policy, np.bool_) else policy
    if policy is not True and policy not in policies.POLICIES:
      raise ValueError(f"unknown augmentation {policy}: choose from {', '.join(policies.POLICIES)}")
    hparams = ssgan.for_data(
      x,
      y_lab,
      len(self.classes_),
      network=network,
      policy=None if policy is True else policy,
      num_steps=self.num_steps,
      d_learning_rate=self.learning_rate,
      adversarial=self.adversarial,
      consistency=self.consistency,
      vat=self.vat,
    )
    recipe = ssgan.build(hparams, x.shape[1:], len(self.classes_))  # pyright: ignore[reportArgumentType]
    return _shared(json.dumps(recipes.describe(recipe), default=lambda number: number.item()))


@functools.lru_cache(maxsize=16)
def _shared(described: str) -> recipes.Recipe:
  """One recipe for all estimators that are alike, so that those of a cross-validation compile it once."""
  return recipes.rebuild(json.loads(described))
