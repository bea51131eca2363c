"""What packages are on disk: Core ML's, or Core AI's assets."""

PACKAGE, ASSET = ".mlpackage", ".aimodel"
# Of an asset: the program and its weights, the sha256 of that, and what is told of them.
PROGRAM, DIGEST, METADATA = "main.mlirb", "main.hash", "metadata.json"
# One of these lies in the folder that is a package, an asset, or a compiled model.
MARKS = ("Manifest.json", METADATA, "coremldata.bin", "model.mil")
