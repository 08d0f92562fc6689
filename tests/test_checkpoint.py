import errno
import gc
import os
import shutil

import jax
import jax.numpy as jnp
import pytest
from conftest import Tiny, leaves_equal
from orbax.checkpoint import v1

from gan_jax import checkpoint, networks
from gan_jax.types import InputError


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (ValueError("RESOURCE_EXHAUSTED: Failed writing"), InputError),
    (OSError(errno.ENOSPC, "No space left on device"), InputError),
    (ValueError("another"), ValueError),
  ],
)
def test_a_full_disk_is_a_sentence(error, kind, tiny, tmp_path, monkeypatch):
  """Earlier checkpoints stay intact."""
  before = tiny.state()

  def full(*_, **__):
    raise error

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(before)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(v1.training.Checkpointer, "save", full)
    with pytest.raises(kind, match="the disk is full" if kind is InputError else "another"):
      checkpoints.save(before.replace(step=before.step + 1))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert all(leaves_equal(checkpoints.restore(before), before))


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


def test_a_key_of_any_implementation_comes_back(tiny, tmp_path):
  state = tiny.state().replace(key=jax.random.key(3, impl="rbg"))
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(state)
    assert all(leaves_equal(checkpoints.restore(state), state))


def test_the_last_two_are_kept(tiny, tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(tiny.state().replace(step=jnp.int32(step)))
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["10", "2"]


def test_another_model_is_refused(make_tiny, tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(make_tiny(network="conv").state())
    with pytest.raises(InputError, match=r"of another model, or damaged: .* is .* there and .* here"):
      checkpoints.restore(make_tiny(network="mlp").state())


def later(tree):
  return jax.tree.map(lambda a: a + 1, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Two states, and the folder of their checkpoints."""
  first, folder = Tiny().state(), tmp_path_factory.mktemp("two") / "checkpoints"
  states = first.replace(step=first.step + 10), first.replace(step=first.step + 20, ema=later(first.ema))
  with checkpoint.Checkpoints(folder) as checkpoints:
    for state in states:
      checkpoints.save(state, {"step": int(state.step)})
  return *states, folder


@pytest.fixture
def two(saved, tmp_path):
  """The two states, and a function that damages files of the newest checkpoint by path prefix."""
  *states, folder = saved
  shutil.copytree(folder, tmp_path / "checkpoints")

  def damage(change, name):
    files = [path for path in (tmp_path / "checkpoints" / "20").rglob("*") if path.is_file()]
    chosen = [path for path in files if str(path).rpartition("/20/")[2].startswith(name)]
    assert chosen
    for path in chosen:
      content = bytearray(path.read_bytes())
      if change == "flip":
        content[len(content) // 2] ^= 1
      path.unlink()
      if change != "remove":
        path.write_bytes(content[: len(content) // 2] if change == "cut" else content)

  yield *states, damage
  gc.collect()  # Orbax's leftovers of a failure warn when collected: not in another test


leftovers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DAMAGE = [
  ("cut", "state/ocdbt.process_0/d/"),  # the arrays
  ("cut", "state/_METADATA"),  # the structure
  ("cut", "_CHECKPOINT_METADATA"),  # the checksums
  ("remove", ""),
]


@leftovers
@pytest.mark.parametrize(("change", "name"), DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(two, change, name, tiny, tmp_path, capsys):
  """Both are named. The damaged one is kept, but no longer as the newest: the run resumes and saves."""
  before, newest, damage = two
  folder = tmp_path / "checkpoints"
  damage(change, name)
  assert all(leaves_equal(checkpoint.restore_averages(tmp_path, before).ema, before.ema))
  assert capsys.readouterr().err == f"{folder}/20 is damaged: using the previous checkpoint, 10, instead\n"
  assert sorted(os.listdir(folder)) == ["10", "20"]
  with checkpoint.Checkpoints(folder) as checkpoints:
    assert all(leaves_equal(checkpoints.restore(tiny.state()), before))
    assert (checkpoints.latest_step, checkpoints.extra) == (10, {"step": 10})
    checkpoints.save(newest)
    assert all(leaves_equal(checkpoints.restore(tiny.state()), newest))
  assert sorted(os.listdir(folder)) == ["10", "20", "20.damaged"]


@leftovers
def test_a_flipped_bit_is_found(two, tiny, tmp_path):
  """Orbax alone would restore it silently."""
  before, _, damage = two
  damage("flip", "state/ocdbt.process_0/d/")
  assert all(leaves_equal(checkpoint.Checkpoints(tmp_path / "checkpoints").restore(tiny.state()), before))


@leftovers
def test_without_a_whole_checkpoint_there_is_a_sentence(two, tiny, tmp_path):
  damage = two[-1]
  damage("cut", "state/ocdbt.process_0/d/")
  shutil.rmtree(tmp_path / "checkpoints" / "10")
  sentence = "checkpoints/20 is damaged and no earlier checkpoint is intact: start a new run"
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
  with pytest.raises(InputError, match=sentence):
    checkpoints.restore(tiny.state())
  with pytest.raises(InputError, match=sentence):
    checkpoint.transfer(tiny.state(), tmp_path, layers=layers(tiny))
  assert os.listdir(tmp_path / "checkpoints") == ["20"]


@pytest.mark.parametrize(
  ("error", "kind", "words"),
  [
    (PermissionError(13, "Permission denied"), InputError, "checkpoints cannot be read: permission denied"),
    (ValueError("PERMISSION_DENIED: Error opening"), InputError, "cannot be read: permission denied"),
    (MemoryError("no memory"), MemoryError, "no memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError, "RESOURCE_EXHAUSTED"),
  ],
)
def test_what_another_attempt_may_not_meet_is_not_damage(
  two, error, kind, words, tiny, tmp_path, monkeypatch
):
  """No checkpoint is set aside, and nobody is told to start anew."""

  def fail(*_, **__):
    raise error

  monkeypatch.setattr(checkpoint._orbax(), "load", fail)
  with pytest.raises(kind, match=words):
    checkpoint.Checkpoints(tmp_path / "checkpoints").restore(tiny.state())
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "20"]


# --- Starting from another run


@pytest.fixture
def source(make_tiny, tmp_path):
  """Saves a run whose averages are far from its parameters; returns its state and its folder."""

  def save(**kwargs):
    tiny = make_tiny(seed=5, **kwargs)
    first = tiny.state()
    g, d = (net.replace(model_state=later(net.model_state)) for net in (first.g, first.d))
    state = first.replace(step=later(first.step), g=g, d=d, ema=later(first.ema))
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
      checkpoints.save(first)
      checkpoints.save(state)
    return state, tmp_path / "run"

  return save


def layers(tiny):
  return tiny.d.layers((8, 8, 1))


def averaged(state, part):
  return {"params": state.ema[part], **getattr(state, part).model_state}


def started(state, part):
  net = getattr(state, part)
  return {"params": net.params, **net.model_state}


@pytest.mark.parametrize(("network", "parts"), [("mlp", ("g", "d")), ("plain", ("g",)), ("plain", ("d",))])
def test_a_state_starts_from_the_averages_of_another_run(source, make_tiny, network, parts):
  trained, folder = source(network=network)
  tiny = make_tiny(network=network)
  fresh = tiny.state()
  state, notes = checkpoint.transfer(fresh, folder, layers=layers(tiny), parts=parts)
  assert notes == []
  for part in ("g", "d"):
    expected = averaged(trained if part in parts else fresh, part)
    assert all(leaves_equal(started(state, part), expected))
    assert all(leaves_equal(averaged(state, part), expected))
    assert all(leaves_equal(getattr(state, part).opt_state, getattr(fresh, part).opt_state))
  assert all(leaves_equal([state.step, state.key], [fresh.step, fresh.key]))
  buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.ema, state.g, state.d))]
  assert len(set(buffers)) == len(buffers)  # otherwise it could not be donated


def test_a_new_head_is_said(source, make_tiny):
  trained, folder = source()
  tiny = make_tiny()
  tiny.d = tiny.d.clone(num_classes=5, num_aux=2)
  fresh = tiny.state()
  state, notes = checkpoint.transfer(fresh, folder, layers=layers(tiny))
  assert notes == [
    "D's aux_head is new: 2 outputs here, none there",
    "D's head is new: 5 outputs here, 3 outputs there",
  ]
  for params in (state.d.params, state.ema["d"]):
    for name, layer in params.items():
      origin = fresh if name in ("head", "aux_head") else trained
      assert all(leaves_equal(layer, origin.ema["d"][name])), name


def test_a_head_that_is_not_here_is_left_behind(make_tiny, tmp_path):
  """With spectral norm, the non-parameter variables of a head are left behind as well."""
  tiny, like = make_tiny(), make_tiny(seed=1)
  like.d = tiny.d.clone(norm="spectral")
  tiny.d = tiny.d.clone(norm="spectral", num_aux=2)
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(tiny.state())
  state, notes = checkpoint.transfer(like.state(), tmp_path, layers=layers(like), parts=("d",))
  assert notes == ["D's aux_head is not transferred: none here, 2 outputs there"]
  expected = averaged(tiny.state(), "d")
  for collection in expected.values():
    collection.pop("aux_head")
  assert all(leaves_equal(averaged(state, "d"), expected))


def test_networks_of_another_kind_or_size_are_refused(source, make_tiny):
  _, folder = source(network="conv")
  mlp = make_tiny(network="mlp")
  with pytest.raises(InputError, match=r"of another kind .*: .* is .* there and .* here"):
    checkpoint.transfer(mlp.state(), folder, layers=layers(mlp))
  other = make_tiny(network="conv")
  other.g = networks.ConvGenerator((16, 16, 1), width=8, latent_size=4)
  with pytest.raises(
    InputError, match=r"size: ema/g/Linear_0/.*kernel is \(4, 32\) there and \(4, 128\) here"
  ):
    checkpoint.transfer(other.state(), folder, layers=layers(other))
  state, notes = checkpoint.transfer(other.state(), folder, layers=layers(other), parts=("d",))
  assert notes == []
  assert all(leaves_equal(state.g, other.state().g))


def test_a_run_without_a_checkpoint_is_refused(tiny, tmp_path):
  for folder in ("nowhere", "empty"):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=f"{folder} holds no checkpoint: name a run that has saved one"):
      checkpoint.transfer(tiny.state(), tmp_path / folder, layers=layers(tiny))
  assert not (tmp_path / "nowhere").exists()


def test_the_other_run_is_left_as_it_is(source, make_tiny):
  """Half-written checkpoints too: it may still be running."""
  _, folder = source()
  half = folder / "checkpoints" / "7.orbax-checkpoint-tmp-1"
  half.mkdir()
  (half / "data").write_text("half")

  def snapshot():
    paths = sorted(folder.rglob("*"))
    return [(p, os.stat(p).st_mtime_ns, p.is_file() and p.read_bytes()) for p in (folder, *paths)]

  before = snapshot()
  tiny = make_tiny()
  checkpoint.transfer(tiny.state(), folder, layers=layers(tiny))
  assert snapshot() == before
