import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from gan_jax import data, evaluate, steps
from gan_jax.types import InputError


@pytest.fixture
def problem(make_tiny):
  """The tiny problem with a random discriminator whose averages differ from its parameters."""
  tiny = make_tiny(network="mlp")
  state = tiny.state()
  ema = {**state.ema, "d": jax.tree.map(lambda p: 1.5 * p, state.ema["d"])}
  return tiny, state.replace(ema=ema)


def test_errors_are_those_of_the_averaged_discriminator(problem):
  tiny, state = problem
  labelled = (tiny.data.x_lab, tiny.data.y_lab)
  (found,) = evaluate.make_evaluate(tiny.recipe())(tiny.dataset, [state], [labelled])
  classify = steps.make_classifier(tiny.d)
  x = tiny.dataset.x_test / np.float32(255)
  expected, _ = classify(state, x)
  np.testing.assert_allclose(found.logits, expected, atol=1e-5)
  wrong = found.logits.argmax(axis=1) != tiny.dataset.y_test
  assert found.error == pytest.approx(100 * wrong.mean())
  assert found.confusion.sum() == len(x)
  assert np.trace(found.confusion) == (~wrong).sum()
  assert list(found.linear) == ["features"]
  assert found.nearest == {}


def test_without_test_images_there_is_nothing_to_evaluate_on(problem):
  tiny, state = problem
  dataset = dataclasses.replace(
    tiny.dataset, x_test=tiny.dataset.x_test[:0], y_test=tiny.dataset.y_test[:0]
  )
  with pytest.raises(InputError, match="no test images to evaluate on"):
    evaluate.make_evaluate(tiny.recipe())(dataset, [state], [(tiny.data.x_lab, tiny.data.y_lab)])


def test_the_images_to_look_at_are_the_least_certain_and_the_worst_mistakes(problem):
  tiny, state = problem
  (found,) = evaluate.make_evaluate(tiny.recipe())(
    tiny.dataset, [state], [(tiny.data.x_lab, tiny.data.y_lab)]
  )
  y, probs = tiny.dataset.y_test, found.probs
  np.testing.assert_array_equal(found.y, y)
  np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
  confidence, of_truth = probs.max(axis=1), probs[np.arange(len(y)), y]
  wrong = probs.argmax(axis=1) != y
  assert 0 < wrong.sum() < len(y)
  worst = np.sort(of_truth[wrong])[: evaluate.NUM_SHOWN]
  np.testing.assert_allclose(of_truth[found.worst.indices], worst, rtol=1e-5)
  least = np.sort(confidence)[: evaluate.NUM_SHOWN]
  np.testing.assert_allclose(confidence[found.least_certain.indices], least, rtol=1e-5)
  for shown in (found.least_certain, found.worst):
    np.testing.assert_array_equal(shown.x, tiny.dataset.x_test[shown.indices])
    np.testing.assert_array_equal(shown.y, y[shown.indices])
    np.testing.assert_array_equal(shown.probs, probs[shown.indices])


def test_parts_pooled_are_the_whole(problem):
  """The test set in three parts, out of order, against the whole test set."""
  tiny, state = problem
  read, labelled = (
    evaluate.make_evaluate(tiny.recipe(), every_layer=True),
    (tiny.data.x_lab, tiny.data.y_lab),
  )
  (whole,) = read(tiny.dataset, [state], [labelled])
  rows = np.random.default_rng(0).permutation(len(tiny.dataset.y_test))
  rows, parts = np.split(rows, [5, 17]), []
  for each in rows:
    x, y = tiny.dataset.x_test[each], tiny.dataset.y_test[each]
    parts += read(dataclasses.replace(tiny.dataset, x_test=x, y_test=y), [state], [labelled])
  pooled = evaluate.pooled(parts, data.Chosen(tiny.dataset.x_test, np.concatenate(rows)))
  assert len({each.error for each in parts}) > 1
  for name in ("error", "linear", "nearest"):
    assert getattr(pooled, name) == pytest.approx(getattr(whole, name))
  np.testing.assert_array_equal(pooled.confusion, whole.confusion)
  np.testing.assert_array_equal(pooled.y, whole.y[np.concatenate(rows)])
  np.testing.assert_allclose(pooled.logits, whole.logits[np.concatenate(rows)], rtol=1e-5, atol=1e-6)
  for name in ("least_certain", "worst"):
    a, b = getattr(pooled, name), getattr(whole, name)
    np.testing.assert_allclose(a.probs, b.probs, rtol=1e-5)
    np.testing.assert_array_equal(tiny.dataset.x_test[a.indices], a.x)


def test_what_a_result_holds_of_an_evaluation():
  """By hand, and as JSON; a class without test images has no recall."""
  logits, y = np.log(np.array([[0.8, 0.1, 0.1]] * 4, np.float32)), np.array([0, 0, 1, 0])
  found = evaluate.Evaluation(25.0, {}, {}, logits, y, np.zeros((4, 8, 8, 1), np.uint8), np.arange(4))
  described = json.loads(json.dumps(evaluate.describe(found, "abc"), allow_nan=False))
  low, high = described.pop("test_error_interval")
  assert 0 < low < 25 < high < 100
  assert described == {
    "num_test_images": 4,
    "balanced_test_error": 50.0,
    "test_recall": {"a": 100.0, "b": 0.0, "c": None},
    "calibration_error": pytest.approx(0.05, rel=1e-5),
  }


def test_probes_are_fitted_on_the_labelled_images_of_each_state_alone(problem):
  """scikit-learn's, from the same few labels; fitted on others, or on test labels, they differ."""
  tiny, state = problem
  rows = ([0, 1, 20, 21, 40, 41], [5, 6, 27, 29, 53, 58])
  y = tiny.dataset.y_train
  # Wrong labels, so that a probe fitted on these few is far from one fitted on the test labels.
  wrong = np.roll(y, 20)
  labelled = [(tiny.dataset.x_train[r], wrong[r]) for r in rows]
  evaluated = evaluate.make_evaluate(tiny.recipe(), every_layer=True)
  found = evaluated(tiny.dataset, [state, state], labelled)
  read = lambda x: np.asarray(steps.make_classifier(tiny.d)(state, x / np.float32(255))[1])
  features = read(tiny.dataset.x_test)
  for each, (x_lab, y_lab) in zip(found, labelled, strict=True):
    h = read(x_lab)
    mean, std = h.mean(axis=0), h.std(axis=0)
    std = np.where(std > 1e-8, std, np.inf)
    z, z_test = (h - mean) / std, (features - mean) / std
    for classifier, errors in (
      (LogisticRegression(tol=1e-6, max_iter=10_000), each.linear),
      (KNeighborsClassifier(1), each.nearest),
    ):
      expected = 100 * np.mean(classifier.fit(z, y_lab).predict(z_test) != tiny.dataset.y_test)
      assert set(errors) == {"Block_0", "Block_1"}
      assert errors["Block_1"] == pytest.approx(expected)
      assert errors["Block_1"] > 60  # wrong labels; a probe fitted on the test labels has no such error


def test_of_the_test_images_only_logits_and_classes_are_held(problem, monkeypatch):
  """Features of a million images, at every layer, would fill the memory."""
  tiny, state = problem
  predict, held = evaluate.metrics.predict, []
  monkeypatch.setattr(evaluate.metrics, "predict", lambda *args: held.append(predict(*args)) or held[-1])
  evaluated = evaluate.make_evaluate(tiny.recipe(), every_layer=True, of_input=True)
  (found,) = evaluated(tiny.dataset, [state], [(tiny.data.x_lab, tiny.data.y_lab)])
  assert set(found.linear) == set(found.nearest) == {"Block_0", "Block_1", "input"}
  num, shapes = len(tiny.dataset.x_test), [a.shape for a in jax.tree.leaves(held[-1])]
  assert sorted(shapes) == [*[(num,)] * 6, (num, 3)]


def test_probes_are_fitted_on_evenly_spaced_labels_of_many(problem, monkeypatch):
  tiny, state = problem
  monkeypatch.setattr(evaluate, "NUM_PROBED", 30)
  x, y = tiny.dataset.x_train, tiny.dataset.y_train
  evaluated = evaluate.make_evaluate(tiny.recipe())
  of_all, of_half = evaluated(tiny.dataset, [state] * 2, [(x, y), (x[::2], y[::2])])
  assert len(y) == 60
  assert of_all.linear == of_half.linear
  monkeypatch.setattr(evaluate, "NUM_PROBED", 60)
  (whole,) = evaluated(tiny.dataset, [state], [(x, y)])
  assert whole.linear != of_half.linear


def test_the_test_set_is_opened_once_for_all_states(problem, monkeypatch):
  tiny, state = problem
  opened = []
  monkeypatch.setattr(evaluate, "with_test_set", lambda dataset: opened.append(dataset) or dataset)
  labelled = [(tiny.data.x_lab, tiny.data.y_lab)] * 3
  found = evaluate.make_evaluate(tiny.recipe())(tiny.dataset, [state] * 3, labelled)
  assert len(opened) == 1
  assert len({each.error for each in found}) == 1


def test_a_discriminator_without_classes_has_probes_alone(make_tiny):
  tiny = make_tiny(network="mlp")
  tiny.d = tiny.d.clone(num_classes=1)
  labelled = [(tiny.data.x_lab, tiny.data.y_lab)]
  (found,) = evaluate.make_evaluate(tiny.recipe())(tiny.dataset, [tiny.state()], labelled)
  assert found.error is None
  assert 0 <= found.linear["features"] <= 100


def test_samples_depend_on_seed_and_purpose_and_are_as_many_as_asked_for(problem):
  tiny, state = problem
  draw = lambda num, **kwargs: evaluate.sample(tiny.recipe(), state, num, **{"seed": 0, **kwargs})
  x = draw(501)
  assert x.shape == (501, 8, 8, 1)
  assert 0 <= x.min() <= x.max() <= 1
  np.testing.assert_array_equal(draw(501), x)
  np.testing.assert_allclose(draw(1), x[:1], atol=1e-6)  # also by a generator of `norm="shift"`, as here
  assert not np.array_equal(draw(501, seed=7), x)
  assert not np.array_equal(draw(501, purpose="frechet"), x)
  assert not np.array_equal(draw(501, purpose="frechet"), draw(501, seed=1))
  assert not np.array_equal(x[500], x[0])  # each batch has its own key


def test_samples_are_of_the_classes_asked_for(make_tiny):
  tiny = make_tiny(network="mlp")
  tiny.g = tiny.g.clone(num_classes=3, norm="none")
  state, y = tiny.state(), np.arange(600) % 3
  seen = []
  tiny.g = tiny.g.clone(activation=lambda h: seen.append(h.shape) or jnp.tanh(h))
  x = evaluate.sample(tiny.recipe(), state, 600, seed=0, y=y)
  other = np.where(np.arange(600) == 550, (y + 1) % 3, y)
  changed = (evaluate.sample(tiny.recipe(), state, 600, seed=0, y=other) != x).any(axis=(1, 2, 3))
  assert np.flatnonzero(changed).tolist() == [550]
  # The statistics, and one program for both batches.
  assert [shape[0] for shape in seen] == [steps.NUM_STATISTICS, 500]
