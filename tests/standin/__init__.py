"""A stand-in for `coremltools.libcoremlpython`, the native module that exists on macOS only.

It has the names, signatures, checks and errors of coremltools 9's binding
(coremlpython/CoreMLPython.mm and CoreMLPythonUtils.mm), so that coremltools' own Python classes run
on any machine; the reference runtime answers, and a `Script` makes it fail on purpose. `install.py`
says how it is put in place.
"""
