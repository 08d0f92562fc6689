"""Overfitting and collapse, seen in numbers: what D makes of images it never saw, what G leaves out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float, Key

from gan_jax import losses, steps
from gan_jax.types import Generator, InputError, Json, Metrics, Network, TrainState

Classify = Callable[[Float[Array, "b h w c"]], Float[Array, "b k"]]
Observe = Callable[
  [TrainState, Key[Array, ""], Float[Array, "n h w c"], Float[Array, "m h w c"]],
  Metrics,
]

WARM_UP = 0.1
"""Share of the updates in which nothing is judged: early networks are one-sided and recover."""
NUM_OBSERVATIONS = 5
"""The latest observations, whose median is judged; with fewer than 3 of them one outlier would rule."""
MEMORISED = 0.5
"""r_v, half of the way from the 0 of no overfitting to the 1 of complete overfitting."""
MEMORISED_RIGHT = 80.0
"""Percent. ADA steers to `E[sign D(train)] = 0.6` as its limit of overfitting: 80 % right, 20 % wrong."""
MISSING = 0.1
"""Share of a class relative to an equal one. The rarest had 0.2 and more in healthy runs of 10 classes."""
IDENTICAL = 0.2
"""`watch/spread`, which is 1 where samples vary as the data does; 0.8 and 1.0 in healthy runs."""
MIN_ROWS = 8
"""Rows without a movement before a loss counts as stuck; a quarter of all rows where that is more."""
STUCK = 1e-4
"""Relative range of a stuck loss. Batches alone moved it by 0.06 and more in healthy runs on MNIST."""
WON_RIGHT = 99.5
"""Percent of training and of generated images that D judges rightly when G cannot fool it any more."""
WON_LOSS = 0.01
"""D's loss at a confidence of 99 %; healthy runs on MNIST and the digits stayed above 0.08."""


def make_observe(g: Generator, d: Network, classify: Classify | None = None) -> Observe:
  """Builds `observe(state, key, x_train, x_held_out) -> metrics`: pure, for jit, for now and then.

  With `r` the mean realness of D and as many generated as training images:

    watch/realness_train, _held_out, _fake    r, for each kind of image
    watch/realness_gap       r(train) - r(held out)
    watch/memorisation       r_v = (r(train) - r(held out)) / (r(train) - r(fake)). Near 0, D treats
                             unseen images as it treats those it learns from; near 1, as generated ones.
                             0 where D does not put training images above generated ones
    watch/train_right, fake_right    percent that D judges real, and generated
    watch/spread             variance over the generated images, averaged over pixels, as a ratio to that
                             of `x_train`: 0 where all samples are the same
    watch/class_entropy      of the classes of the generated images, in nats, at most log K
    watch/share_0 .. K-1     share of each class among them

  The paper shows D augmented images alone; here none is augmented.

  Args:
    g, d: networks, see `steps.init_state`. Images come from the averaged generator; D is the current
      one, because it is the one that G learns from.
    classify: names the class of generated images; by default D's own K logits. Without classes (K = 1)
      the last two kinds of metric are left out.

  Returns:
    `observe`. It consumes the key. `x_train` `[N, H, W, C]` in [0, 1] should hold ten images a class or
    more; `x_held_out` `[M, H, W, C]` are images that no update has seen. Where M is 0 the metrics that
    need them are left out. Metrics are float32 scalars. Fewer than two training images: `InputError`.

  References:
    Karras et al., 2020, https://arxiv.org/abs/2006.06676, equation 1 (r_v).
  """
  sample = steps.make_sampler(g)

  def observe(state: TrainState, key: Array, x_train: Array, x_held_out: Array) -> Metrics:
    if len(x_train) < 2:
      raise InputError(f"watching needs at least 2 training images to compare with, not {len(x_train)}")
    x_fake = sample(state, key, len(x_train))
    x = jnp.concatenate([x_train, x_held_out, x_fake])
    logits = d.apply({"params": state.d.params, **state.d.model_state}, x, train=False)[0]
    ends = [len(x_train), len(x_train) + len(x_held_out)]
    train, held_out, fake = jnp.split(losses.realness(logits), ends)
    r_train, r_fake = train.mean(), fake.mean()
    metrics = {
      "realness_train": r_train,
      "realness_fake": r_fake,
      "train_right": 100 * (train > 0).mean(),
      "fake_right": 100 * (fake < 0).mean(),
      "spread": x_fake.var(axis=0).mean() / jnp.maximum(x_train.var(axis=0).mean(), 1e-12),
    }
    if len(x_held_out):
      gap, whole = r_train - held_out.mean(), r_train - r_fake
      metrics["realness_held_out"] = held_out.mean()
      metrics["realness_gap"] = gap
      metrics["memorisation"] = jnp.where(whole > 1e-6, gap / jnp.maximum(whole, 1e-6), 0.0)
    class_logits = classify(x_fake) if classify else logits[ends[1] :]
    num_classes = class_logits.shape[-1]
    if num_classes > 1:
      shares = jax.nn.one_hot(class_logits.argmax(axis=-1), num_classes).mean(axis=0)
      metrics["class_entropy"] = entr(shares).sum()
      metrics |= {f"share_{k}": shares[k] for k in range(num_classes)}
    return {f"watch/{name}": value.astype(jnp.float32) for name, value in metrics.items()}

  return observe


def alarms(rows: Sequence[Json], *, num_steps: int, class_names: Sequence[str] = ()) -> dict[str, str]:
  """What is going wrong now: kind -> a plain sentence of what it is, the evidence, and what to try.

  Only the latest part of training counts, so what was recovered from is forgotten, and the first tenth
  never does. No alarm means that none of these was seen, not that the samples are good. The classes are
  taken to be about equally frequent in the data.

  Args:
    rows: the rows of one phase in `metrics.jsonl`, oldest first: `step`, `d/loss`, `g/loss` where G is
      trained, and in some of them what `observe` gave.
    num_steps: updates of the whole phase, those to come included.
    class_names: names of the K classes; their numbers stand in where there are none.
  """
  rows = [row for row in rows if row["step"] > WARM_UP * num_steps]
  stuck = {name: text for name in ("d/loss", "g/loss") if (text := _stuck(rows, name))}
  seen = [row for row in rows if "watch/spread" in row][-NUM_OBSERVATIONS:]
  if len(seen) < 3:
    return stuck

  def median(name: str) -> float:
    return float(np.median([row.get(f"watch/{name}", np.nan) for row in seen]))

  found = {}
  r_v, train_right, fake_right = median("memorisation"), median("train_right"), median("fake_right")
  # A D that says "real" to everything has a small denominator in r_v, and so a large r_v by chance.
  if r_v > MEMORISED and train_right > MEMORISED_RIGHT and fake_right > 50:
    found["memorisation"] = (
      f"the discriminator memorises its training images: it takes {train_right:.0f} % of them for real, and"
      f" sees unseen images {100 * r_v:.0f} % of the way from them to generated ones; try stronger or"
      " adaptive augmentation, more images, a gradient penalty, or fewer updates"
    )

  num_classes = sum(name.startswith("watch/share_") for name in seen[-1])
  shares = [median(f"share_{k}") for k in range(num_classes)]
  missing = [k for k, share in enumerate(shares) if share < MISSING / num_classes]
  if missing:
    names = [class_names[k] if class_names else str(k) for k in missing]
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    most = 100 * max(shares[k] for k in missing)
    found["lost classes"] = (
      f"the generator has lost {len(names)} of {num_classes} classes ({listed}): each is at most"
      f" {most:.2g} % of its images, where an equal share is {100 / num_classes:.2g} %; try feature"
      " matching, a lower learning rate of the generator, larger batches, or class-conditional training"
    )
  if median("spread") < IDENTICAL:
    found["same image"] = (
      "the generator draws nearly the same image every time: the variance of its pixels is"
      f" {median('spread'):.2g} of the data's, where 1 is right; try feature matching, a lower learning"
      " rate of the generator, or larger batches"
    )

  d_loss = [row["d/loss"] for row in rows if "d/loss" in row][-NUM_OBSERVATIONS:]
  no_loss = bool(d_loss) and abs(float(np.median(d_loss))) < WON_LOSS
  if min(train_right, fake_right) > WON_RIGHT and (no_loss or "g/loss" in stuck):
    why = f"its loss is {np.median(d_loss):.2g}" if no_loss else "the generator's loss does not move"
    found["discriminator won"] = (
      f"the discriminator has won: it judges {train_right:.1f} % of the training images and"
      f" {fake_right:.1f} % of the generated ones rightly, and {why}; try a lower learning rate of the"
      " discriminator, a gradient penalty, stronger augmentation, or feature matching"
    )
    stuck = {}
  return found | stuck


def _stuck(rows: Sequence[Json], name: str) -> str | None:
  """The alarm where a loss has not moved in the last quarter of the rows."""
  values = [row[name] for row in rows if name in row]
  values = values[-max(MIN_ROWS, len(values) // 4) :]
  if len(values) < MIN_ROWS or max(values) - min(values) > STUCK * max(map(abs, values)):
    return None
  return (
    f"{name} is stuck: between {min(values):.6g} and {max(values):.6g} over the last {len(values)} rows of"
    " metrics; try another learning rate or seed, and check that its terms reach the parameters"
  )
