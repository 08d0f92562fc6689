"""The same steps in PyTorch, written for speed: the baseline for ours.

`Gan.run(num)` runs `num` steps. Data, parameters, random numbers and metrics live on the device, and
nothing is read back. Optimisations that were tried and kept are described where they are applied; the rest:

- Convolutions are channels-last. PyTorch pads "same" convolutions of stride 2 on the opposite side from
  JAX, unless it copies the image first. So the convolutional pair works on the mirrored image with mirrored
  kernels, which is the same function and needs no copy: `convert`.
- The rows of D's pass are one batch; G's real features, the generated images in D's update, and the targets
  of the consistency term are computed without a graph.
- Metrics are those of `steps.make_step`, except the update norms, which fused optimizers do not report.
- With `compiled`, the whole step, from sampling its batch to the moving averages, is one program,
  differentiated by `torch.func` (R1 twice), because `torch.autograd.grad` is not traced by default. On a
  GPU it is captured as a CUDA graph. R1 is applied every `penalty_every` steps: steps with and without it
  are two programs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]

from benchmarks import _recipes
from gan_jax import networks, recipes
from gan_jax.data import DeviceData
from gan_jax.recipes import Recipe
from gan_jax.types import TrainState

Params = dict[str, Tensor]

# PyTorch's functions over lists of tensors have no public names.
foreach: Any = torch

# Longer runs stay at the last scheduled rate.
_MAX_STEPS = 20_000


class Net(NamedTuple):
  """One network: trained leaves, the same storage without gradients, averages, and frozen leaves."""

  params: Params
  const: Params
  ema: Params
  frozen: Params


class DiscOutputs(NamedTuple):
  """One kind of images in D's pass, and D's outputs for them."""

  x: Tensor
  logits: Tensor
  features: Tensor


class Adam:
  """`lr m_hat / (sqrt(v_hat + eps_root) + eps)` over all leaves.

  PyTorch's own Adam has no `eps_root`. If that is zero, eager mode uses PyTorch's fused Adam.
  """

  def __init__(self, params: list[Tensor], *, b1: float, b2: float, eps: float, eps_root: float):
    self.b1, self.b2, self.eps, self.eps_root = b1, b2, eps, eps_root
    self.params = params
    self.m = [torch.zeros_like(p) for p in params]
    self.v = [torch.zeros_like(p) for p in params]

  def step(self, grads: list[Tensor], rate: Any, correct_1: Any, correct_2: Any) -> None:
    """One update; `correct_i = 1 - b_i^t`. Scalars are numbers, or tensors without dimensions."""
    if isinstance(rate, Tensor):  # traced: the compiler fuses leaf-by-leaf code
      for p, m, v, g in zip(self.params, self.m, self.v, grads, strict=True):
        m.lerp_(g, 1 - self.b1)
        v.mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
        root = torch.sqrt(v / correct_2 + self.eps_root) + self.eps
        p.sub_(rate / correct_1 * m / root)
      return
    foreach._foreach_lerp_(self.m, grads, 1 - self.b1)
    foreach._foreach_mul_(self.v, self.b2)
    foreach._foreach_addcmul_(self.v, grads, grads, 1 - self.b2)
    # m_hat / (sqrt(v_hat + r) + e) = c m / (sqrt(v + r c2) + e sqrt(c2)), with c = sqrt(c2) / c1
    root = foreach._foreach_add(self.v, self.eps_root * correct_2)
    foreach._foreach_sqrt_(root)
    if self.eps:
      foreach._foreach_add_(root, self.eps * math.sqrt(correct_2))
    foreach._foreach_addcdiv_(self.params, self.m, root, -rate * math.sqrt(correct_2) / correct_1)


class FusedAdam:
  """PyTorch's fused Adam."""

  def __init__(self, params: list[Tensor], *, b1: float, b2: float, eps: float):
    self.params = params
    self.adam = torch.optim.Adam(params, betas=(b1, b2), eps=eps, fused=True)

  def step(self, grads: list[Tensor], rate: float, correct_1: float, correct_2: float) -> None:
    del correct_1, correct_2
    for p, g in zip(self.params, grads, strict=True):
      p.grad = g
    self.adam.param_groups[0]["lr"] = rate
    self.adam.step()


class Gan:
  """One GAN in training. Tests may replace `latents`.

  Args:
    recipe: what to compute: a pair of networks and an objective of `benchmarks._recipes`.
    state: ours; gives the initial parameters.
    images: ours.
    device: "cpu" or "cuda".
    compiled: whether `torch.compile` makes each step one program.
    seed: seed of PyTorch's random numbers.
  """

  def __init__(
    self,
    recipe: Recipe,
    state: TrainState,
    images: DeviceData,
    *,
    device: str = "cpu",
    compiled: bool = False,
    seed: int = 0,
  ):
    _configure(device, seed)
    self.recipe, self.device, self.compiled = recipe, torch.device(device), compiled
    self.hparams: Any = recipe.hparams
    self.strong = getattr(recipe.hparams, "strong", None)
    self.penalty_every = _recipes.penalty_every(recipe)
    self.conv = isinstance(recipe.d, networks.ConvDiscriminator)
    self.strides = _strides(recipe) if self.conv else ()  # here, as Flax cannot be traced by PyTorch
    self.g, self.d = (self._net(state, which) for which in ("g", "d"))
    self.x_lab, self.x_unl = (self._images(x) for x in (images.x_lab, images.x_unl))
    self.y_lab = torch.tensor(np.asarray(images.y_lab), dtype=torch.int64, device=self.device)
    self.table = _table(recipe)
    self.rows = self.table.tolist()
    self.table = self.table.float().to(self.device)
    self.num_steps = 0
    self.step_number = torch.zeros((), dtype=torch.int64, device=self.device)
    self.metrics: dict[str, Tensor] = {}
    self.d_opt, self.g_opt = (self._optimizer(net) for net in (self.d, self.g))
    self._programs: dict[bool, Callable[[], dict[str, Tensor]]] = {}

  # --- Public

  def run(self, num: int) -> None:
    """Runs `num` steps; the device may still be busy when it returns."""
    for _ in range(num):
      due = self.num_steps % self.penalty_every == 0
      self.metrics = self._program(due)() if self.compiled else self._eager(due)
      self.num_steps += 1

  def synchronize(self) -> None:
    """Waits for the device."""
    if self.device.type == "cuda":
      torch.cuda.synchronize(self.device)

  # --- Set-up

  def _net(self, state: TrainState, which: str) -> Net:
    net = getattr(state, which)
    const = convert(self.recipe, which, net.params)
    const = {k: _dense(torch.tensor(v)).to(self.device) for k, v in const.items()}
    params = {k: v.detach().requires_grad_() for k, v in const.items()}
    frozen = convert(self.recipe, which, net.model_state.get("frozen", {}))
    frozen = {k: torch.tensor(v).to(self.device) for k, v in frozen.items()}
    return Net(params, const, {k: v.clone() for k, v in const.items()}, frozen)

  def _images(self, x: jax.Array) -> Tensor:
    """Bytes on the device in the layout of the networks: mirrored NCHW, or flat."""
    a = np.asarray(x)
    if not self.conv:
      return torch.tensor(a.reshape(len(a), math.prod(a.shape[1:]))).to(self.device)
    return torch.tensor(a[:, ::-1, ::-1].transpose(0, 3, 1, 2).copy()).to(self.device)

  def _optimizer(self, net: Net) -> Adam | FusedAdam:
    h, params = self.hparams, list(net.const.values())
    if self.compiled or h.eps_root:
      return Adam(params, b1=h.b1, b2=h.b2, eps=h.eps, eps_root=h.eps_root)
    return FusedAdam(params, b1=h.b1, b2=h.b2, eps=h.eps)

  # --- One step

  def _eager(self, due: bool) -> dict[str, Tensor]:
    scalars = self.rows[min(self.num_steps, _MAX_STEPS - 1)]
    return self.one(self.batch(), scalars, due=due)

  def _program(self, due: bool) -> Callable[[], dict[str, Tensor]]:
    if self.penalty_every == 1:
      due = True
    if due not in self._programs:
      # Compiled programs are cached by function: without guards, each program needs its own function.
      whole = (lambda: self._whole(due=True)) if due else (lambda: self._whole(due=False))
      # No guards: nothing that the program depends on changes, and checking takes time.
      options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
      if self.device.type == "cpu":
        options["fallback_random"] = True
      compiled = torch.compile(whole, fullgraph=True, dynamic=False, options=options)
      run = lambda: _without_grad(compiled)
      self._programs[due] = _as_cuda_graph(run) if self.device.type == "cuda" else run
    return self._programs[due]

  def _whole(self, *, due: bool) -> dict[str, Tensor]:
    """A whole step, including the sampling of its batch, entirely on the device."""
    at = self.step_number.clamp(max=_MAX_STEPS - 1)
    scalars = self.table.index_select(0, at.reshape(1))[0].unbind()
    metrics = self.one(self.batch(), scalars, due=due)
    self.step_number.add_(1)
    return metrics

  def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labelled images, their classes, unlabelled images for D and for G. Empty if there are none."""
    sizes, num_lab = self.recipe.batch, len(self.y_lab)
    x_lab, y_lab = self.x_lab, self.y_lab
    if sizes.labelled != num_lab:
      chosen = torch.randint(num_lab, (sizes.labelled,), device=self.device)
      x_lab, y_lab = x_lab[chosen], y_lab[chosen]
    num_g = sizes.generated if "feature_matching" in self.recipe.objective.g else 0
    chosen = torch.randint(len(self.x_unl), (sizes.unlabelled + num_g,), device=self.device)
    x_unl, x_unl_g = (self.x_unl[chosen].float() / 255).split([sizes.unlabelled, num_g])
    return x_lab.float() / 255, y_lab, x_unl, x_unl_g

  def one(self, batch: tuple[Tensor, ...], scalars: Sequence[Any], *, due: bool) -> dict[str, Tensor]:
    """One step, an update of D and one of G, as in `steps.make_step`.

    Args:
      batch: a result of `batch`.
      scalars: a row of `_table`.
      due: whether R1 is due.
    """
    x_lab, y_lab, x_unl, x_unl_g = batch
    d_rate, g_rate, correct_1, correct_2, lerp, *weights = scalars
    num_fake, objective = self.recipe.batch.generated, self.recipe.objective
    sizes = [len(x_lab), len(x_unl), num_fake]
    with torch.no_grad():
      latents = self.latents(num_fake)
      x = torch.cat([x_lab, x_unl, self.generate(self.g.const, latents)])
      x = self.augment(x, self.strong)
      weak = self.augment(x_unl, self.hparams.weak) if "consistency" in objective.d else x_unl

    def d_loss(params: Params):
      logits, features = self.discriminate(params, x)
      lab, unl, fake = map(DiscOutputs, x.split(sizes), logits.split(sizes), features.split(sizes))
      if sizes[1]:
        real, made = _real_logit(unl.logits), _real_logit(fake.logits)
      else:
        real, made = _class_logit(lab.logits, y_lab), _class_logit(fake.logits, latents[1])
      terms = {}
      for name in objective.d:
        if name == "supervised":
          terms[name] = F.cross_entropy(lab.logits, y_lab)
        elif name == "adversarial":
          terms[name] = F.softplus(-real).mean() + F.softplus(made).mean()
        elif name == "consistency":
          terms[name] = self._consistency(weak, unl)
        elif name == "class_balance":
          log_mean = F.log_softmax(unl.logits, 1).logsumexp(0) - math.log(sizes[1])
          terms[name] = (log_mean.exp() * log_mean).sum() + math.log(unl.logits.shape[1])
        elif name == "r1":
          terms[name] = self._r1(params, lab.x, y_lab) if due else logits.new_zeros(())
        else:
          raise NotImplementedError(name)
      loss = logits.new_zeros(())
      for weight, term in zip(weights, terms.values(), strict=True):
        loss = loss + weight * term
      with torch.no_grad():
        values = {"real_logit_real": real.detach().mean(), "real_logit_fake": made.detach().mean()}
        every_real = _real_logit(logits.detach()[: sizes[0] + sizes[1]]) if sizes[1] else real.detach()
        values["real_sign"] = every_real.sign().mean()
        if sizes[0]:
          values["error"] = 100 * (lab.logits.detach().argmax(1) != y_lab).float().mean()
      return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}, **values}

    metrics = self._descend("d", d_loss, d_rate, correct_1, correct_2)

    with torch.no_grad():
      latents_g = self.latents(num_fake)
      features_real = x_unl_g
      if len(x_unl_g):
        features_real = self.discriminate(self.d.const, self.augment(x_unl_g, self.strong))[1].mean(0)

    def g_loss(params: Params):
      x = self.augment(self.generate(params, latents_g), self.strong)
      logits, features = self.discriminate(self.d.const, x)
      (name,) = objective.g
      if name == "feature_matching":
        loss = (features_real - features.mean(0)).square().mean()
      elif name == "adversarial":
        made = _real_logit(logits) if latents_g[1] is None else _class_logit(logits, latents_g[1])
        loss = F.softplus(-made).mean()
      else:
        raise NotImplementedError(name)
      return loss, {"loss": loss.detach(), name: loss.detach()}

    metrics |= self._descend("g", g_loss, g_rate, correct_1, correct_2)
    for net in (self.g, self.d):
      ema, params = list(net.ema.values()), list(net.const.values())
      if isinstance(lerp, Tensor):
        for average, p in zip(ema, params, strict=True):
          average.lerp_(p, lerp)
      else:
        foreach._foreach_lerp_(ema, params, lerp)
    return metrics

  def _descend(self, which: str, loss_fn, rate, correct_1, correct_2) -> dict[str, Tensor]:
    net, opt = (self.d, self.d_opt) if which == "d" else (self.g, self.g_opt)
    if self.compiled:
      grads, (_, values) = torch.func.grad_and_value(loss_fn, has_aux=True)(net.const)
      grads = list(grads.values())
    else:
      loss, values = loss_fn(net.params)
      grads = torch.autograd.grad(loss, list(net.params.values()))
      # The fused Adam assumes that a gradient has the memory layout of its parameter.
      pairs = zip(grads, net.const.values(), strict=True)
      grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in pairs]
    with torch.no_grad():
      norms = foreach._foreach_norm(grads)
      values["grad_norm"] = torch.linalg.vector_norm(torch.stack(norms))
      opt.step(grads, rate, correct_1, correct_2)
    return {f"{which}/{name}": value for name, value in values.items()}

  def _consistency(self, weak: Tensor, unl: DiscOutputs) -> Tensor:
    with torch.no_grad():
      best, y = F.softmax(self.discriminate(self.d.ema, weak)[0], 1).max(1)
    return ((best >= self.hparams.threshold) * F.cross_entropy(unl.logits, y, reduction="none")).mean()

  def _r1(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """R1, weighted by the number of steps between its applications."""

    def class_logit(x: Tensor) -> Tensor:
      return _class_logit(self.discriminate(params, x)[0], y).sum()

    if self.compiled:
      gradient = torch.func.grad(class_logit)(x)
    else:
      x = x.detach().requires_grad_()
      (gradient,) = torch.autograd.grad(class_logit(x), x, create_graph=True)
    return self.penalty_every * gradient.square().flatten(1).sum(1).mean() / 2

  # --- Networks

  def latents(self, num: int) -> tuple[Tensor, Tensor | None]:
    """Latents of G, and the classes that are requested of it."""
    g: Any = self.recipe.g
    draw = torch.rand if g.latent == "uniform" else torch.randn
    z = draw(num, g.latent_size, device=self.device)
    return (z, torch.randint(g.num_classes, (num,), device=self.device)) if g.num_classes else (z, None)

  def generate(self, params: Params, latents: tuple[Tensor, Tensor | None]) -> Tensor:
    """Images in [0, 1], in the layout of the discriminator."""
    g: Any = self.recipe.g
    h, y = latents
    if y is not None:
      h = torch.cat([h, F.one_hot(y, g.num_classes) * math.sqrt(g.latent_size)], 1)
    return self._conv_g(params, h) if self.conv else self._mlp_g(params, h)

  def _mlp_g(self, p: Params, h: Tensor) -> Tensor:
    g: Any = self.recipe.g
    activation = F.softplus if g.norm == "shift" else _leaky
    for i in range(len(g.widths)):
      h = activation(
        _normalise(F.linear(h, p[f"Block_{i}.kernel"], p.get(f"Block_{i}.bias")), p, f"Block_{i}")
      )
    scale = p.get("Linear_0.scale")
    return torch.sigmoid(_linear(h, p["Linear_0.kernel"], p["Linear_0.bias"], scale))

  def _conv_g(self, p: Params, h: Tensor) -> Tensor:
    g: Any = self.recipe.g
    height, width, _ = g.image_shape
    base, blocks, last = _plan(g)
    h = F.linear(h, p["Linear_0.kernel"], p.get("Linear_0.bias")).view(-1, *base, g.width)
    h = F.relu(_normalise(h.permute(0, 3, 1, 2), p, "Linear_0"))
    for i, factor in enumerate(blocks):
      h = F.conv2d(h, p[f"Block_{i}.kernel"], p.get(f"Block_{i}.bias"), padding=1)
      h = F.relu(_normalise(F.pixel_shuffle(h, factor) if factor > 1 else h, p, f"Block_{i}"))
    h = F.pixel_shuffle(F.conv2d(h, p["Linear_1.kernel"], p["Linear_1.bias"], padding=1), last)
    return torch.sigmoid(h[:, :, -height:, -width:])

  def _mlp_d(self, p: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    d: Any = self.recipe.d
    features = x
    h = _noisy(x, d.noise_in)
    for i in range(len(d.widths)):
      scale = self.d.frozen.get(f"Block_{i}.scale")
      features = _linear(h, p[f"Block_{i}.kernel"], p[f"Block_{i}.bias"], scale)
      features = _leaky(features) if d.activation is networks.leaky_relu else F.relu(features)
      h = _noisy(features, d.noise_hidden)
    return _linear(h, p["head.kernel"], p["head.bias"], p.get("head.scale")), features

  def _conv_d(self, p: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    h = 2 * x - 1
    for i, stride in enumerate(self.strides):
      w = p[f"Block_{i}.kernel"]
      h = F.conv2d(h, w, p.get(f"Block_{i}.bias"), stride, padding=w.shape[-1] // 2)
      h = _leaky(_normalise(h, p, f"Block_{i}"))
    last = f"Block_{len(self.strides)}"
    h = h.permute(0, 2, 3, 1).flatten(1)  # free for channels-last
    features = _leaky(_normalise(F.linear(h, p[f"{last}.kernel"], p.get(f"{last}.bias")), p, last))
    return F.linear(features, p["head.kernel"], p["head.bias"]), features

  def discriminate(self, params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features, noise included."""
    return (self._conv_d if self.conv else self._mlp_d)(params, x)

  def augment(self, x: Tensor, ranges: Mapping[str, float] | None) -> Tensor:
    """One random affine map per image."""
    if ranges is None:
      return x
    if len(ranges) > 4:
      raise NotImplementedError(f"the peer supports only affine maps with a black border, not {ranges}")
    return affine(x, ranges, torch.rand(6, len(x), device=x.device) * 2 - 1)


def affine(x: Tensor, ranges: Mapping[str, float], draws: Tensor) -> Tensor:
  """`augment.affine`: the map of each image from six draws in [-1, 1], `[6, B]`, in its order.

  In the mirrored image, the shifts of the same draws have the opposite sign.
  """
  height, width = x.shape[2:]
  dy, dx = ranges["shift"] * height * draws[0], ranges["shift"] * width * draws[1]
  angle = math.radians(ranges["rotate"]) * draws[2]
  cos, sin = torch.cos(angle), torch.sin(angle)
  zoom = (1 + ranges["scale"]) ** draws[3:5]
  k = ranges["shear"] * draws[5]
  # The source of each output pixel (u, v), relative to the centre, in units of half a side.
  aspect = height / width
  u_shift = (cos * dx + sin * dy + k * (cos * dy - sin * dx)) * (-2 / width)
  u = torch.stack([cos - k * sin, (sin + k * cos) * aspect, u_shift], 1) / zoom[1][:, None]
  v = torch.stack([sin / -aspect, cos, (sin * dx - cos * dy) * (2 / height)], 1) / zoom[0][:, None]
  grid = F.affine_grid(torch.stack([u, v], 1), list(x.shape), align_corners=False)
  return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- Layers


def _linear(x: Tensor, v: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
  """`s <v, x> / |v| + b`, or without `scale` a plain dense layer."""
  if scale is None:
    return F.linear(x, v, bias)
  return F.linear(x, v) * (scale * v.square().sum(1).rsqrt()) + bias


def _normalise(h: Tensor, p: Params, name: str) -> Tensor:
  """Layer normalisation over the channels, batch normalisation that only shifts, or nothing."""
  if (scale := p.get(f"{name}.norm_scale")) is not None:
    bias = p[f"{name}.norm_bias"]
    if h.ndim == 2:
      return F.layer_norm(h, scale.shape, scale, bias, 1e-6)
    return F.layer_norm(h.permute(0, 2, 3, 1), scale.shape, scale, bias, 1e-6).permute(0, 3, 1, 2)
  if (shift := p.get(f"{name}.shift")) is not None:
    return F.batch_norm(h, None, None, torch.ones_like(shift), shift, training=True, eps=1e-6)
  return h


def _noisy(h: Tensor, std: float) -> Tensor:
  return torch.add(h, torch.randn_like(h), alpha=std) if std else h


def _leaky(h: Tensor) -> Tensor:
  return F.leaky_relu(h, 0.1)


def _real_logit(logits: Tensor) -> Tensor:
  return logits[:, 0] if logits.shape[1] == 1 else logits.logsumexp(1)


def _class_logit(logits: Tensor, y: Tensor | None) -> Tensor:
  assert y is not None
  return logits.gather(1, y[:, None])[:, 0]


# --- From our parameters


def convert(recipe: Recipe, which: str, tree: Any) -> dict[str, np.ndarray]:
  """Converts our parameters of G ("g") or D ("d") to the leaves used here.

  Kernels become `[out, in]` or `[out, in, kh, kw]`. In the convolutional pair everything spatial is
  mirrored: kernels, the rows and columns of dense layers, and the channels that become pixels.
  """
  conv, leaves = isinstance(recipe.d, networks.ConvDiscriminator), {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names, a = [key.key for key in path], np.asarray(leaf)
    # No module wraps G's first layer and its normalisation.
    module = "Linear_0" if names[0] in ("LayerNorm_0", "BatchNormShift_0") else names[0]
    name = f"norm_{names[-1]}" if "LayerNorm_0" in names else names[-1]
    if conv:
      a = _mirrored(recipe, which, module, a)
    if name == "kernel":
      a = a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T
    leaves[f"{module}.{name}"] = np.ascontiguousarray(a)
  return leaves


def _mirrored(recipe: Recipe, which: str, module: str, a: np.ndarray) -> np.ndarray:
  shape = a.shape
  if a.ndim == 4:
    a = a[::-1, ::-1]
  if which == "d":
    strides = _strides(recipe)
    if a.ndim == 2 and module == f"Block_{len(strides)}":
      sides = [math.ceil(side / math.prod(strides)) for side in recipe.image_shape[:2]]
      a = a.reshape(*sides, -1, shape[-1])[::-1, ::-1].reshape(shape)
    return a
  base, blocks, last = _plan(recipe.g)
  if a.ndim == 2 and module == "Linear_0":
    return a.reshape(shape[0], *base, -1)[:, ::-1, ::-1].reshape(shape)
  factors = {"Linear_1": last, **{f"Block_{i}": factor for i, factor in enumerate(blocks)}}
  factor = factors.get(module, 1)
  if factor > 1 and (a.ndim == 4 or module == "Linear_1"):
    # Channels [f, f, C] here become [C, f, f] for `pixel_shuffle`.
    a = np.moveaxis(a.reshape(*shape[:-1], factor, factor, -1)[..., ::-1, ::-1, :], -1, -3).reshape(shape)
  return a


def _plan(g: Any) -> tuple[list[int], list[int], int]:
  """Sides of G's first feature map, and the upsampling factors of each block and of the last layer."""
  height, width, _ = g.image_shape
  doublings = max(0, math.ceil(math.log2(max(height, width) / 32)))
  base = [math.ceil(side / (4 * 2**doublings)) for side in (height, width)]
  return base, [2] * doublings + [1] + [2] * g.fine, 2 if g.fine else 4


def _strides(recipe: Recipe) -> tuple[int, ...]:
  """Strides of D's convolutions."""
  d: Any = recipe.d
  return d.strides(recipe.image_shape)


def _dense(a: Tensor) -> Tensor:
  return a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a


# --- Scalars that change from step to step


def _table(recipe: Recipe) -> Tensor:
  """One row per step: D's rate, G's rate, `1 - b1^t`, `1 - b2^t`, 1 - EMA decay, D's weights."""
  h, t = recipe.hparams, np.arange(_MAX_STEPS)
  peaks = h.d_learning_rate, h.g_learning_rate
  rates = (recipes.learning_rate(h.schedule, h.num_steps, peak) for peak in peaks)
  weights = (weight for weight, _ in recipe.objective.d.values())
  at = lambda value: np.asarray(value(jnp.asarray(t)) if callable(value) else value)
  column = lambda value: np.broadcast_to(at(value), t.shape)
  columns = [
    *map(column, rates),
    *(1 - b ** (t + 1) for b in (h.b1, h.b2)),
    1 - np.minimum(recipe.ema_decay, (1 + t) / (10 + t)),
    *map(column, weights),
  ]
  return torch.tensor(np.stack(columns, axis=1), dtype=torch.float64)


# --- The device


def _configure(device: str, seed: int) -> None:
  torch.manual_seed(seed)
  torch.set_flush_denormal(True)  # as XLA does
  if device != "cpu":
    torch.set_float32_matmul_precision("high")  # XLA's default on GPUs: TF32 products, float32 sums
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def _without_grad(program: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
  """Runs the program without autograd: `torch.func` takes its derivatives."""
  with torch.no_grad():
    return program()


def _as_cuda_graph(program: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
  """Captures the program at the second call; the first call compiles it and chooses its kernels."""
  graph, metrics = None, {}

  def run() -> dict[str, Tensor]:
    nonlocal graph, metrics
    if graph is None:
      stream = torch.cuda.Stream()
      stream.wait_stream(torch.cuda.current_stream())
      with torch.cuda.stream(stream):
        metrics = program()
      torch.cuda.current_stream().wait_stream(stream)
      graph = torch.cuda.CUDAGraph()
      with torch.cuda.graph(graph):
        captured = program()
      first, metrics = metrics, captured
      return first
    graph.replay()
    return metrics

  return run
