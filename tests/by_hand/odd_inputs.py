"""Make odd inputs and print what each command says of them.

    python -m tests.by_hand.odd_inputs [NAME ...]

Checkpoints are the demo model with one thing changed, as it is met on the Hub: other key prefixes,
Git LFS pointers, an mlx folder, stale fields, other forms of tokenizer. Packages are small ones
that coremltools writes. Each line of the table is one run of the command line: input, command, exit
code, first line of what it said (of a failed gate the last, with the verdict). The text is there to
be read. What a reader need not judge is checked and marked with !, and makes the script exit with
1: a traceback, another exit code than 0, 1 and 2, or a conversion that cuts a text into other ids
than Hugging Face does.

`--keep FOLDER` leaves the inputs and conversions there. All of it is five minutes of CPU time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ane_moe.coreml_tools import ct
from ane_moe.demo import copy_demo
from tests.models import make_model
from tests.runtime.saved_program import saved

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456\n"
PROMPT = "<|endoftext|>def f(x): return 2024 + x"
PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
LONGEST_COMMAND = 300  # seconds

MIL_TEXT = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({})]
{
    func main<ios16>(tensor<fp32, [1, 4]> x) {
            tensor<fp32, [1, 4]> y = relu(x = x)[name = tensor<string, []>("y")];
        } -> (y);
}
"""

# {x} is the input, {y} its partner, {out} the conversion, {arrays} the input's own arrays.
CHECKPOINT_COMMANDS = (
    "plan {x}",
    "convert {x} {out} --context 64 --prefill 0",
    "generate {out} --prompt {prompt} --max-tokens 2 --json",
    "trace {x} --text {text} --out {new}.npz --max-tokens 16",
)
PACKAGE_COMMANDS = (
    "inspect {x}",
    "inspect {x} --placement",
    "run {x}",
    "run {x} --seed 0",
    "run {x}{arrays}",
    "diff {x} {y} --precision-b fp16",
)


@dataclass(frozen=True)
class Said:
    code: int
    line: str
    sound: bool  # no traceback, a code that is documented, ids as Hugging Face's


# ---- checkpoints: each takes the folder of a fresh copy of the demo model ----


def sound(folder: Path) -> None:
    """The control: nothing is changed."""


def prefixed(prefix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def with_tensors(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: torch.zeros(8, 8, dtype=torch.float16) for name in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def mlx_4bit(folder: Path) -> None:
    """Groups of 32 weights of 4 bits, packed in uint32, as mlx-lm's converter leaves them."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 8, dtype=torch.int32).view(torch.uint32)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.scales"] = torch.ones(rows, columns // 32, dtype=torch.float16)
        tensors[f"{stem}.biases"] = torch.zeros(rows, columns // 32, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    configured(quantization={"group_size": 32, "bits": 4})(folder)


def too_large_for_fp16(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    tensors[name][0, 0] = 70000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stale_beside_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"stale": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def byte_order_mark(folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)


def vocabulary_and_merges(folder: Path) -> None:
    """The form of GPT-2's time: no tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    without("tokenizer.json", "tokenizer_config.json")(folder)


def metaspace(folder: Path) -> None:
    """A Mixtral with its form of tokenizer, which transformers reads by the model's type."""
    make_model("mixtral", vocab_size=4096).half().save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "split": False,
        "prepend_scheme": "first",
    }
    model = tokenizer["model"]
    model["vocab"] = {name.replace("Ġ", "▁"): id_ for name, id_ in model["vocab"].items()}
    model["merges"] = [[part.replace("Ġ", "▁") for part in pair] for pair in model["merges"]]
    tokenizer["decoder"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "split": False,
        "prepend_scheme": "first",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer_class("LlamaTokenizer")(folder)


def tokenizer_class(name: str) -> Callable[[Path], None]:
    fields = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "legacy": True}
    return written("tokenizer_config.json", json.dumps(fields))


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "sound": sound,
    "keys-language-model": prefixed("model.language_model."),
    "keys-orig-mod": prefixed("_orig_mod.model."),
    "keys-module": prefixed("module.model."),
    "keys-bare": prefixed(""),
    "lfs-weights": written("model.safetensors", POINTER),
    "lfs-config": written("config.json", POINTER),
    "lfs-tokenizer": written("tokenizer.json", POINTER),
    "mlx-4bit": mlx_4bit,
    "gptq": configured(quantization_config={"quant_method": "gptq", "bits": 4}),
    "other-tensors": with_tensors("visual.patch_embed.weight", "v_head.weight"),
    "untied-no-head": configured(tie_word_embeddings=False),
    "stale-vocabulary": configured(vocab_size=4000),
    "stale-beside-shards": stale_beside_shards,
    "byte-order-mark": byte_order_mark,
    "adapter-beside": written("adapter_config.json", '{"peft_type": "LORA", "r": 8}'),
    "too-large-for-fp16": too_large_for_fp16,
    "dense-model": configured(model_type="qwen3", num_local_experts=None),
    "unknown-model": configured(model_type="deepseek_v2"),
    "no-config": without("config.json"),
    "tokenizer-metaspace": metaspace,
    "tokenizer-qwen2": tokenizer_class("Qwen2Tokenizer"),
    "tokenizer-no-config": without("tokenizer_config.json"),
    "tokenizer-old-files": vocabulary_and_merges,
    "tokenizer-none": without("tokenizer.json", "tokenizer_config.json"),
}


# ---- packages: each takes the path to write ----


class Two(torch.nn.Module):
    """tanh(b(a(x))), and with `scaled` an operation more between the two."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scaled = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), scaled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return torch.tanh(self.b(y * 3.0 if self.scaled else y))


class Picked(torch.nn.Module):
    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x[at.long()]


def converted(module: torch.nn.Module, *x: torch.Tensor, **options: Any) -> Any:
    traced = torch.jit.trace(module.eval(), x)
    options.setdefault("minimum_deployment_target", ct.target.iOS18)
    return ct.convert(traced, skip_model_load=True, **options)


def two(scaled: bool = False, x: str = "x", y: str = "y") -> Any:
    return converted(
        Two(scaled),
        torch.rand(1, 64),
        inputs=[ct.TensorType(x, shape=(1, 64))],
        outputs=[ct.TensorType(y)],
    )


def pipeline(path: Path) -> None:
    ct.utils.make_pipeline(two(), two(x="y", y="z")).save(str(path))


def image(path: Path, **options: Any) -> None:
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    kind = ct.ImageType("image", shape=(1, 3, 8, 8), scale=1 / 255, color_layout=ct.colorlayout.BGR)
    torch.manual_seed(0)
    converted(torch.nn.Sequential(*layers), torch.rand(1, 3, 8, 8), inputs=[kind], **options).save(
        str(path)
    )


def classifier(path: Path) -> None:
    image(path, classifier_config=ct.ClassifierConfig(["cat", "dog", "bird", "fish"]))


def squeeze(path: Path) -> None:
    """A squeeze of a slice of a size known at run time only; coremltools infers a wrong rank."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    begin, end = (mb.TensorSpec((2,), dtype=types.int32) for _ in range(2))

    @mb.program(input_specs=[mb.TensorSpec((4, 3)), begin, end], opset_version=ct.target.iOS16)
    def program(x, b, e):
        row = mb.squeeze(x=mb.slice_by_index(x=x, begin=b, end=e), axes=[0])
        return mb.reshape(x=row, shape=[2, 1])

    saved(program, path, ct.target.iOS16)


def picked(path: Path) -> None:
    rows = [ct.TensorType("x", shape=(4, 3)), ct.TensorType("at", shape=(2,), dtype=np.int32)]
    converted(
        Picked(), torch.rand(4, 3), torch.tensor([1, 0], dtype=torch.int32), inputs=rows
    ).save(str(path))


def damaged(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        two().save(str(path))
        change(path)

    return write


def neural_network(path: Path) -> None:
    converted(
        Two(),
        torch.rand(1, 64),
        inputs=[ct.TensorType("x", shape=(1, 64))],
        minimum_deployment_target=None,
        convert_to="neuralnetwork",
    ).save(str(path))


def compiled(path: Path) -> None:
    """A folder as Core ML compiles it: no package, but the program as text."""
    path.mkdir()
    (path / "coremldata.bin").write_bytes(b"\x00" * 16)
    (path / "model.mil").write_text(MIL_TEXT)


PACKAGES: dict[str, Callable[[Path], None]] = {
    "two.mlpackage": lambda path: two().save(str(path)),
    "two-scaled.mlpackage": lambda path: two(scaled=True).save(str(path)),
    "pipeline.mlpackage": pipeline,
    "image.mlpackage": image,
    "classifier.mlpackage": classifier,
    "squeeze.mlpackage": squeeze,
    "int-input.mlpackage": picked,
    "lfs-program.mlpackage": damaged(written(PROGRAM, POINTER)),
    "lfs-weights.mlpackage": damaged(written(WEIGHTS, POINTER)),
    "no-weights.mlpackage": damaged(without(WEIGHTS)),
    "network.mlmodel": neural_network,
    "compiled.mlmodelc": compiled,
}

PARTNERS = {"two.mlpackage": "two-scaled.mlpackage"}  # what `diff` compares with; else itself

# Arrays as people have them: floats for integers, wide integers for floats, pixels of 8 bits.
ARRAYS: dict[str, dict[str, np.ndarray]] = {
    "two.mlpackage": {"x": np.ones((1, 64), np.int64)},
    "image.mlpackage": {"image": np.full((1, 3, 8, 8), 200, np.uint8)},
    "classifier.mlpackage": {"image": np.full((1, 3, 8, 8), 200, np.uint8)},
    "squeeze.mlpackage": {
        "x": np.arange(12.0).reshape(4, 3),
        "b": np.array([1.0, 0.0]),
        "e": np.array([2.0, 2.0]),
    },
    "int-input.mlpackage": {"x": np.arange(12.0).reshape(4, 3), "at": np.array([1.5, 0.0])},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="inputs to take; default: all")
    parser.add_argument("--keep", type=Path, help="a new folder for the inputs")
    options = parser.parse_args()
    unknown = set(options.names) - {*CHECKPOINTS, *PACKAGES}
    if unknown:
        parser.error(
            f"no input is named {', '.join(unknown)}; there are "
            f"{', '.join([*CHECKPOINTS, *PACKAGES])}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return _table(folder.resolve(), options.names or [*CHECKPOINTS, *PACKAGES])


def _table(folder: Path, names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    for name in names:
        _make(folder, name)
    all_sound = True
    with ThreadPoolExecutor(2) as pool:
        tables = pool.map(lambda name: _rows(folder, name), names)
        for name, rows in zip(names, tables, strict=True):
            for command, said in rows:
                print(
                    f"{' ' if said.sound else '!'} {name:22s} {command:32.32s} {said.code:2d}  "
                    f"{said.line}",
                    flush=True,
                )
                all_sound = all_sound and said.sound
    return 0 if all_sound else 1


def _make(folder: Path, name: str) -> None:
    (folder / "text.txt").write_text(PROMPT)
    if name in CHECKPOINTS:
        CHECKPOINTS[name](copy_demo(folder / name))
        return
    for part in {name, PARTNERS.get(name, name)}:
        shutil.rmtree(folder / part, ignore_errors=True)
        PACKAGES[part](folder / part)
    for key, value in ARRAYS.get(name, {}).items():
        np.save(folder / f"{name}.{key}.npy", value)


def _rows(folder: Path, name: str) -> list[tuple[str, Said]]:
    """The commands in their order: `generate` needs `convert`, and is left out where that fails."""
    arrays = "".join(f" --input {key}={name}.{key}.npy" for key in ARRAYS.get(name, {}))
    commands = CHECKPOINT_COMMANDS if name in CHECKPOINTS else PACKAGE_COMMANDS
    rows = []
    for command in commands:
        if not arrays and "{arrays}" in command:
            continue
        if command.startswith("generate") and not (folder / f"{name}.out").exists():
            continue
        words = command.format(
            x=name,
            y=PARTNERS.get(name, name),
            out=f"{name}.out",
            arrays=arrays,
            new=f"{name}.trace",
            text="text.txt",
            prompt="PROMPT",
        ).split()
        shown = command.format(
            x="X", y="Y", out="OUT", arrays=" --input ...", new="NEW", text="TEXT", prompt="PROMPT"
        )
        said = _said(folder, [PROMPT if word == "PROMPT" else word for word in words])
        rows.append((shown, _compared(folder / name, said) if words[0] == "generate" else said))
    return rows


def _said(folder: Path, words: list[str]) -> Said:
    child = subprocess.run(
        [sys.executable, "-m", "ane_moe", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=LONGEST_COMMAND,
    )
    said = child.stderr if child.returncode == 2 else child.stdout or child.stderr
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["(nothing)"]
    line = lines[-1] if child.returncode == 1 else lines[0]
    documented = child.returncode in (0, 1, 2) and "Traceback (most recent" not in child.stderr
    return Said(child.returncode, line, documented)


def _compared(checkpoint: Path, said: Said) -> Said:
    """What `generate --json` said, cut to its prompt's ids beside those of Hugging Face."""
    if said.code:
        return said
    ours = json.loads(said.line)["prompt_ids"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        return Said(0, f"ids {ours}; Hugging Face reads none: {error}"[:200], said.sound)
    theirs = tokenizer(PROMPT)["input_ids"]
    return Said(
        0,
        f"ids {ours}; Hugging Face: {'the same' if ours == theirs else theirs}",
        said.sound and ours == theirs,
    )


if __name__ == "__main__":
    sys.exit(main())
