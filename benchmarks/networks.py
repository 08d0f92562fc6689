"""Cost of each pair of networks at each size of colour pictures.

python -m benchmarks.networks
python -m benchmarks.networks --networks vgg --sides 32 64 --name vgg

Parameters, operations of the forward pass for one image, and the step of the semi-supervised GAN of
`ssgan.tuned`: steps per second, and memory by the compiler's count, of the state and of a step's
temporaries. The images are random.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, get_args

import jax

from benchmarks import _recipes, _runs, _worker
from gan_jax import provenance
from gan_jax.recipes import Recipe, ssgan
from gan_jax.types import Json

BATCH = 64
"""Batch size at which the operations per image are counted."""


def main() -> None:
  parser = _runs.parser(__doc__, "networks")
  add, names = parser.add_argument, [name for name in get_args(ssgan.Tuned) if name != "mlp"]
  add("--networks", nargs="+", choices=get_args(ssgan.Tuned), default=names, help="pairs to measure")
  add("--sides", type=_runs.positive, nargs="+", default=[32, 64, 96, 128], help="of square pictures")
  add("--seconds", type=_runs.seconds, default=10.0, help="of steps a pair and side (10)")
  args = parser.parse_args()
  results = []
  for network in args.networks:
    for side in args.sides:
      line = {"benchmark": "networks", "network": network, "side": side}
      results.append({**line, **measure(network, side, args.seconds), **provenance.environment()})
      print(json.dumps(results[-1]), flush=True)
  _runs.finish(args.name, results, table)


def measure(network: ssgan.Tuned, side: int, seconds: float) -> Json:
  """The measurements of a line of the results."""
  dataset = _recipes.random_images(side, channels=3)
  hparams = ssgan.tuned(network, len(dataset.x_train), "photos")
  recipe = ssgan.build(hparams, dataset.image_shape, dataset.num_classes)
  ours = _worker.Ours(recipe, *_recipes.start(recipe, dataset, [0]))
  memory: Any = ours.compiled.memory_analysis()
  state = ours.state
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  ours.run(1)  # the first step may load what it needs
  ours.synchronize()
  begin = time.perf_counter()
  ours.run(1)
  ours.synchronize()
  num = max(3, round(seconds / (time.perf_counter() - begin)))
  rate = num / _worker.seconds(ours, num)
  leaves = jax.tree.leaves((state.g, state.d, state.ema))
  return {
    "d_parameters": size(state.d.params),
    "g_parameters": size(state.g.params),
    **{f"{name}_mflop": round(flops / 1e6, 2) for name, flops in forward_flops(recipe).items()},
    "rows": list(recipe.batch),
    "steps": num,
    "steps_per_second": rate,
    "seconds_compile": round(ours.seconds_compile, 1),
    "state_mb": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20,
    "step_mb": memory.temp_size_in_bytes / 2**20,
  }


def forward_flops(recipe: Recipe) -> dict[str, float]:
  """Operations of D and of G for one image, by the compiler's count."""
  state = recipe.abstract_state()
  x = jax.ShapeDtypeStruct((BATCH, *recipe.image_shape), "float32")
  z = jax.eval_shape(lambda: recipe.g.latents(jax.random.key(0), BATCH))
  found = {}
  for name, network, net, given in (("d", recipe.d, state.d, x), ("g", recipe.g, state.g, z)):
    apply = lambda variables, given, network=network: network.apply(variables, given, train=False)
    found[name] = provenance.flops(apply, {"params": net.params, **net.model_state}, given) / BATCH
  return found


def table(results: Sequence[dict]) -> str:
  """Markdown: one row per pair and size."""
  rows = []
  for line in results:
    rows.append([f"{line['network']}{_runs.mark(line)}", f"{line['side']}x{line['side']}"])
    for name in ("d", "g"):
      rows[-1].append(f"{line[f'{name}_parameters'] / 1e6:.2f} M, {line[f'{name}_mflop']:.0f}")
    rows[-1] += [f"{line['steps_per_second']:.3g}", f"{line['state_mb']:.0f} MB, {line['step_mb']:,.0f} MB"]
  head = "pair", "pictures", "D: parameters, MFLOP an image", "G: the same", "steps/s", "state, one step"
  sizes = dict.fromkeys("/".join(map(str, line["rows"])) for line in results)
  note = f"Steps of {_runs.listed([*sizes])} labelled/unlabelled/generated images."
  return _runs.with_environment(_runs.markdown(head, rows), results, note)


if __name__ == "__main__":
  _runs.cli(main)
