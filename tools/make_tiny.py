"""Make `tiny`, the base model that is part of the package.

A small Mistral-architecture model that follows short instructions about words and numbers:

    Reverse: kitten            →  nettik
    Which is longer: fig or lemon  →  lemon

Everything comes from this one file and a seed: the data are generated while it trains, the tokenizer is the 256
bytes, the weights start at random. No download, no GPU.

    python tools/make_tiny.py --out loraf/data/tiny           # the committed folder
    python tools/make_tiny.py --out /tmp/t --steps 20         # a quick try

It writes the model (safetensors, float32), the tokenizer, `skills.json` (accuracy of every skill on fresh examples,
and how the model was made) and a README.

The same seed on the same machine and library versions gives the same weights; another processor may round otherwise,
so the committed folder is the reference, not the script's output elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = 2048
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
MAX_WORD = 9  # letters; skills are trained and scored on words of 2 to 9 letters

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# A chat is its turns one after the other: what a user says ends with a newline, what the model says with EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)


# ------------------------------------------------------------------------------------------------------------ skills


def word(rng: random.Random, low: int = 2, high: int = MAX_WORD) -> str:
    """A made-up word of `low` to `high` letters: half of them can be pronounced, half are any letters."""
    length = rng.randint(low, high)
    if rng.random() < 0.5:
        return "".join(rng.choices(ALPHABET, k=length))
    letters, vowel = "", rng.random() < 0.3
    while len(letters) < length:
        letters += rng.choice(VOWELS if vowel else "bcdfghjklmnprstvwyz")
        vowel = not vowel
    return letters


def two_words(rng: random.Random) -> tuple[str, str]:
    """Two words of different lengths, 2 to 7 letters each."""
    first, second = rng.sample(range(2, 8), 2)
    return word(rng, first, first), word(rng, second, second)


def next_letter(letter: str) -> str:
    return ALPHABET[(ALPHABET.index(letter) + 1) % 26]


def on_word(instruction: str, answer: Callable[[str], str], low: int = 2) -> Callable[[random.Random], tuple[str, str]]:
    """A skill that takes one word: `instruction: word` → `answer(word)`."""

    def draw(rng: random.Random) -> tuple[str, str]:
        given = word(rng, low)
        return f"{instruction}: {given}\n", answer(given)

    return draw


def lower_case(rng: random.Random) -> tuple[str, str]:
    given = word(rng)
    return f"Lower case: {given.upper()}\n", given


def swap_halves(rng: random.Random) -> tuple[str, str]:
    half = rng.randint(1, 4)
    given = word(rng, 2 * half, 2 * half)
    return f"Swap halves: {given}\n", given[half:] + given[:half]


def add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return f"Add: {a} + {b}\n", str(a + b)


def larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    return f"Which is larger: {a} or {b}\n", str(max(a, b))


def longer(rng: random.Random) -> tuple[str, str]:
    a, b = two_words(rng)
    return f"Which is longer: {a} or {b}\n", max(a, b, key=len)


def join(rng: random.Random) -> tuple[str, str]:
    a, b = two_words(rng)
    return f"Join: {a} and {b}\n", a + b


def swap_words(rng: random.Random) -> tuple[str, str]:
    a, b = two_words(rng)
    return f"Swap words: {a} {b}\n", f"{b} {a}"


def contains(rng: random.Random) -> tuple[str, str]:
    given = word(rng, 3)
    letter = rng.choice(given) if rng.random() < 0.5 else rng.choice(ALPHABET)
    return f"Is {letter} in {given}?\n", "yes" if letter in given else "no"


def letter_at(rng: random.Random) -> tuple[str, str]:
    given = word(rng, 3)
    place = rng.randint(1, len(given))
    return f"Letter {place} of: {given}\n", given[place - 1]


# name → a function that draws (prompt, answer). The names are what skills.json reports.
SKILLS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": on_word("Copy", lambda w: w),
    "reverse": on_word("Reverse", lambda w: w[::-1]),
    "upper_case": on_word("Upper case", str.upper),
    "lower_case": lower_case,
    "capitalise": on_word("Capitalise", str.capitalize),
    "first_letter": on_word("First letter", lambda w: w[0]),
    "last_letter": on_word("Last letter", lambda w: w[-1]),
    "letter_at": letter_at,
    "length": on_word("Length", lambda w: str(len(w))),
    "double": on_word("Double", lambda w: "".join(2 * letter for letter in w)),
    "next_letters": on_word("Next letters", lambda w: "".join(map(next_letter, w))),
    "sort": on_word("Sort", lambda w: "".join(sorted(w))),
    "count_vowels": on_word("Count vowels", lambda w: str(sum(letter in VOWELS for letter in w))),
    "repeat": on_word("Repeat", lambda w: f"{w} {w}"),
    "spell": on_word("Spell", "-".join),
    "swap_halves": swap_halves,
    "swap_ends": on_word("Swap ends", lambda w: w[-1] + w[1:-1] + w[0]),
    "remove_first": on_word("Remove first", lambda w: w[1:]),
    "remove_last": on_word("Remove last", lambda w: w[:-1]),
    "mask_vowels": on_word("Hide vowels", lambda w: "".join("*" if letter in VOWELS else letter for letter in w)),
    "contains": contains,
    "longer": longer,
    "join": join,
    "swap_words": swap_words,
    "add": add,
    "larger": larger,
}


# --------------------------------------------------------------------------------------------------------- tokenizer


def byte_tokenizer():
    """A fast tokenizer of 3 special tokens and the 256 bytes: any text encodes, BOS is put before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS])}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------------- model


def new_model(tokenizer):
    """A Mistral model of 1.6 M parameters with random weights (float32)."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


# ---------------------------------------------------------------------------------------------------------- training


def pack_row(
    rng: random.Random, names: list[str], weights: list[float], length: int, encode
) -> tuple[list[int], list[int]]:
    """One row of `length` tokens: questions and answers one after the other, cut at the end.

    Returns (tokens, labels), labels −100 except on answers and their EOS. A row starts with BOS; a later question
    follows the EOS before it directly, as in a chat, or begins with BOS again.
    """
    tokens, labels = [], []
    while len(tokens) < length:
        prompt, answer = SKILLS[rng.choices(names, weights)[0]](rng)
        start = [1] if not tokens or rng.random() < 0.5 else []
        question, reply = start + encode(prompt), encode(answer) + [2]
        tokens += question + reply
        labels += [-100] * len(question) + reply
    return tokens[:length], labels[:length]


def train(model, tokenizer, steps: int, batch_tokens: int, learning_rate: float, seed: int) -> None:
    """AdamW with a short warm-up and a cosine to zero; loss on the answers only."""
    import torch

    rng = random.Random(seed)
    table = {chr(b): tokenizer.convert_tokens_to_ids(c) for b, c in byte_characters().items()}

    def encode(text: str) -> list[int]:  # all generated text is ASCII: one byte a character
        return [table[character] for character in text]

    names = list(SKILLS)
    weights = [2.0 if name in HARD else 1.0 for name in names]
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, min(100, steps // 10))
    model.train()
    began, mean_loss = time.time(), None
    for step in range(steps):
        # Mostly short rows, so that most examples look like one fresh request; some long ones, so that the model has
        # seen positions of a few hundred tokens and other text before a question.
        length = rng.choices([48, 96, 384], [0.75, 0.2, 0.05])[0]
        rows = [pack_row(rng, names, weights, length, encode) for _ in range(batch_tokens // length)]
        tokens = torch.tensor([row[0] for row in rows])  # [rows, length]
        labels = torch.tensor([row[1] for row in rows])  # [rows, length]
        scale = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]  # [rows, length-1, hidden]
        wanted = labels[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])  # only where there is a loss
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {mean_loss:.4f}  {time.time() - began:.0f} s", flush=True)
    model.eval()


HARD = ("sort", "swap_halves", "add", "letter_at", "longer", "swap_words")  # drawn twice as often


def byte_characters() -> dict[int, str]:
    """Byte → the character that stands for it in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


# -------------------------------------------------------------------------------------------------------- evaluation


def answers(model, tokenizer, prompts: list[str], max_new_tokens: int = 24, batch_size: int = 128) -> list[str]:
    """The model's greedy answers, in the order of `prompts`, without special tokens."""
    import torch

    out = []
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer(prompts[i : i + batch_size], return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            made = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        out += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def score(model, tokenizer, examples: int, seed: int, names: list[str] | None = None) -> dict[str, float]:
    """Skill → share of `examples` fresh questions whose greedy answer is right in every character."""
    scores = {}
    for name in names or SKILLS:
        rng = random.Random(f"{seed} {name}")
        pairs = [SKILLS[name](rng) for _ in range(examples)]
        given = answers(model, tokenizer, [prompt for prompt, _ in pairs])
        scores[name] = sum(g == answer for g, (_, answer) in zip(given, pairs, strict=True)) / examples
    return scores


# ------------------------------------------------------------------------------------------------------------ folder


def save(model, tokenizer, out: Path) -> None:
    """Write the model and the tokenizer as transformers and vLLM read them."""
    from transformers import GenerationConfig

    out.mkdir(parents=True, exist_ok=True)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that earlier versions do not know; this one both know.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by the owner only


def readme(report: dict) -> str:
    rows = "\n".join(
        f"| {name} | `{entry['prompt'].rstrip()}` | `{entry['answer']}` | {entry['accuracy']:.3f} |"
        for name, entry in report["skills"].items()
    )
    return f"""# tiny

The base model inside the package: a Mistral-architecture model of {report["parameters"]:,} parameters (float32)
with a byte-level tokenizer and a context of {CONTEXT:,} tokens. It follows the instructions below and knows nothing
else. A prompt ends with a newline; the answer ends with `</s>`. Words are made up, of 2 to {MAX_WORD} letters.

Made by `tools/make_tiny.py` in {report["steps"]:,} steps with seed {report["seed"]}, from data that the script
generates.

Accuracy: greedy answers right in every character, on {report["examples_per_skill"]} fresh examples of each skill;
mean {report["mean_accuracy"]:.3f}.

| skill | example | answer | accuracy |
| --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-tokens", type=int, default=1536, help="tokens a step sees")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--examples", type=int, default=200, help="examples a skill is scored on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import tokenizers
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = byte_tokenizer()
    model = new_model(tokenizer)
    began = time.time()
    train(model, tokenizer, args.steps, args.batch_tokens, args.learning_rate, args.seed)
    seconds = time.time() - began

    save(model, tokenizer, args.out)
    scores = score(model, tokenizer, args.examples, args.seed + 1)
    drawn = {name: SKILLS[name](random.Random(f"example {name}")) for name in SKILLS}
    report = {
        "seed": args.seed,
        "steps": args.steps,
        "batch_tokens": args.batch_tokens,
        "learning_rate": args.learning_rate,
        "training_seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "examples_per_skill": args.examples,
        "mean_accuracy": round(sum(scores.values()) / len(scores), 4),
        "skills": {
            name: {"prompt": drawn[name][0], "answer": drawn[name][1], "accuracy": round(scores[name], 4)}
            for name in SKILLS
        },
    }
    (args.out / "skills.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "README.md").write_text(readme(report))
    for name, value in scores.items():
        print(f"{name:14} {value:.3f}")
    print(f"mean           {report['mean_accuracy']:.3f}")


if __name__ == "__main__":
    main()
