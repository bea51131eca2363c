"""Python runs this at start when this folder is on PYTHONPATH: the process gets the stand-in."""

from ane_moe.absent_modules import absent_modules
from ane_moe.runtime.coreml.trial import OF_CONVERTERS
from tests.standin.install import install
from tests.standin.script import current

with absent_modules(*(() if current().converts else OF_CONVERTERS)):
    install()
