"""Train the packaged privacy filter and write its card.

    python scripts/train_privacy_demo.py                  # tokenizer, training, measurement, card
    python scripts/train_privacy_demo.py --evaluate-only  # measure the packaged weights again
    python scripts/train_privacy_demo.py --sentences tests/demo  # the sets that the tests read

The texts are generated (private_sentences.py), so that any machine has them. Every figure in the
card is measured on the saved float16 weights, with the arithmetic in float32. Seeds fix all
choices; the last bits still depend on the machine and on the number of threads.
"""

import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faker
import torch
import transformers
from demo_training import (
    Descent,
    balance_loss,
    replace_folder,
    save_checkpoint,
    say,
    training_parser,
)
from privacy_card import (
    HARDEST,
    NEW,
    RECORD,
    Record,
    measure,
    render_card,
    sentences_of,
    write_record,
    write_text,
)
from private_formats import Draw
from private_sentences import TRAINED, Entity, Sentence, draw_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    OpenAIPrivacyFilterConfig,
    OpenAIPrivacyFilterForTokenClassification,
    PreTrainedTokenizerFast,
)

from ane_moe.checkpoints.original_filter import LABELS

CHECKPOINT = Path(__file__).resolve().parents[1] / "ane_moe" / "demo" / "privacy"
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the target of padding

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "sliding_window": 16,
    "initializer_range": 0.05,  # HF's 0.02 is for widths in the thousands
}


@dataclass(frozen=True)
class Settings:
    """What the training depends on besides the templates. Lengths are in tokens."""

    steps: int = 3600
    batch_texts: int = 24
    pool_batches: int = 8  # texts drawn at once and sorted by length, so that little is padding
    most_sentences: int = 5  # of a text
    most_tokens: int = 256
    merge_dropout: float = 0.1  # share of the tokenizer's merges left out, in every other batch
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    balance_coefficient: float = 0.01
    vocabulary: int = 2048
    vocabulary_texts: int = 12_000
    seed: int = 0


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text round-trips, none is unknown. Digits and punctuation stand
    alone, so that a token never holds the end of an entity and what follows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def bioes_targets(entities: Sequence[Entity], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The label of each token: its place among the tokens that overlap an entity."""
    index = {label: place for place, label in enumerate(list(LABELS))}
    targets = [0] * len(offsets)
    for entity in entities:
        inside = [
            token
            for token, (start, end) in enumerate(offsets)
            if start < entity.end and end > entity.start
        ]
        if not inside:
            continue  # behind what was cut off
        tags = "S" if len(inside) == 1 else "B" + "I" * (len(inside) - 2) + "E"
        for token, tag in zip(inside, tags, strict=True):
            targets[token] = index[f"{tag}-{entity.label}"]
    return targets


def build_model(settings: Settings, end_of_text: int) -> OpenAIPrivacyFilterForTokenClassification:
    config = OpenAIPrivacyFilterConfig(
        **ARCHITECTURE,
        vocab_size=settings.vocabulary,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    assert list(config.id2label.values()) == list(LABELS)
    return OpenAIPrivacyFilterForTokenClassification(config).float()


def drawn_texts(settings: Settings, draw: Draw) -> Iterator[Sentence]:
    """Texts to train on, without end."""
    while True:
        yield draw_text(draw, TRAINED, draw.random.randint(1, settings.most_sentences))


def batches(
    tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, attention masks and targets, each [texts, tokens], without end."""
    draw, bpe = Draw(settings.seed + 1), tokenizer.backend_tokenizer.model
    texts = drawn_texts(settings, draw)
    while True:
        pool = [next(texts) for _ in range(settings.batch_texts * settings.pool_batches)]
        pool.sort(key=lambda text: len(text.text))
        groups = [
            pool[at : at + settings.batch_texts] for at in range(0, len(pool), settings.batch_texts)
        ]
        draw.random.shuffle(groups)
        for index, group in enumerate(groups):
            # Words cut otherwise than they ever are, as unknown ones are (BPE-dropout, Provilkov
            # and others 2020).
            bpe.dropout = settings.merge_dropout if index % 2 else None
            yield collate(tokenizer, group, settings.most_tokens)


def collate(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Sentence], most_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    encoded = tokenizer(
        [text.text for text in texts],
        return_offsets_mapping=True,
        truncation=True,
        max_length=most_tokens,
    )
    rows = [
        (ids, bioes_targets(text.entities, offsets))
        for ids, offsets, text in zip(
            encoded["input_ids"], encoded["offset_mapping"], texts, strict=True
        )
    ]
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
    return ids, mask, targets


def train(
    model: OpenAIPrivacyFilterForTokenClassification,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
) -> None:
    """Train `model` in place, reporting to stderr."""
    descent = Descent(model, settings)
    experts, top_k = ARCHITECTURE["num_local_experts"], ARCHITECTURE["num_experts_per_tok"]
    started, tokens = time.monotonic(), 0
    model.train()
    source = batches(tokenizer, settings)
    for step in range(1, settings.steps + 1):
        ids, mask, targets = next(source)
        output = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        logits = model.score(output.last_hidden_state)  # [texts, tokens, labels]
        right = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        balance = balance_loss(output.router_logits, experts, top_k, mask)
        descent.step(right + settings.balance_coefficient * balance)
        tokens += int(mask.sum())
        if step % 50 == 0 or step == settings.steps:
            elapsed = time.monotonic() - started
            say(
                f"step {step}/{settings.steps}  loss {right.item():.4f}  balance "
                f"{balance.item():.3f}  {tokens / elapsed:.0f} tok/s  "
                f"{elapsed * (settings.steps - step) / step:.0f} s left"
            )


def train_checkpoint(settings: Settings, folder: Path) -> None:
    """Train tokenizer and model and save them in `folder`, the weights in float16."""
    texts = drawn_texts(settings, Draw(settings.seed))
    sample = (next(texts).text for _ in range(settings.vocabulary_texts))
    tokenizer = train_tokenizer(sample, settings.vocabulary)
    model = build_model(settings, tokenizer.eos_token_id)
    say(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, settings)
    tokenizer.backend_tokenizer.model.dropout = None
    save_checkpoint(model, tokenizer, folder)


def evaluate_checkpoint(settings: Settings, seconds: float, folder: Path) -> Record:
    """Measure the checkpoint as saved in `folder` and write its record and card there."""
    model = OpenAIPrivacyFilterForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    record = Record(
        settings=asdict(settings),
        architecture=ARCHITECTURE,
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        faker=faker.VERSION,
        parameters=model.num_parameters(),
        cpu_seconds=seconds,
        results=measure(model.eval(), tokenizer),
    )
    write_record(record, folder)
    return record


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Train and measure, or only measure, and report the outcome on stderr."""
    parser = training_parser(__doc__, CHECKPOINT, Settings())
    parser.add_argument(
        "--sentences", type=Path, help="only write two of the measured sets into this folder"
    )
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    evaluate_only: bool = arguments.pop("evaluate_only")
    sentences: Path | None = arguments.pop("sentences")
    torch.set_num_threads(arguments.pop("threads"))
    if sentences is not None:
        for name, measured in (("new", NEW), ("held_out", HARDEST)):
            rows = (json.dumps(asdict(one), ensure_ascii=False) for one in sentences_of(measured))
            text = "".join(f"{row}\n" for row in rows)
            write_text(sentences / f"{name}_sentences.jsonl", text)
    elif evaluate_only:
        kept = json.loads((out / RECORD).read_text())
        record = evaluate_checkpoint(Settings(**kept["settings"]), kept["cpu_seconds"], out)
        say(render_card(record))
    else:
        settings = Settings(**arguments)
        torch.manual_seed(settings.seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
            folder = Path(temporary) / "checkpoint"
            train_checkpoint(settings, folder)
            record = evaluate_checkpoint(settings, cpu_seconds(), folder)
            replace_folder(folder, out)
        say(render_card(record))


if __name__ == "__main__":
    main()
