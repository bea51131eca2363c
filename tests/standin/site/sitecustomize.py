"""Python runs this at start when this folder is on PYTHONPATH: the process gets the stand-in."""

from tests.standin.install import install

install()
