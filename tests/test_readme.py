import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import jax
import pytest

import gan_jax
from gan_jax import __main__, classify, data, networks, parsing, recipes
from gan_jax.commands import CONFIGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(path: Path) -> list[str]:
  return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_examples_of_the_readme_run_and_are_short():
  estimator, functional = python_blocks(ROOT / "README.md")
  assert max(len(block.strip().splitlines()) for block in (estimator, functional)) < 20
  namespace = {}
  assert "num_steps=300" in estimator
  exec(estimator.replace("num_steps=300", 'num_steps=3, network="article"'), namespace)
  assert namespace["gan"].n_iter_ == 3
  exec(functional, namespace)  # it asserts its own result
  assert namespace["states"][0].step == 200


def test_what_extending_builds_can_be_trained(monkeypatch):
  for module, table in ((networks, "PAIRS"), (recipes, "FAMILIES")):
    monkeypatch.setattr(module, table, dict(getattr(module, table)))
  namespace = {}
  for block in python_blocks(ROOT / "docs" / "extending.md"):
    exec(block, namespace)
  for name, metric in (
    ("with_loss", "d/interpolation"),
    ("with_network", "d/loss"),
    ("of_family", "d/interpolation"),
  ):
    recipe = namespace[name]
    state = jax.eval_shape(recipe.init_state, jax.random.key(0), namespace["images"])
    batch = jax.eval_shape(data.make_sample_batch(recipe.batch), jax.random.key(0), namespace["images"])
    assert metric in jax.eval_shape(recipe.make_step(), state, batch)[1]
  assert namespace["mine"].image_shape == (8, 4, 1)
  assert namespace["fit"].states.step.tolist() == [4, 4]
  assert namespace["first"].step == 4
  assert namespace["difference"].interval is not None


def test_the_notebook_runs_and_is_stored_without_outputs():
  cells = json.loads((ROOT / "docs" / "digits.ipynb").read_text())["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
  source = "\n".join("".join(cell["source"]) for cell in code)
  assert source.count("num_steps=NUM_STEPS") == 1
  namespace = {}
  exec(source.replace("num_steps=NUM_STEPS", 'num_steps=3, network="article"'), namespace)
  assert [int(fit.state.step) for fit in namespace["fits"].values()] == [3, 3]
  assert namespace["probs"].shape == (100, 10)
  tuned = recipes.ssgan.tuned("conv", num_images=len(namespace["dataset"].x_train))
  assert namespace["NUM_STEPS"] == tuned.num_steps  # as the notebook says


def test_the_citation_is_of_this_version():
  yaml = pytest.importorskip("yaml")
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["cff-version"] == "1.2.0"
  assert citation["version"] == gan_jax.__version__
  assert {"message", "title", "authors"} <= set(citation)


def test_every_public_module_is_on_a_page_of_the_site():
  pages = " ".join(runpy.run_path(str(ROOT / "docs" / "site.py"))["ROOMS"].values()).split()
  assert len(pages) == len(set(pages))
  modules = {path.stem for path in (ROOT / "gan_jax").glob("[!_]*.py")}
  packages = {path.parent.name for path in (ROOT / "gan_jax").glob("*/__init__.py")}
  assert modules | packages == {name for name in pages if "." not in name}


def test_every_fault_names_its_tests():
  rows = [
    line.split("|") for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if "::" in line
  ]
  assert len(rows) > 20
  for *_, tests, _ in rows:
    for file, name in re.findall(r"`([\w./]+)(?:::(\w+))?`", tests):
      assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).exists(), (file, name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
  text = path.read_text()
  for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
    file, _, anchor = link.partition("#")
    if re.match(r"[a-z]+:", link):
      continue
    target = (path.parent / file).resolve() if file else path
    assert target.exists(), f"{path.name}: {link}"
    if anchor:
      titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
      assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_takes_its_flags(path):
  """Experiments and, after a bare --, the flags that a benchmark passes to mnist_ssgan."""
  text = path.read_text()
  commands = re.findall(r"python -m experiments\.(\w+)([^`\n|]*)", text)
  commands += [
    ("mnist_ssgan", flags)
    for flags in re.findall(r"python -m benchmarks\.(?:splits|startup) [^`\n|]*? -- ([^`\n|]*)", text)
  ]
  for name, flags in commands:
    module = importlib.import_module(f"experiments.{name}")
    parsing.check(parsing._parse(module.Config, shlex.split(flags, comments=True)))
  for name, flags in re.findall(r"(?:python -m gan_jax|gan-jax) (\w+) ([^`\n|]*)", text):
    assert name in __main__.COMMANDS
    config = classify.Config if name == "train" else CONFIGS[name][1]
    parsing._parse(config, shlex.split(flags, comments=True))  # RUN is not a run
