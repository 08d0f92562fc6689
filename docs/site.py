"""Builds the documentation site in build/site: `python docs/site.py`. A warning is an error.

The pages are the repository's own files, staged in the same layout so that the links between them hold, and
pages of docstrings.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
FILES = ("*.md", "LICENSE", "CITATION.cff", "docs/*.md", "docs/*.ipynb", "benchmarks/README.md")
RECORDS = "benchmarks/results"

ROOMS = {
  "core": "types losses penalties terms objectives steps augment networks kernels",
  "recipes": "recipes recipes.ssgan recipes.gan recipes.study recipes.policies",
  "data": "dataset datasets prepared data stream pictures",
  "training": "train replicates log parallel processes checkpoint",
  "evaluation": "evaluate metrics probe diagnostics",
  "use": "model estimator export classify commands figures report report_sections",
  "runs": "cli parsing program output run_dir provenance memory overwrite results",
}
"""Pages of docstrings, and the modules on each."""

LINKS = {"docs/digits.ipynb)": "docs/digits.md)", f"../{RECORDS})": f"../{RECORDS}/index.md)"}
"""Links to what a Git host shows and a browser does not: a notebook, a folder."""


def write(name: str, text: str) -> None:
  path = PAGES / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def stage() -> None:
  """Rebuilds `build/pages`."""
  shutil.rmtree(PAGES, ignore_errors=True)
  shutil.copytree(ROOT / RECORDS, PAGES / RECORDS)
  for path in (path for pattern in FILES for path in ROOT.glob(pattern)):
    text = path.read_text()
    for link, target in LINKS.items():
      text = text.replace(link, target)
    write(path.relative_to(ROOT).as_posix(), text)
  for room, modules in ROOMS.items():
    write(
      f"api/{room}.md", "\n\n".join([f"# {room.title()}", *map("::: gan_jax.{}".format, modules.split())])
    )
  page = as_page((ROOT / "docs" / "digits.ipynb").read_text())
  write("docs/digits.md", f"{page}\n\n[The notebook](digits.ipynb)\n")
  records = sorted(path.relative_to(PAGES / RECORDS).as_posix() for path in (PAGES / RECORDS).rglob("*.*"))
  write(f"{RECORDS}/index.md", "\n".join(["# Records\n", *(f"- [{name}]({name})" for name in records)]))


def as_page(notebook: str) -> str:
  """The cells of a notebook as Markdown."""
  around = {"markdown": "{}", "code": "```python\n{}\n```"}
  cells = json.loads(notebook)["cells"]
  return "\n\n".join(around[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)


if __name__ == "__main__":
  stage()
  quiet = {"NO_MKDOCS_2_WARNING": "1"}  # it warns that Material ends in 2027, see mkdocs.yml
  build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
  sys.exit(subprocess.run(build, env=os.environ | quiet).returncode)
