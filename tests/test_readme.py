import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_library_example_runs_and_is_short():
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
  assert len(blocks) == 1
  assert len(blocks[0].strip().splitlines()) < 30
  namespace = {}
  exec(blocks[0], namespace)  # it asserts its own result
  assert int(namespace["state"].step) > 0
