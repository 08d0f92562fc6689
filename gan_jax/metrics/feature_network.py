"""The network of the feature extractor: a small classifier whose last hidden layer gives the features.

It is not a discriminator: the networks of the experiments may change and this one must not, because
distances are comparable only between equal features. Training is deterministic on one machine, but another
number of threads sums in another order and rounds differently. That is why the trained weights are stored
and hashed, not only the recipe.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, UInt8

from gan_jax import augment, data, kernels, losses, networks, steps
from gan_jax.dataset import Dataset
from gan_jax.types import NetState, Params

RECIPE = 1
"""Version of the network and its training: a change to either needs a new number."""

NUM_FEATURES = 128

_AUGMENT = augment.affine(shift=0.05, rotate=10, scale=0.1, shear=0.1)
_BATCH_SIZE = 128
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_EMA_DECAY = 0.998


class FeatureNetwork(nn.Module):
  """A small convolutional classifier for images of at least 8x8, with 128 features.

  A 5x5 convolution of stride 2, or a 3x3 one of stride 1 for images below 16x16, then convolutions of
  stride 2, each followed by a residual one, until the shorter side is at most 4. A dense layer gives the
  features.
  Layer normalisation, no batch statistics: the features of an image depend on that image alone.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b k"], Float[Array, "b f"]]:
    networks.check_image_shape(x.shape[1:])

    def block(layer: nn.Module, h: Array) -> Array:
      return nn.leaky_relu(nn.LayerNorm()(layer(h)), 0.1)

    conv = partial(nn.Conv, use_bias=False, conv_general_dilated=kernels.conv)
    small = min(x.shape[1:3]) < 16
    h = block(conv(32, (3, 3), 1) if small else conv(32, (5, 5), 2), 2 * x - 1)
    while min(h.shape[1:3]) > 4:
      h = block(conv(64, (3, 3), 2), h)
      h = h + block(conv(64, (3, 3)), h)
    features = block(nn.Dense(NUM_FEATURES, use_bias=False), h.reshape(len(h), -1))
    return nn.Dense(self.num_classes)(features), features


def default_steps(num_images: int) -> int:
  """Steps for a training set of this size: 5,000 for MNIST's 60,000 images, never below 1,000."""
  return min(5000, max(1000, num_images // 12))


def train(dataset: Dataset, *, seed: int = 0, num_steps: int | None = None) -> Params:
  """Trains on all labels of the training set and returns the averaged weights after the last update.

  Cross-entropy under mild affine augmentation, AdamW with warm-up and cosine decay. The test set is
  not used. Deterministic for one machine and number of threads.

  Args:
    dataset: a dataset with images of at least 8x8.
    seed: seed of the initial weights, the batches and the augmentation.
    num_steps: steps of 128 images (default: `default_steps`).
  """
  num_steps = num_steps or default_steps(len(dataset.x_train))
  known = dataset.y_train >= 0
  x, y = jnp.asarray(dataset.x_train[known]), jnp.asarray(dataset.y_train[known], jnp.int32)
  return _fit(FeatureNetwork(dataset.num_classes), jnp.asarray(num_steps), jax.random.key(seed), x, y)


@partial(jax.jit, static_argnums=0)
def _fit(
  network: FeatureNetwork, num_steps: Array, key: Array, x: UInt8[Array, "n h w c"], y: Int[Array, "n"]
) -> Params:
  key_init, key = jax.random.split(key)
  params = network.init(key_init, data.to_float(x[:1]))["params"]

  def schedule(t: ArrayLike) -> Array:  # optax's own need a length known at trace time
    done = t / num_steps
    return _LEARNING_RATE * jnp.minimum(1, 20 * done) * (1 + jnp.cos(jnp.pi * done)) / 2

  tx = optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)

  def update(t: Array, carry: tuple[NetState, Params]) -> tuple[NetState, Params]:
    net, ema = carry
    key_rows, key_augment = jax.random.split(jax.random.fold_in(key, t))
    rows = jax.random.randint(key_rows, (_BATCH_SIZE,), 0, len(y))
    x_seen = _AUGMENT(key_augment, data.to_float(x[rows]))

    def loss_fn(params: Params) -> tuple[Array, tuple[dict, PyTree]]:
      logits, _ = network.apply({"params": params}, x_seen)  # pyright: ignore
      return losses.cross_entropy(logits, y[rows]).mean(), ({}, {})

    net, _ = steps.optimizer_step(tx, net, loss_fn)
    decay = jnp.minimum(_EMA_DECAY, (1 + t) / (10 + t))
    return net, optax.incremental_update(net.params, ema, 1 - decay)

  start = (NetState(params, {}, tx.init(params)), params)
  return jax.lax.fori_loop(0, num_steps, update, start)[1]
