import jax.numpy as jnp
import pytest
from conftest import leaves_equal

from gan_jax import checkpoint
from gan_jax.types import InputError


def test_a_state_comes_back_bit_for_bit(tiny, make_tiny, tmp_path):
  state = tiny.state().replace(step=jnp.int32(7), aux={"strength": jnp.float32(0.1)})
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.latest_step is None
    checkpoints.save(state)
    checkpoints.save(state)
  like = make_tiny(seed=1).state().replace(aux={"strength": jnp.float32(0)})
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.latest_step == 7
    assert all(leaves_equal(checkpoints.restore(like), state))


def test_the_last_two_are_kept(tiny, tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(tiny.state().replace(step=jnp.int32(step)))
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["10", "2"]


def test_another_model_is_refused(tiny, make_tiny, tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(tiny.state())
    with pytest.raises(InputError, match=r"of another model, or damaged: .* is .* there and .* here"):
      checkpoints.restore(make_tiny(network="mlp").state())


@pytest.mark.parametrize("call", ["metadata", "load"])
def test_a_damaged_checkpoint_is_refused(tiny, tmp_path, monkeypatch, call):
  """Orbax's storage raises many things; all of them end in one sentence."""

  def fail(*_):
    raise ValueError("DATA_LOSS: truncated")

  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(tiny.state())
    monkeypatch.setattr(checkpoints._checkpointer, call, fail)
    with pytest.raises(InputError, match=r"c/0 is damaged"):
      checkpoints.restore(tiny.state())
