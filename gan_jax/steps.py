"""One training step as a pure function, `step(state, batch) -> (state, metrics)`, and many per dispatch.

Networks and optimizers are closed over by the `make_*` builders; the state holds arrays only.
All randomness derives from `fold_in(state.key, state.step)`, split once into named parts. The base key
never changes, so a run that is saved and restored continues bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from gan_jax import kernels, objectives, terms
from gan_jax.augment import Adaptive
from gan_jax.objectives import Objective
from gan_jax.terms import DiscOutputs, StepOutputs
from gan_jax.types import (
  Augment,
  Batch,
  ClassLatents,
  Discriminator,
  DiscriminatorFn,
  Generator,
  Latents,
  Metrics,
  NetState,
  Network,
  Params,
  Step,
  TrainState,
)

MultiStep = Callable[[TrainState, Any, Int[Array, ""]], tuple[TrainState, dict[str, Float[Array, "m"]]]]
"""`(state, data, num) -> (state, metrics)`: `num` steps in one call, see `make_multi_step`."""

NUM_STATISTICS = 1000
"""Number of latents from which a generator's sampling statistics are computed."""


@partial(jax.jit, static_argnames=("g", "d", "g_tx", "d_tx"))
def init_state(
  key: Key[Array, ""],
  g: Generator,
  d: Discriminator,
  *,
  g_tx: optax.GradientTransformation,
  d_tx: optax.GradientTransformation,
  x_init: Float[Array, "b h w c"],
  aux: PyTree[Array] = None,
) -> TrainState:
  """A fresh state. Compiled, because initialisation consists of many small operations.

  Args:
    key: consumed; the state keeps a key derived from it.
    g: the generator, see `gan_jax.types`.
    d: the discriminator.
    g_tx: optimizer of G.
    d_tx: optimizer of D.
    x_init: real images in [0, 1], `[B, H, W, C]`. They set the shapes, and weight-normalised layers are
      initialised from their statistics: a few hundred images are enough.
    aux: further state of the algorithm: `Adaptive.init()` for adaptive augmentation.
  """
  chex.assert_rank(x_init, 4)
  key_state, key_z, key_g, key_d, key_noise = jax.random.split(key, 5)
  g_variables = dict(g.init(key_g, g.latents(key_z, len(x_init)), train=True))
  d_variables = dict(d.init({"params": key_d, "noise": key_noise}, x_init, train=True))
  g_params, d_params = g_variables.pop("params"), d_variables.pop("params")
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    key=key_state,
    g=NetState(g_params, g_variables, g_tx.init(g_params)),
    d=NetState(d_params, d_variables, d_tx.init(d_params)),
    # Copies: a donated state must not hold the same buffer twice.
    ema=jax.tree.map(jnp.copy, {"g": g_params, "d": d_params}),
    aux={} if aux is None else aux,
  )


def step_keys(key: Key[Array, ""], step: Int[Any, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
  """The two keys of a step, derived from the state's key: one samples its batch, one is the step's own."""
  key_batch, key_step = jax.random.split(jax.random.fold_in(key, step))
  return key_batch, key_step


def make_step(
  g: Generator,
  d: Discriminator,
  *,
  g_tx: optax.GradientTransformation,
  d_tx: optax.GradientTransformation,
  objective: Objective,
  augment: Augment | Adaptive | None = None,
  ema_decay: float = 0.999,
) -> Step:
  """Builds one step: an update of D, then one of G against the new D. Pure, not compiled.

  D processes `[labelled; unlabelled; generated]` in one pass. G's update has its own latents and unlabelled
  images. The batch sets the sizes; an empty input costs nothing, so with labelled images alone the same
  step is the supervised control. A network without terms in the objective is not updated.

  Args:
    g: the generator, see `gan_jax.types`.
    d: the discriminator.
    g_tx: optimizer of G, the one that the state was initialised with.
    d_tx: optimizer of D, the one that the state was initialised with.
    objective: the terms of both networks.
    augment: applied to all inputs of D, real and generated, in D's update and in G's. With `Adaptive`, the
      state must have been initialised with `aux=augment.init()`.
    ema_decay: decay of the parameter averages; early in training `(1 + t) / (10 + t)` while that is
      smaller, so that the initial parameters are soon forgotten.

  Returns:
    `step(state, batch) -> (state, metrics)`. Metrics are scalars: `d/loss`, each term under its name
    (`d/supervised`, `g/feature_matching`), mean real logits (`d/real_logit_real`, `d/real_logit_fake`),
    mean sign of the real logits of real images, relative to `objective.boundary` (`d/real_sign`), error on
    the labelled batch in percent, norms of gradients and updates, and with `Adaptive` its state
    (`d/strength`, `d/overfitting`). The real logit is the one that D's update uses: `l_y` if D judges
    images by class, else `logsumexp(l)`.

  Raises:
    ValueError: adaptive augmentation with an adversarial loss that has no boundary.
  """
  boundary = objective.boundary
  if isinstance(augment, Adaptive) and boundary is None:
    raise ValueError("adaptive augmentation needs an adversarial loss with a decision boundary")

  def apply(net: Network, params: Params, model_state: PyTree, x: Latents, key: Array):
    variables = {"params": params, **model_state}
    out, changed = net.apply(variables, x, train=True, rngs={"noise": key}, mutable=list(model_state))
    return out, dict(changed)

  def bind(params: Params, state: TrainState) -> DiscriminatorFn:
    """D with these parameters; its other collections stay those of the state."""
    return lambda x, key: apply(d, params, state.d.model_state, x, key)[0]

  def augmented(state: TrainState, key: Array, x: Array) -> Array:
    transform = augment.at(state.aux) if isinstance(augment, Adaptive) else augment
    return transform(key, x) if transform and len(x) else x

  def generate(params: Params, model_state: PyTree, key_z: Array, key_g: Array, num: int):
    """Images, their requested classes, and G's new state."""
    latents = g.latents(key_z, num)
    x, model_state = apply(g, params, model_state, latents, key_g)
    return x, latents.y if isinstance(latents, ClassLatents) else no_labels(x), model_state

  def update_d(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
    key_z, key_g, key_augment, key_noise, key_terms = jax.random.split(key, 5)
    x_fake, y_fake = batch.x_unl[:0], jnp.zeros(0, batch.y_lab.dtype)
    if batch.num_generated:
      x_fake, y_fake, _ = generate(state.g.params, state.g.model_state, key_z, key_g, batch.num_generated)
    x_raw = jax.lax.stop_gradient(jnp.concatenate([batch.x_lab, batch.x_unl, x_fake]))
    x = augmented(state, key_augment, x_raw)
    y = jnp.concatenate([batch.y_lab, no_labels(batch.x_unl), y_fake])
    ends = [len(batch.x_lab), len(batch.x_lab) + len(batch.x_unl)]

    def loss_fn(params: Params):
      (logits, features, *_), model_state = apply(d, params, state.d.model_state, x, key_noise)
      columns = (jnp.split(a, ends) for a in (x_raw, x, logits, features, y))
      lab, unl, fake = (DiscOutputs(*kind) for kind in zip(*columns, strict=True))
      outputs = StepOutputs(
        lab=lab,
        unl=unl,
        fake=fake,
        by_class=judges_by_class(g, len(batch.x_unl), batch.num_generated),
        key=key_terms,
        d_fn=bind(params, state),
        teacher_fn=bind(state.ema["d"], state),
        step=state.step,
      )
      loss, values = objectives.weighted_sum(objective.d, outputs)
      return loss, (values | _observed(outputs, boundary), model_state)

    net, metrics = optimizer_step(d_tx, state.d, loss_fn)
    state = state.replace(d=net)
    if isinstance(augment, Adaptive):
      state = state.replace(aux=augment.update(state.aux, metrics["real_sign"], ends[1]))
      metrics |= state.aux
    return state, {f"d/{name}": value for name, value in metrics.items()}

  def update_g(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
    key_z, key_g, key_unl, key_lab, key_fake, key_terms = jax.random.split(key, 6)
    d_fn = bind(state.d.params, state)

    def discriminate(x_raw: Array, y: Array, key: Array) -> DiscOutputs:
      if not len(x_raw):  # networks need not support an empty batch
        shapes = jax.eval_shape(lambda: d_fn(jnp.zeros((batch.num_generated, *x_raw.shape[1:])), key)[:2])
        logits, features = (jnp.zeros((0, *shape.shape[1:])) for shape in shapes)
        return DiscOutputs(x_raw, x_raw, logits, features, y)
      key_augment, key_noise = jax.random.split(key)
      x = augmented(state, key_augment, x_raw)
      logits, features, *_ = d_fn(x, key_noise)
      return DiscOutputs(x_raw, x, logits, features, y)

    # Real images are constants here, so they need only a forward pass through D, and none if no term uses
    # them: the compiler drops unused results.
    unl = discriminate(batch.x_unl_g, no_labels(batch.x_unl_g), key_unl)
    lab = discriminate(batch.x_lab, batch.y_lab, key_lab)

    def loss_fn(params: Params):
      x_fake, y_fake, model_state = generate(params, state.g.model_state, key_z, key_g, batch.num_generated)
      outputs = StepOutputs(
        lab=lab,
        unl=unl,
        fake=discriminate(x_fake, y_fake, key_fake),
        by_class=judges_by_class(g, len(batch.x_unl) + len(batch.x_unl_g), batch.num_generated),
        key=key_terms,
        d_fn=d_fn,
        teacher_fn=bind(state.ema["d"], state),
        step=state.step,
      )
      loss, values = objectives.weighted_sum(objective.g, outputs)
      return loss, (values, model_state)

    net, metrics = optimizer_step(g_tx, state.g, loss_fn)
    return state.replace(g=net), {f"g/{name}": value for name, value in metrics.items()}

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    chex.assert_rank([batch.x_lab, batch.x_unl, batch.x_unl_g, batch.y_lab], [4, 4, 4, 1])
    chex.assert_equal_shape([batch.x_lab, batch.x_unl, batch.x_unl_g], dims=(1, 2, 3))
    if objective.g and not batch.num_generated:
      raise ValueError("an objective with terms for G needs a batch with num_generated above 0")
    _, key = step_keys(state.key, state.step)
    key_d, key_g = jax.random.split(key)
    metrics = {}
    if objective.d:
      state, d_metrics = update_d(state, batch, key_d)
      metrics |= d_metrics
    if objective.g:
      state, g_metrics = update_g(state, batch, key_g)
      metrics |= g_metrics
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    params = {"g": state.g.params, "d": state.d.params}
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    return state.replace(step=state.step + 1, ema=ema), metrics

  return step


def _observed(outputs: StepOutputs, boundary: float | None) -> Metrics:
  """What an update of D logs besides its terms."""
  num_labelled, found = len(outputs.lab.x), {}
  real = terms.real_logit(terms.real_images(outputs, labelled=True))
  fake = terms.real_logit(terms.generated_images(outputs))
  if len(real):
    found["real_logit_real"] = (real[num_labelled:] if len(outputs.unl.x) else real).mean()
  if len(fake):
    found["real_logit_fake"] = fake.mean()
  if num_labelled:
    found["error"] = 100 * (outputs.lab.logits.argmax(axis=-1) != outputs.lab.y).mean()
  if len(real) and boundary is not None:
    found["real_sign"] = jnp.sign(real - boundary).mean()
  return found


def judges_by_class(g: Generator, num_unlabelled: int, num_generated: int) -> bool:
  """Whether all images that D judges have a class: labelled ones, and those of a class-conditional G."""
  return not num_unlabelled and num_generated > 0 and is_class_conditional(g)


def is_class_conditional(g: Generator) -> bool:
  """Whether a generator is class-conditional."""
  return isinstance(jax.eval_shape(lambda: g.latents(jax.random.key(0), 1)), ClassLatents)


def no_labels(x: Float[Array, "b h w c"]) -> Int[Array, "b"]:
  """The labels of unlabelled images, all -1."""
  return jnp.full(len(x), -1)


def optimizer_step(
  tx: optax.GradientTransformation,
  net: NetState,
  loss_fn: Callable[[Params], tuple[Array, tuple[Metrics, PyTree]]],
) -> tuple[NetState, Metrics]:
  """One optimizer step on `loss_fn: params -> (loss, (metrics, model_state))`."""
  (loss, (metrics, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(net.params)
  updates, opt_state = tx.update(grads, net.opt_state, net.params)
  params = optax.apply_updates(net.params, updates)
  norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
  return NetState(params, model_state, opt_state), {"loss": loss, **metrics, **norms}


def freeze_layers(tx: optax.GradientTransformation, layers: Sequence[str]) -> optax.GradientTransformation:
  """FreezeD: `tx` without updates to these layers of D.

  Variables of a layer other than its parameters, such as the vectors of a power iteration, are still
  updated from the batches.

  Args:
    tx: optimizer of the other layers; it does not see the frozen ones.
    layers: names at the top level of the parameters, usually the first of `d.layers(image_shape)`; if
      empty, `tx` itself is returned.

  References:
    Mo et al., 2020, https://arxiv.org/abs/2002.10964.
  """
  if not layers:
    return tx

  def labels(params: Params) -> dict[str, str]:
    return {name: "frozen" if name in layers else "trained" for name in params}

  return optax.partition({"frozen": optax.set_to_zero(), "trained": tx}, labels)


def make_multi_step(step: Step, sample_batch: Callable[..., Batch], *, max_steps: int) -> MultiStep:
  """Many steps as one pure function, so that one dispatch to the device runs them all.

  Args:
    step: from `make_step`.
    sample_batch: `(key, data, i) -> Batch`; consumes the key. `data` is any pytree on the device, `i` the
      index of the step in the call, from 0.
    max_steps: the maximum number of steps per call.

  Returns:
    `multi_step(state, data, num) -> (state, metrics)`: `num <= max_steps` is traced, so one compiled
    program serves every length. Each metric is `[max_steps]`; the first `num` entries are set.
  """

  @jax.jit  # the shapes of the metrics and the loop's body share one trace
  def one(state: TrainState, data: Any, i: Int[Array, ""]) -> tuple[TrainState, Metrics]:
    key_batch, _ = step_keys(state.key, state.step)
    return step(state, sample_batch(key_batch, data, i))

  def multi_step(state: TrainState, data: Any, num: Int[Array, ""]):
    def body(i: Array, carry):
      state, history = carry
      state, metrics = one(state, data, i)
      return state, {name: history[name].at[i].set(metrics[name]) for name in history}

    first = jnp.int32(0)  # a Python 0 is weakly typed, and would need a separate trace
    _, shapes = jax.eval_shape(one, state, data, first)
    history = {name: jnp.zeros(max_steps, shape.dtype) for name, shape in shapes.items()}
    return jax.lax.fori_loop(first, num, body, (state, history))

  return multi_step


@partial(jax.jit, static_argnames="g")
def with_statistics(g: Generator, state: TrainState) -> TrainState:
  """The state for sampling: with fixed statistics, an image depends on its latent alone.

  Only a generator with `norm="shift"` has them: the averaged G's statistics over 1,000 latents, always the
  same ones and of all classes, in the collection "statistics" of `state.g.model_state`. Existing statistics
  are kept. Training does not use them: continue it from the original state.
  """
  latents = g.latents(objectives.named_key(jax.random.key(0), "statistics"), NUM_STATISTICS)
  _, statistics = g.apply(state.averaged("g"), latents, train=False, mutable="statistics")
  return state.replace(g=state.g.replace(model_state={**state.g.model_state, **statistics}))


def make_sampler(
  g: Generator,
) -> Callable[..., Float[Array, "n h w c"]]:
  """Builds `sample(variables, key, num, y=None) -> images [num, H, W, C]` in [0, 1].

  With the variables `with_statistics(g, state).averaged("g")`, each image depends on its own latent alone.
  `num` is static under jit; the key is consumed. A class-conditional generator makes images of the classes
  `y [num]` or, without `y`, of random classes.
  """

  def sample(
    variables: PyTree[Array], key: Key[Array, ""], num: int, y: Int[Array, "n"] | None = None
  ) -> Float[Array, "n h w c"]:
    latents = g.latents(key, num)
    if y is not None:
      if not isinstance(latents, ClassLatents):
        raise ValueError("this generator is not class-conditional: it cannot draw a chosen class")
      latents = latents._replace(y=y)
    return g.apply(variables, latents, train=False)

  return sample


def make_classifier(
  d: Discriminator,
) -> Callable[[TrainState, Float[Array, "b h w c"]], tuple[Float[Array, "b k"], Float[Array, "b f"]]]:
  """Builds `classify(state, x) -> (logits [B, K], features [B, F])` from the averaged discriminator.

  Deterministic: no noise, no dropout. Products of float32 are exact on every device, see `kernels.exact`.
  """

  @kernels.exact
  def classify(state: TrainState, x: Float[Array, "b h w c"]):
    return d.apply(state.averaged("d"), x, train=False)[:2]

  return classify
