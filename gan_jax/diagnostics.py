"""Diagnostics for discriminator overfitting and mode collapse, and alarms derived from them."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, UInt8

from gan_jax import data, losses
from gan_jax.types import ClassLatents, Discriminator, Generator, InputError, Json, Metrics, TrainState

Classify = Callable[[Float[Array, "b h w c"]], Float[Array, "b k"]]
"""Images in [0, 1], `[B, H, W, C]`, to class logits `[B, K]`."""
Diagnose = Callable[[TrainState, data.DeviceData], Metrics]

MOST_CLASSES = data.NUM_SPACED // 10
"""Most classes with logged shares: with fewer than ten images per class, one may have none by chance."""

WARM_UP = 0.1
"""Fraction of the steps in which no alarm is raised: early networks are unbalanced and recover."""
NUM_OBSERVATIONS = 5
"""Number of latest observations whose median is used; fewer than 3 raise no alarm."""
MEMORISED = 0.5
"""r_v, halfway between 0, no overfitting, and 1, complete overfitting."""
MEMORISED_ACCURACY = 80.0
"""Percent. ADA's target for its overfitting signal, `E[sign D(train)] = 0.6`, is 80 % right, 20 % wrong."""
MISSING = 0.1
"""Share of a class relative to its frequency. The rarest of 10 classes had 0.2 or more in healthy runs."""
IDENTICAL = 0.2
"""Of `diagnostics/variance_ratio`, which is 1 if samples vary like the data; healthy runs: 0.8 and 1.0."""
MIN_ROWS = 8
"""Rows without change before a loss counts as stuck; a quarter of all rows if that is more."""
STUCK = 1e-4
"""Relative range of a stuck loss. Batch noise alone moved it by 0.06 or more in healthy runs on MNIST."""
SATURATED_ACCURACY = 99.5
"""Percent of training and of generated images that D classifies correctly once it has saturated."""
SATURATED_LOSS = 0.01
"""D's loss at a confidence of 99 %; healthy runs on MNIST and the digits stayed above 0.08."""


def check(images: data.DeviceData, *, by_class: bool) -> None:
  """Raises `InputError` if there are too few images for `make_diagnostics`."""
  num = len(_training_images(images, by_class))
  if num < 2:
    raise InputError(f"diagnostics need at least 2 training images to compare with, not {num}")


def _training_images(images: data.DeviceData, by_class: bool) -> UInt8[Array, "n h w c"]:
  return images.x_lab if by_class else images.x_unl


def make_diagnostics(
  g: Generator,
  d: Discriminator,
  *,
  classify: Classify | None = None,
  by_class: bool = False,
  boundary: float | None = 0.0,
) -> Diagnose:
  """Builds `diagnose(state, data) -> metrics`: pure, for jit, called from time to time.

  With `r` the mean real logit of D on up to 500 training images, up to 500 held-out ones, and as many
  generated ones as training images:

      diagnostics/real_logit_train, _held_out, _fake    r, for each kind of image
      diagnostics/real_logit_gap     r(train) - r(held out)
      diagnostics/memorisation       r_v = (r(train) - r(held out)) / (r(train) - r(fake)). Near 0, D treats
                                     unseen images like training images; near 1, like generated ones. 0 if
                                     D does not rank training images above generated ones
      diagnostics/train_accuracy, fake_accuracy    percent that D classifies as real, and as generated
      diagnostics/variance_ratio     variance over the generated images, averaged over pixels, relative to
                                     that of the training images: 0 if all samples are the same
      diagnostics/class_entropy      entropy of the classes of the generated images, in nats, at most log K
      diagnostics/share_0 .. K-1     share of each class among them, for at most 50 classes: with more,
                                     some are missing from 500 images by chance

  The paper evaluates D only on augmented images; here, no image is augmented.

  Args:
    g: the generator. Images come from its averaged parameters.
    d: the discriminator. Its current parameters are used, because G learns from these.
    classify: class logits of generated images; by default D's own K logits. Without classes (K = 1) the
      last two kinds of metric are omitted.
    by_class: whether D judges every image by its class, as in class-conditional training on all labels:
      r is then the logit of the class, `l_y`, if all held-out images have one, else `logsumexp(l)`.
    boundary: real logit above which D takes an image for real; None omits both accuracies.

  Returns:
    `diagnose`, which uses the same latents in every call. `data` should hold at least ten training images
    per class; without held-out images the metrics that need them are omitted. Metrics are float32 scalars.
    See `check` for the number of images that it needs.

  References:
    Karras et al., 2020, https://arxiv.org/abs/2006.06676, equation 1 (r_v).
  """

  def diagnose(state: TrainState, images: data.DeviceData) -> Metrics:
    x_held_out = data.to_float(data.evenly_spaced(images.x_held_out))
    x_train = data.to_float(data.evenly_spaced(_training_images(images, by_class)))
    num = len(x_train)
    # No step has this number, so training never uses these latents.
    latents = g.latents(jax.random.fold_in(state.key, 2**32 - 1), num)
    x_fake = g.apply(state.averaged("g"), latents, train=False)
    x = jnp.concatenate([x_train, x_held_out, x_fake])
    y = jnp.full(len(x), -1)
    if by_class and isinstance(latents, ClassLatents):
      real = (data.evenly_spaced(known) for known in (images.y_lab, images.y_held_out))
      y = jnp.concatenate([*real, latents.y])
      y = jnp.where((images.y_held_out < 0).any(), -1, y)  # all by the same logit, or the gap is a bias
    logits = d.apply({"params": state.d.params, **state.d.model_state}, x, train=False)[0]
    ends = [num, num + len(x_held_out)]
    train, held_out, fake = jnp.split(losses.known_real_logit(logits, y), ends)
    r_train, r_fake = train.mean(), fake.mean()
    metrics = {
      "real_logit_train": r_train,
      "real_logit_fake": r_fake,
      "variance_ratio": x_fake.var(axis=0).mean() / jnp.maximum(x_train.var(axis=0).mean(), 1e-12),
    }
    if boundary is not None:
      metrics["train_accuracy"] = 100 * (train > boundary).mean()
      metrics["fake_accuracy"] = 100 * (fake < boundary).mean()
    if len(x_held_out):
      gap, whole = r_train - held_out.mean(), r_train - r_fake
      metrics["real_logit_held_out"] = held_out.mean()
      metrics["real_logit_gap"] = gap
      metrics["memorisation"] = jnp.where(whole > 1e-6, gap / jnp.maximum(whole, 1e-6), 0.0)
    class_logits = classify(x_fake) if classify else logits[ends[1] :]
    num_classes = class_logits.shape[-1]
    if num_classes > 1:
      shares = jax.nn.one_hot(class_logits.argmax(axis=-1), num_classes).mean(axis=0)
      metrics["class_entropy"] = entr(shares).sum()
      if num_classes <= MOST_CLASSES:
        metrics |= {f"share_{k}": shares[k] for k in range(num_classes)}
    return {f"diagnostics/{name}": value.astype(jnp.float32) for name, value in metrics.items()}

  return diagnose


def alarms(
  rows: Sequence[Json],
  *,
  num_steps: int,
  class_names: Sequence[str] = (),
  class_prior: Sequence[float] | None = None,
) -> dict[str, str]:
  """Current problems: kind -> one sentence with the problem, the evidence, and what to try.

  Only the latest part of training counts, so problems that it recovered from are dropped; the first tenth
  never counts. No alarm means that none of these problems was seen, not that the samples are good.

  Args:
    rows: the rows of one phase in `metrics.jsonl`, oldest first: `step`, `d/loss`, `g/loss` if G is
      trained, and in some of them the metrics of `make_diagnostics`.
    num_steps: steps of the whole phase, including those to come.
    class_names: names of the K classes; class numbers are used if there are none.
    class_prior: frequencies of the K classes in the data; None: equal. A class below 2 % cannot be missed.
  """
  rows = [row for row in rows if row["step"] > WARM_UP * num_steps]
  stuck = {name: text for name in ("d/loss", "g/loss") if (text := _stuck(rows, name))}
  seen = [row for row in rows if "diagnostics/variance_ratio" in row][-NUM_OBSERVATIONS:]
  if len(seen) < 3:
    return stuck
  d_loss = [row["d/loss"] for row in rows if "d/loss" in row][-NUM_OBSERVATIONS:]
  found = {
    "memorisation": _memorises(seen),
    "lost classes": _lost_classes(seen, class_names, class_prior),
    "same image": _same_image(seen),
    "saturated": _saturated(seen, d_loss, g_is_stuck="g/loss" in stuck),
  }
  found = {kind: text for kind, text in found.items() if text}
  return found if "saturated" in found else found | stuck


def _median(seen: Sequence[Json], name: str) -> float:
  return float(np.median([row.get(f"diagnostics/{name}", np.nan) for row in seen]))


def _memorises(seen: Sequence[Json]) -> str | None:
  r_v, train_accuracy = _median(seen, "memorisation"), _median(seen, "train_accuracy")
  # A D that calls everything real makes the denominator of r_v small, so r_v may be large by chance.
  knows_fakes = _median(seen, "fake_accuracy") > 50
  if not (r_v > MEMORISED and train_accuracy > MEMORISED_ACCURACY and knows_fakes):
    return None
  return (
    f"the discriminator memorises its training images: it classifies {train_accuracy:.0f} % of them"
    f" as real, and places unseen images {100 * r_v:.0f} % of the way from them to generated ones; try"
    " stronger or adaptive augmentation, more images, a gradient penalty, or fewer steps"
  )


def _lost_classes(
  seen: Sequence[Json], class_names: Sequence[str], class_prior: Sequence[float] | None
) -> str | None:
  num_classes = sum(name.startswith("diagnostics/share_") for name in seen[-1])
  shares = [_median(seen, f"share_{k}") for k in range(num_classes)]
  expected = class_prior or [1 / num_classes for _ in shares]
  missing = [
    k
    for k, share in enumerate(shares)
    if share < MISSING * expected[k]
    and expected[k] * MOST_CLASSES > 0.999  # rarer ones are absent by chance
  ]
  if not missing:
    return None
  names = [class_names[k] if class_names else str(k) for k in missing]
  listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
  what = f"has lost {len(names)} of {num_classes} classes ({listed}):"
  if len(missing) == num_classes:
    what = f"draws only a few of the {num_classes} classes, and different ones each time: mostly"
  most, least = 100 * max(shares[k] for k in missing), 100 * min(expected[k] for k in missing)
  of_the_data = f"at least {least:.2g} % of the data" if class_prior else f"an equal share is {least:.2g} %"
  return (
    f"the generator {what} each makes up at most {most:.2g} % of its images, and {of_the_data}; try feature"
    " matching, a lower learning rate of the generator, larger batches, or class-conditional training"
  )


def _same_image(seen: Sequence[Json]) -> str | None:
  ratio = _median(seen, "variance_ratio")
  if not ratio < IDENTICAL:
    return None
  return (
    "the generator draws nearly the same image every time: the variance of its pixels is"
    f" {ratio:.2g} of the data's, but should be close to 1; try feature matching, a lower"
    " learning rate of the generator, or larger batches"
  )


def _saturated(seen: Sequence[Json], d_loss: Sequence[float], *, g_is_stuck: bool) -> str | None:
  train_accuracy, fake_accuracy = _median(seen, "train_accuracy"), _median(seen, "fake_accuracy")
  no_loss = bool(d_loss) and abs(float(np.median(d_loss))) < SATURATED_LOSS
  if not (min(train_accuracy, fake_accuracy) > SATURATED_ACCURACY and (no_loss or g_is_stuck)):
    return None
  why = f"its loss is {np.median(d_loss):.2g}" if no_loss else "the generator's loss does not move"
  return (
    f"the discriminator has saturated: it recognises {train_accuracy:.1f} % of the training images"
    f" and {fake_accuracy:.1f} % of the generated ones, and {why}; try a lower learning rate of the"
    " discriminator, a gradient penalty, stronger augmentation, or feature matching"
  )


def _stuck(rows: Sequence[Json], name: str) -> str | None:
  """The alarm if a loss has not moved in the last quarter of the rows."""
  values = [row[name] for row in rows if name in row]
  values = values[-max(MIN_ROWS, len(values) // 4) :]
  if len(values) < MIN_ROWS or max(values) - min(values) > STUCK * max(map(abs, values)):
    return None
  return (
    f"{name} is stuck: between {min(values):.6g} and {max(values):.6g} over the last {len(values)} rows of"
    " metrics; try another learning rate or seed, and check that its terms reach the parameters"
  )
