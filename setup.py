"""One thing that pyproject.toml cannot say: where an editable install comes when Python looks for avsep.

setuptools finds such an install only after all of sys.path (pypa/setuptools#3557). The root of a clone is called avsep
too, and has no __init__.py. So in the folder that holds a clone, `import avsep` would give an empty namespace package,
without an error. A line in a .pth file moves the finder to the front.
"""

import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel
from wheel.wheelfile import WheelFile  # setuptools brings it

_LINE = (
    "import sys; sys.meta_path.sort(key=lambda f: not getattr(f, '__module__', '').startswith('__editable___avsep_'))\n"
)


class EditableWheel(editable_wheel):
    """Adds the line to what setuptools made; sorted after its own .pth file, which installs the finder."""

    def run(self) -> None:
        super().run()
        (made,) = Path(self.dist_dir).glob("avsep-*.editable-*.whl")
        plain = made.rename(made.with_suffix(".plain"))
        with zipfile.ZipFile(plain) as source, WheelFile(made, "w") as wheel:
            for item in source.infolist():
                if not item.filename.endswith(".dist-info/RECORD"):  # written anew when the wheel is closed
                    wheel.writestr(item, source.read(item))
            wheel.writestr("avsep_comes_first.pth", _LINE)
        plain.unlink()


setup(cmdclass={"editable_wheel": EditableWheel})
