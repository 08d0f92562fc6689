import collections
import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan_jax import augment, losses, networks, penalties
from gan_jax.recipes import policies

STRONG = augment.chain(augment.affine(shift=0.1, rotate=20, scale=0.2, shear=0.2), augment.cutout(0.3))


def apply(fn, key, x):
  """As one program: operations one by one are compiled one by one. Traced anew, as tests patch draws."""
  return np.asarray(jax.jit(lambda key, x: fn(key, x))(key, x))


def test_no_parameters_no_change(key):
  x = jax.random.uniform(key, (4, 9, 7, 2))
  np.testing.assert_allclose(apply(augment.affine(), key, x), x, atol=1e-6)


def test_sampling_whole_pixels_is_a_shift(key):
  x = jax.random.uniform(key, (2, 6, 6, 1))
  rows, columns = np.meshgrid(np.arange(6.0), np.arange(6.0), indexing="ij")
  rows, columns = (np.broadcast_to(a, (2, 6, 6)) for a in (rows + 2, columns - 1))
  y = jax.jit(augment.sample)(x, rows, columns)
  expected = np.zeros_like(x)
  expected[:, :4, 1:] = x[:, 2:, :5]
  np.testing.assert_allclose(y, expected, atol=1e-6)


def test_sampling_half_way_is_the_mean(key):
  x = jax.random.uniform(key, (1, 2, 2, 1))
  half = np.full((1, 1, 1), 0.5)
  np.testing.assert_allclose(jax.jit(augment.sample)(x, half, half).squeeze(), x.mean(), rtol=1e-6)


def test_a_quarter_turn(key, monkeypatch):
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))
  x = jax.random.normal(key, (1, 5, 5, 1))
  np.testing.assert_allclose(apply(augment.affine(rotate=90), key, x)[0], np.rot90(x[0], k=-1), atol=1e-5)


def test_range_shape_and_one_draw_an_image(key):
  x = jnp.broadcast_to(jax.random.uniform(key, (1, 12, 12, 1)), (16, 12, 12, 1))
  y = apply(STRONG, key, x)
  assert y.shape == x.shape
  assert y.min() >= 0
  assert y.max() <= 1
  assert len({image.tobytes() for image in y}) == 16


@pytest.mark.parametrize("name", ["digits", "photos", "objects"])
def test_what_a_policy_draws_has_gradients_of_the_usual_size(name, key):
  """For the layer norms of D, too: R1 and VAT are of augmented images."""
  d = networks.ConvDiscriminator(3)
  x = jax.image.resize(jax.random.uniform(key, (8, 8, 8, 3)), (8, 32, 32, 3), "cubic").clip(0, 1)
  variables = d.init({"params": key, "noise": key}, x, train=False)
  real_logit = lambda x: losses.real_logit(d.apply(variables, x, train=False)[0])
  r1 = jax.jit(lambda x: penalties.squared_gradient_norm(real_logit, x).mean())
  policy = policies.POLICIES[name]
  for ranges in (policy.strong, policy.generator):
    assert r1(apply(policies.build(ranges), key, x)) < 20 * r1(x)


def test_cutout_clears_at_most_its_square(key):
  y = apply(augment.cutout(0.5), key, np.ones((5000, 10, 10, 1), np.float32))
  cleared = (y == 0).sum(axis=(1, 2, 3))
  assert cleared.max() == 25
  assert cleared.min() >= 4
  shares = (y == 0).mean(axis=(0, 2, 3))
  np.testing.assert_allclose(shares, shares[::-1], atol=0.02)  # half a pixel would be 0.045


@pytest.mark.parametrize("fn", [augment.affine(shift=0.1, rotate=20, scale=0.2, shear=0.2), STRONG])
def test_linear_in_the_image(fn, key):
  """So the gradient with respect to the image is exact: fn(k, x) - fn(k, 0) = J x."""
  x = jax.random.uniform(key, (3, 8, 8, 1))
  y, tangent = jax.jit(lambda x: jax.jvp(lambda x: fn(key, x), (x,), (x,)))(x)
  np.testing.assert_allclose(y, tangent, atol=1e-5)


def test_translation_is_a_numpy_shift(key):
  """By whole pixels, up to the given fraction of each side; every shift is drawn, and zeros move in."""
  x = np.asarray(jax.random.uniform(key, (1500, 8, 4, 2), minval=0.1))
  y = apply(augment.translate(0.25), jax.random.key(1), x)
  found = collections.Counter()
  for image, moved in zip(x, y, strict=True):
    padded = np.pad(image, ((2, 2), (1, 1), (0, 0)))
    windows = {(2 - i, 1 - j): padded[i : i + 8, j : j + 4] for i in range(5) for j in range(3)}
    shifts = [shift for shift, window in windows.items() if np.array_equal(window, moved)]
    assert len(shifts) == 1
    found.update(shifts)
  assert len(found) == 15
  # Uniform: each is drawn 100 times in 1,500, within six standard errors.
  assert max(abs(num - 100) for num in found.values()) < 6 * np.sqrt(1500 * 1 / 15 * 14 / 15)


@pytest.mark.parametrize("side", [8, 12, 20, 28, 32])
def test_translation_moves_no_farther_than_its_share(side, key):
  x = np.ones((200, side, side, 1), np.float32)
  moved = side - apply(augment.translate(0.125), key, x)[..., 0].max(axis=2).sum(axis=1)
  assert moved.max() == int(0.125 * side)


def test_brightness_and_contrast_follow_their_formula(key, monkeypatch):
  x = jax.random.uniform(key, (2, 3, 3, 2))
  draws = jnp.array([[0.5, -1.0], [1.0, -0.5]]).reshape(2, 2, 1, 1, 1)
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: draws)
  y = apply(augment.brightness_contrast(brightness=0.2, contrast=0.8), key, x)
  for image, found, c, b in zip(np.asarray(x), y, (1.4, 0.2), (0.2, -0.1), strict=True):
    expected = np.clip((image - image.mean()) * c + image.mean() + b, 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_brightness_alone_moves_the_mean_by_a_uniform_amount(key):
  x = np.full((2000, 2, 2, 1), np.float32(0.5))
  moved = apply(augment.brightness_contrast(brightness=0.3), key, x) - 0.5
  assert (np.ptp(moved, axis=(1, 2, 3)) < 1e-6).all()
  shifts = moved[:, 0, 0, 0]
  assert -0.3 <= shifts.min() < -0.29
  assert 0.29 < shifts.max() <= 0.3
  assert abs(shifts.mean()) < 6 * 0.3 / np.sqrt(3 * 2000)


def within_six_standard_errors(share, prob, num):
  return abs(share - prob) < 6 * np.sqrt(prob * (1 - prob) / num)


def test_half_of_the_images_are_flipped_and_twice_is_not_at_all(key):
  x = np.asarray(jax.random.uniform(key, (1000, 1, 3, 2)))
  y = apply(augment.flip, jax.random.key(1), x)
  np.testing.assert_array_equal(apply(augment.flip, jax.random.key(1), y), x)
  flipped = (y == x[:, :, ::-1]).all(axis=(1, 2, 3))
  assert (flipped | (y == x).all(axis=(1, 2, 3))).all()
  assert within_six_standard_errors(flipped.mean(), 0.5, 1000)


def test_quarter_turns_are_those_of_numpy(key):
  x, turns = jax.random.uniform(key, (5, 4, 4, 2)), jnp.array([3, 0, 2, 1, 1])
  y = jax.jit(augment.quarter_turns)(x, turns)
  for image, found, k in zip(np.asarray(x), y, turns, strict=True):
    np.testing.assert_array_equal(found, np.rot90(image, k))
  with pytest.raises(ValueError, match="not 4x3"):
    augment.quarter_turns(x[:, :, :3], turns)


def test_sometimes_is_never_half_of_the_time_or_always(key):
  x = np.zeros((1000, 1, 1, 1), np.float32)
  for prob in (0.0, 0.5, 1.0):
    share = apply(augment.sometimes(lambda key, x: x + 1, prob), key, x).mean()
    assert share == prob if prob != 0.5 else within_six_standard_errors(share, prob, 1000)


NEW = [
  augment.translate(0.2),
  augment.brightness_contrast(brightness=0.1, contrast=0.2),
  augment.flip,
  augment.sometimes(augment.translate(0.2), 0.5),
  augment.Adaptive((augment.flip, augment.translate(0.2))).at({"strength": jnp.float32(0.5)}),
]


@pytest.mark.parametrize("fn", NEW)
def test_differentiable_with_one_draw_an_image(fn, key):
  """`fn(k, x) = J x + b` where nothing is clipped, with one brightness b per image."""
  x = jnp.broadcast_to(jax.random.uniform(key, (1, 10, 10, 1), minval=0.4, maxval=0.6), (8, 10, 10, 1))
  y, tangent = jax.jit(lambda x: jax.jvp(lambda x: fn(key, x), (x,), (x,)))(x)
  shifts = np.subtract(y, tangent).reshape(8, -1)
  np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1], shifts.shape), atol=1e-6)
  assert abs(shifts).max() <= 0.1 + 1e-6
  assert len({image.tobytes() for image in np.asarray(y)}) >= 2


def test_adaptive_strength_at_its_documented_rate():
  """From 0 to 1 over `num_images` real images while the average r is above the target; then back."""
  adaptive = augment.Adaptive((), target=0.6, num_images=1000, horizon=10)
  aux, history = adaptive.init(), []
  update = jax.jit(lambda aux, sign: adaptive.update(aux, sign, 50))
  r, strength = 0.0, 0.0
  for sign in [1.0] * 50 + [-1.0] * 40:
    aux = update(aux, jnp.float32(sign))
    r += (sign - r) / 10
    strength = min(1.0, max(0.0, strength + np.sign(r - 0.6) * 50 / 1000))
    np.testing.assert_allclose([aux["overfitting"], aux["strength"]], [r, strength], atol=1e-5)
    history.append(float(aux["strength"]))
  # r passes the target after nine updates; 20 later p is 1, and stays there until r falls again.
  assert history[7] == 0 < history[8]
  assert history[26] < history[27] == 1 == history[49]
  assert history[-1] == 0


def test_adaptive_strength_zero_is_the_identity_and_one_is_the_chain(key):
  x = jax.random.uniform(key, (4, 6, 6, 1))
  adaptive = augment.Adaptive((lambda key, x: x / 2, lambda key, x: x + 1))
  np.testing.assert_array_equal(apply(adaptive.at(adaptive.init()), key, x), x)
  full = adaptive.at({"strength": jnp.float32(1)})
  np.testing.assert_allclose(apply(full, key, x), x / 2 + 1, rtol=1e-6)


# --- Pictures


@pytest.mark.parametrize(
  ("border", "mode"), [("edge", "edge"), ("mirror", "reflect"), ("zero", "constant")]
)
def test_what_is_outside_an_image_is_what_numpy_pads_with(border, mode, key, monkeypatch):
  """A shift by whole pixels and a crop of the padded image, both as far to one side as possible."""
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.ones(shape))
  farthest = lambda key, shape, low, high: jnp.broadcast_to(high - 1, shape)
  monkeypatch.setattr(jax.random, "randint", farthest)
  x = np.arange(2 * 8 * 6 * 3, dtype=np.float32).reshape(2, 8, 6, 3) / 300
  padded = np.pad(x, ((0, 0), (4, 0), (3, 0), (0, 0)), mode=mode)[:, :8, :6]
  for fn in (augment.affine(shift=0.5, border=border), augment.translate(0.5, border=border)):
    np.testing.assert_allclose(apply(fn, key, x), padded, atol=1e-5)


def pixels(key):
  """One colour per image, far enough from black and white that nothing is clipped."""
  return jax.random.uniform(key, (20, 1, 1, 3), minval=0.4, maxval=0.6)


@pytest.mark.parametrize("turns", [1, -1])
def test_a_third_of_a_turn_of_hue_is_that_of_colorsys(turns, key, monkeypatch):
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.full(shape, float(turns)))
  x = np.linspace(0.05, 0.95, 60).reshape(20, 1, 1, 3).astype(np.float32)
  x = np.random.default_rng(0).permuted(x, axis=3)
  y = apply(augment.hue(120.0), key, x)
  for before, after in zip(x[:, 0, 0], y[:, 0, 0], strict=True):
    h, s, v = colorsys.rgb_to_hsv(*before.tolist())
    np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + turns / 3) % 1, s, v), atol=1e-5)


def test_saturation_keeps_hue_and_mean_and_scales_the_chroma(key, monkeypatch):
  x = np.asarray(pixels(key))
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.full(shape, 0.5))
  y = apply(augment.saturation(0.8), key, x)
  for before, after in zip(x[:, 0, 0], y[:, 0, 0], strict=True):
    (h, s, v), (h1, s1, v1) = (colorsys.rgb_to_hsv(*a.tolist()) for a in (before, after))
    np.testing.assert_allclose([h1, s1 * v1, after.mean()], [h, 1.4 * s * v, before.mean()], atol=1e-4)


def test_so_many_are_applied_to_each_image(key):
  """Every pair out of four is drawn about equally often, and applied in order."""
  ops = [lambda key, x, k=k: 10 * x + k for k in range(1, 5)]
  y = apply(augment.some(2, *ops), key, np.zeros((1200, 1, 1, 1), np.float32)).ravel()
  pairs, counts = np.unique(y, return_counts=True)
  assert pairs.tolist() == [12, 13, 14, 23, 24, 34]
  assert all(within_six_standard_errors(count / 1200, 1 / 6, 1200) for count in counts)


def test_ranges_of_zero_change_nothing(key):
  x = jax.random.uniform(key, (4, 9, 7, 3))
  assert policies.augments() == ()
  zero = augment.chain(
    augment.affine(border="mirror"),
    augment.translate(0.0, border="edge"),
    augment.brightness_contrast(),
    augment.saturation(0.0),
    augment.hue(0.0),
    augment.cutout(0.0),
  )
  np.testing.assert_allclose(apply(zero, key, x), x, atol=1e-5)
  assert policies.build(None) is None


@pytest.mark.parametrize(("name", "channels"), [("digits", 1), ("objects", 3)])
def test_policies_draw_for_each_image_and_have_gradients_at_grey(name, channels, key):
  """Also R1 gradients through them, at grey images, including black and white, which have no hue."""
  strong = policies.POLICIES[name].strong
  fn = augment.chain(policies.build(strong), *policies.augments(**policies.POLICIES[name].generator))
  ramp = np.linspace(0.0, 1.0, 12, dtype=np.float32).reshape(1, 1, 12, 1)
  x = np.broadcast_to(ramp, (8, 12, 12, channels))

  def real(x):
    y = fn(key, x)
    return jnp.square(y).sum(), y

  def r1(x):
    first, y = jax.grad(real, has_aux=True)(x)
    return jnp.square(first).sum(), (first, y)

  run = jax.jit(jax.grad(r1, has_aux=True))  # one program: the chain is long
  second, (first, y) = run(x)
  _, (_, alone) = run(np.concatenate([x[:1], np.zeros_like(x[1:])]))
  assert y.shape == x.shape
  assert 0 <= y.min() <= y.max() <= 1
  assert len({image.tobytes() for image in np.asarray(y)}) == 8
  for grads in (first, second):
    assert np.isfinite(grads).all()
    assert np.any(grads, axis=(1, 2, 3)).all()
  np.testing.assert_allclose(alone[0], y[0], atol=1e-6)  # it does not depend on the other images


def test_the_policy_of_a_shape():
  assert policies.suited((1, 64, 1)) == "none"
  assert policies.suited((28, 28, 1)) == policies.suited((28, 28, 1), mirror=True) == "digits"
  assert policies.suited((32, 32, 3)) == "photos"
  assert policies.suited((96, 64, 3), mirror=True) == "objects"


@pytest.mark.parametrize("border", ["mirror", "edge"])
def test_a_side_of_one_pixel_has_no_outside(border):
  x = np.ones((5, 1, 8, 1), np.float32)
  shift = augment.affine(shift=0.3, border=border)
  np.testing.assert_allclose(apply(shift, jax.random.key(0), x), x, atol=1e-6)
