"""Small tokenizers and chat templates of the kinds that real models have."""

from __future__ import annotations

from tests.standins import byte_tokenizer

LINES = [
    "Q: two and two?\nA: four",
    "Q: the sky?\nA: blue",
    "### Response:\nfour blue",
    "Add. four and two",
    "user: hi",
]

# ChatML, as in Qwen2 but without its default system turn; no BOS. The second one has generation markers.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Llama 2: a BOS before each question, contents trimmed, spaces around each answer.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As in Qwen3 and DeepSeek-R1: thoughts are removed from all answers but the last.
THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or '</think>' not in m['content'] else m['content'].split('</think>')[1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _finished(tokenizer, specials=("<s>", "</s>", "<pad>"), eos="</s>", bos: str | None = "<s>"):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=specials[-1])
    fast.chat_template = byte_tokenizer().chat_template if bos else CHATML
    return fast


def sentencepiece_tokenizer():
    """As Mistral's and Llama 2's: a space before every text, spaces as ▁, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    specials = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in LINES for _ in range(9)], trainer)
    # The byte tokens were special only to get into the vocabulary.
    import json

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return _finished(Tokenizer.from_str(json.dumps(content)))


def wordpiece_tokenizer():
    """As BERT's: words in lower case, cut into pieces that begin with ## inside a word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["<pad>", "<s>", "</s>", "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _finished(tokenizer, specials[1::-1])


def merging_tokenizer():
    """Merges bytes across words and lines, so that prompts and completions merge across their border."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for line in LINES for _ in range(9)], trainer)
    return _finished(tokenizer)


def chatml_tokenizer(bos: str | None = None):
    """One token per byte, as Qwen2's: the end of a turn is the end of sequence; no BOS unless `bos` is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = _finished(tokenizer, specials, "<|im_end|>", bos)
    fast.chat_template = CHATML
    return fast
