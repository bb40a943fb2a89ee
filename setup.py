"""Beyond pyproject.toml: a wheel carries files of the top-level folders inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# What `serve` and `demo` need besides the package, at its place in the source tree: see serving/machine.py.
CARRIED = ("client/*.py", "model_repository/**/*", "build/deploy/*.yaml", "build/tiny_bagel/checkpoint/*")


class BuildPy(build_py):
    """An editable install runs from the source tree, which has these files already."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in (path for pattern in CARRIED for path in ROOT.glob(pattern)):
            if source.is_file() and "__pycache__" not in source.parts:
                target = Path(self.build_lib, "bagel_triton", "source_tree", source.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildPy})
