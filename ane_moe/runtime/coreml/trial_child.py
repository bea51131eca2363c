"""The child's side of a trial: load a function and run it on zeros."""

from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.runtime.coreml.modelc_cache import ModelCache
from ane_moe.runtime.coreml.trial import Trial, serve


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from ane_moe.runtime.coreml.runtime import load_function  # coremltools, as `serve` imports it

    trial = Trial(**request)
    try:
        cache = ModelCache(Path(trial.cache_folder), trial.limit_bytes, trial.os_build)
        function = load_function(
            Path(trial.package), trial.function, units=trial.units, cache=cache, trial=False
        )
        function.run_on_zeros()
    except UserError as error:
        return {"error": {"what": error.what, "found": error.found, "do": error.do}}
    return {}


if __name__ == "__main__":
    serve(_answer)
