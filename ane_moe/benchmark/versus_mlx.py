"""The same prompt through mlx-lm on the same Mac, in a process of its own.

The child's side of it (`python -m ane_moe.benchmark.versus_mlx`) follows mlx_lm/benchmark.py: no
end-of-text id ends a run early, one run warms up, and the rates are mlx-lm's own
(`GenerationResponse`).
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ane_moe.benchmark.result import Side, Versus
from ane_moe.errors import UserError
from ane_moe.manifest import Manifest

TIME_LIMIT_SECONDS = 1800
MISSING = 3  # the child's exit code when there is no mlx-lm
GIGA = 1_000_000_000  # mlx-lm reports peak memory in these
REMARK = (
    "mlx-lm computes on the GPU, which usually wins on tok/s; the Neural Engine's case is energy "
    "and a free GPU. "
    "Weight formats differ where the two lines say so."
)
SAME = {"hidden_size": "d_model", "vocab_size": "vocab", "num_hidden_layers": "n_layers"}


def run_mlx(model: Path, manifest: Manifest, ours: Side, prompt: Sequence[int]) -> Versus:
    """`ours` beside mlx-lm's rates for the model in the folder `model`: same prompt ids, same
    number of new tokens.

    Raises UserError when mlx-lm is not installed, fails, or the folder is of another model.
    """
    config = _config(model)
    _require_same(config, manifest, model)
    request = {
        "model": str(model),
        "prompt": list(prompt),
        "new_tokens": ours.new_tokens,
        "runs": ours.runs,
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            "mlx-lm did not finish", f"no answer within {TIME_LIMIT_SECONDS} s"
        ) from None
    if child.returncode == MISSING:
        raise UserError(
            "--vs mlx needs mlx-lm",
            child.stderr.strip()[-200:],
            "run `pip install mlx-lm` on a Mac with Apple silicon, or leave out --vs",
        )
    if child.returncode:
        raise UserError("mlx-lm failed", " ".join(child.stderr.split())[-300:])
    answers = json.loads(child.stdout.splitlines()[-1])
    theirs = Side(
        name=f"mlx-lm {answers['version']}",
        weights=_weights(config),
        prefill_tok_s=statistics.median(run["prompt_tps"] for run in answers["runs"]),
        decode_tok_s=statistics.median(run["generation_tps"] for run in answers["runs"]),
        new_tokens=min(run["generation_tokens"] for run in answers["runs"]),
        peak_bytes=int(GIGA * max(run["peak_memory"] for run in answers["runs"])),
        runs=len(answers["runs"]),
    )
    return Versus(len(prompt), ours, theirs, REMARK)


def _config(model: Path) -> dict[str, Any]:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model} is no model folder",
            str(error),
            "give --vs-model the folder of the checkpoint, or of its mlx conversion",
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{model / 'config.json'} is no model's", type(config).__name__)
    return config


def _require_same(config: dict[str, Any], manifest: Manifest, model: Path) -> None:
    other = {
        name: (config.get(name), getattr(manifest, field))
        for name, field in SAME.items()
        if config.get(name) != getattr(manifest, field)
    }
    if other:
        raise UserError(
            f"{model} is not the model that was converted",
            ", ".join(f"{name} {found} for {wanted}" for name, (found, wanted) in other.items()),
            "compare with the same model",
        )


def _weights(config: dict[str, Any]) -> str:
    quantization = config.get("quantization")
    if isinstance(quantization, dict):
        return f"{quantization.get('bits')} bit, groups of {quantization.get('group_size')}"
    return str(config.get("dtype") or config.get("torch_dtype") or "as stored")


def _serve() -> int:
    try:
        import mlx_lm
        from mlx_lm.tokenizer_utils import load_tokenizer
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    request = json.load(sys.stdin)
    model, _ = mlx_lm.load(request["model"])
    tokenizer = load_tokenizer(Path(request["model"]), eos_token_ids=[])
    answers = [_generate(mlx_lm, model, tokenizer, request) for _ in range(request["runs"] + 1)]
    print(json.dumps({"version": getattr(mlx_lm, "__version__", "unknown"), "runs": answers[1:]}))
    return 0


def _generate(mlx_lm: Any, model: Any, tokenizer: Any, request: dict[str, Any]) -> dict[str, float]:
    last = list(
        mlx_lm.stream_generate(
            model, tokenizer, request["prompt"], max_tokens=request["new_tokens"]
        )
    )[-1]
    names = ("prompt_tps", "generation_tps", "generation_tokens", "peak_memory")
    return {name: getattr(last, name) for name in names}


if __name__ == "__main__":
    sys.exit(_serve())
