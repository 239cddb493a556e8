"""What chooses tokens, makes text and batches for the merged backend: against something obvious, or not ours."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from loraf.tasksets import TaskSet
from loraf_serve.backends import model_runner
from loraf_serve.backends.answer_state import AnswerState, DecodingConfig
from loraf_serve.backends.backend import GenerationRequest, Sampling
from loraf_serve.backends.detokenize import StopTexts, TextStream, token_text
from loraf_serve.backends.logprobs import rank_of
from loraf_serve.backends.model_runner import Batch, Forward, Prefill
from loraf_serve.backends.sampler import Sampler
from tests.standins import byte_tokenizer, make_model
from tests.tools import needs

VOCAB = 320
EOS = 2
TOKENIZER = byte_tokenizer()
CONFIG = DecodingConfig(TOKENIZER, EOS, frozenset(), 1024)


def random_sampling(seed: int) -> tuple[Sampling, list[int], list[int], torch.Tensor]:
    """A sampling with several fields set, a prompt, an output and logits."""
    draw = random.Random(seed)
    prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 20))]
    output = [draw.randrange(VOCAB) for _ in range(draw.randint(0, 20))]
    sampling = Sampling(
        temperature=draw.choice([0.3, 0.7, 1.0, 1.9]),
        top_p=draw.choice([0.05, 0.5, 0.9, 1.0]),
        top_k=draw.choice([0, 1, 5, 50, 1000]),
        min_p=draw.choice([0.0, 0.02, 0.5]),
        repetition_penalty=draw.choice([0.5, 1.0, 1.3, 5.0]),
        presence_penalty=draw.choice([-2.0, 0.0, 0.7]),
        frequency_penalty=draw.choice([-0.5, 0.0, 1.1]),
        logit_bias={draw.randrange(VOCAB): draw.uniform(-100, 100) for _ in range(draw.choice([0, 3]))},
        min_tokens=draw.choice([0, 10]),
        stop_token_ids=(7, 9),
    )
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return sampling, prompt, output, logits


def obvious_probabilities(sampling, prompt, output, logits) -> list[float]:
    """The definition, a token at a time in Python floats."""
    scores = [float(x) for x in logits]
    if len(output) < sampling.min_tokens:
        for token in (EOS, *sampling.stop_token_ids):
            scores[token] = -math.inf
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(output):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= sampling.frequency_penalty * count
        scores[token] -= sampling.presence_penalty
    scores = [x / sampling.temperature for x in scores]

    def probabilities() -> list[float]:
        top = max(scores)
        weights = [math.exp(x - top) for x in scores]
        return [w / sum(weights) for w in weights]

    now = probabilities()
    scores = [x if p >= sampling.min_p * max(now) else -math.inf for x, p in zip(scores, now, strict=True)]
    if 0 < sampling.top_k < VOCAB:
        least = sorted(scores)[-sampling.top_k]
        scores = [x if x >= least else -math.inf for x in scores]
    if sampling.top_p < 1:
        now, mass, kept = probabilities(), 0.0, set()
        for token in sorted(range(VOCAB), key=lambda t: -now[t]):
            kept.add(token)
            mass += now[token]
            if mass >= sampling.top_p:
                break
        scores = [x if t in kept else -math.inf for t, x in enumerate(scores)]
    return probabilities()


@pytest.mark.parametrize("seed", range(40))
def test_scores_follow_the_definition(seed):
    sampling, prompt, output, logits = random_sampling(seed)
    before = logits.clone()
    scores = Sampler(sampling, prompt, {EOS, 7, 9}).scores(logits, output)
    expected = torch.tensor(obvious_probabilities(sampling, prompt, output, logits))
    torch.testing.assert_close(scores.softmax(-1), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before), "the logits are still needed for log-probabilities"


def test_scores_equal_vllms_own_functions():
    pytest.importorskip("vllm", reason=needs("vLLM"))
    from vllm.v1.sample.logits_processor import builtin
    from vllm.v1.sample.ops.penalties import apply_all_penalties
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.sample.sampler import Sampler as VllmSampler

    cases = [random_sampling(seed) for seed in range(60)]
    rows = len(cases)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    # Their requests carry end-of-sequence among all_stop_token_ids (SamplingParams.update_from_generation_config).
    params = [
        SimpleNamespace(**dataclasses.asdict(s), all_stop_token_ids={EOS, *s.stop_token_ids}, structured_outputs=None)
        for s, _, _, _ in cases
    ]
    added = [(i, params[i], prompt, output) for i, (_, prompt, output, _) in enumerate(cases)]
    update = SimpleNamespace(batch_size=rows, removed=[], added=added, moved=[])
    logits = torch.stack([case[3] for case in cases])
    for kind in (builtin.MinTokensLogitsProcessor, builtin.LogitBiasLogitsProcessor):
        processor = kind(config, torch.device("cpu"), False)
        processor.update_state(update)
        logits = processor.apply(logits)

    def column(name: str, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype)

    longest = max(len(prompt) for _, prompt, _, _ in cases)
    prompts = torch.tensor([[*prompt, *[VOCAB] * (longest - len(prompt))] for _, prompt, _, _ in cases])
    penalties = (column("presence_penalty"), column("frequency_penalty"), column("repetition_penalty"))
    logits = apply_all_penalties(logits, prompts, *penalties, [output for _, _, output, _ in cases])
    logits = VllmSampler.apply_temperature(logits, column("temperature"), all_random=True)
    min_p = builtin.MinPLogitsProcessor(config, torch.device("cpu"), False)
    min_p.update_state(update)
    logits = min_p.apply(logits)
    top_k = column("top_k", torch.long)
    top_k[(top_k == 0) | (top_k > VOCAB)] = VOCAB
    logits = apply_top_k_top_p_pytorch(logits, top_k, column("top_p"))
    for row, (sampling, prompt, output, raw) in enumerate(cases):
        mine = Sampler(sampling, prompt, {EOS, 7, 9}).scores(raw, output).softmax(-1)
        theirs = logits[row].softmax(-1)
        assert torch.equal(mine > 0, theirs > 0), f"case {row}: other tokens can be drawn"
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7, msg=lambda m, row=row: f"case {row}: {m}")


def test_draws_have_the_probabilities_of_the_scores():
    sampling = Sampling(temperature=0.8, top_k=6, seed=3)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    sampler = Sampler(sampling, [1], {EOS})
    draws = 4000
    counts = Counter(sampler(logits, []) for _ in range(draws))
    expected = sampler.scores(logits, []).softmax(-1)
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    # Pearson's statistic with 5 degrees of freedom exceeds 20.5 once in a thousand seeds.
    statistic = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(expected.tolist()) if p > 0)
    assert statistic < 20.5


def test_a_seed_repeats_and_answers_differ():
    logits = torch.zeros(VOCAB)

    def draw(seed, index):
        sampler = Sampler(Sampling(seed=seed), [1], {EOS}, index)
        return [sampler(logits, []) for _ in range(10)]

    assert draw(5, 0) == draw(5, 0)
    assert draw(5, 0) != draw(5, 1)
    assert draw(5, 1) == draw(6, 0), "vLLM gives answer i the seed plus i"
    assert draw(None, 0) != draw(None, 0)


def test_rank_counts_tied_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -2.0, -3.0])
    assert [rank_of(logprobs, token) for token in range(4)] == [1, 3, 3, 4]


# Text


def vllm_detokenizer(prompt, sampling):
    pytest.importorskip("vllm", reason=needs("vLLM"))
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    params = SamplingParams(
        stop=list(sampling.stop), min_tokens=sampling.min_tokens, skip_special_tokens=sampling.skip_special_tokens
    )
    request = SimpleNamespace(request_id="r", prompt_token_ids=prompt, prompt_embeds=None, sampling_params=params)
    return FastIncrementalDetokenizer(TOKENIZER, request)


ANY_TEXT = st.text(alphabet=st.sampled_from("ab é🙂👩‍🚀日\ufffd\n"), max_size=12)
ANY_TOKENS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=24)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(answer=ANY_TEXT, prompt=ANY_TEXT)
@settings(deadline=None, max_examples=150)
def test_pieces_of_text_join_to_the_decoded_answer(answer, prompt):
    stream = TextStream(TOKENIZER, [1, *ids_of(prompt)], True)
    pieces = [stream.add(token) for token in ids_of(answer)]
    assert "".join(pieces) == answer.rstrip("\ufffd")  # a sign for bytes that are no character waits for what follows
    assert all(not piece.endswith("\ufffd") for piece in pieces)


@given(tokens=ANY_TOKENS, skip=st.booleans())
@settings(deadline=None, max_examples=150)
def test_text_of_any_tokens_is_the_decoded_text_without_an_incomplete_end(tokens, skip):
    stream = TextStream(TOKENIZER, [1], skip)
    for n, token in enumerate(tokens, 1):
        piece = stream.add(token)
        whole = TOKENIZER.decode(tokens[:n], skip_special_tokens=skip)
        assert not piece or not whole.endswith("\ufffd")
    stream = TextStream(TOKENIZER, [1], skip)
    text = "".join(stream.add(token) for token in tokens)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=skip)
    assert whole.startswith(text)
    assert text == whole if not whole.endswith("\ufffd") else len(whole) - len(text) >= 1


@given(tokens=ANY_TOKENS, skip=st.booleans(), stop=st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
@settings(deadline=None, max_examples=100)
def test_text_equals_that_of_vllm(tokens, skip, stop):
    sampling = Sampling(stop=tuple(stop), skip_special_tokens=skip, min_tokens=len(tokens) // 4)
    theirs = vllm_detokenizer([1], sampling)
    stream, stops = TextStream(TOKENIZER, [1], skip), StopTexts(sampling.stop)
    mine = ""
    for n, token in enumerate(tokens, 1):
        found = theirs.update([token], False)
        mine += stops.add(stream.add(token), n > sampling.min_tokens)
        assert stops.matched == found
        if found is not None:
            break
    mine += "" if stops.matched else stops.flush()
    assert mine == theirs.get_next_output_text(True, False)


def test_a_prompt_that_ends_within_a_character_is_continued_not_repeated():
    whole = ids_of("ab🙂c")
    for cut in range(1, len(whole)):
        stream = TextStream(TOKENIZER, whole[:cut], True)
        text = "".join(stream.add(token) for token in whole[cut:])
        assert text == {1: "b🙂c", 2: "🙂c", 3: "🙂c", 4: "🙂c", 5: "🙂c", 6: "c"}[cut]
    for odd in ([whole[3]] * 9, [1, whole[2], whole[3]]):  # bytes that no answer makes a character of
        assert TextStream(TOKENIZER, odd, True).add(ids_of("x")[0]) == "x"


def obvious_stop(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    """Grows the text a character at a time and looks for a stop text at its end."""
    text = ""
    for character in "".join(pieces):
        text += character
        for stop in stops:
            if text.endswith(stop):
                return text[: -len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3, unique=True),
)
@settings(deadline=None, max_examples=300)
def test_stop_texts_end_the_text_and_are_never_sent(pieces, stops):
    stopping = StopTexts(stops)
    sent = ""
    expected, found = obvious_stop(pieces, stops)
    for piece in pieces:
        sent += stopping.add(piece)
        assert expected.startswith(sent), "nothing is sent that would have to be taken back"
        if stopping.matched:
            break
    else:
        sent += stopping.flush()
    assert (sent, stopping.matched) == (expected, found)


def test_text_that_cannot_begin_a_stop_text_is_not_held_back():
    stopping = StopTexts(["\n\nQ:"])
    assert stopping.add("hello") == "hello"
    assert stopping.add(" you\n") == " you"
    assert stopping.add("x") == "\nx"
    assert stopping.add("\n\nQ") == ""
    assert stopping.add("!") == "\n\nQ!"


@given(tokens=st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_texts_of_single_tokens_equal_vllms(tokens):
    pytest.importorskip("vllm", reason=needs("vLLM"))
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
    from vllm.v1.engine.logprobs import LogprobsProcessor

    theirs = LogprobsProcessor(TOKENIZER, None, None, None, None, None)
    texts = [
        theirs._verify_tokens(convert_ids_list_to_tokens(TOKENIZER, [token]), [token], tokens[max(0, n - 4) : n])[0]
        for n, token in enumerate(tokens)
    ]
    assert [token_text(TOKENIZER, tokens[:n], token) for n, token in enumerate(tokens)] == texts


# Batches


@pytest.fixture(scope="module", params=["full", "sliding"])
def model(request, tmp_path_factory):
    if request.param == "full":
        folder = make_model("qwen2", tmp_path_factory.mktemp("qwen2"))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, sliding_window=8, initializer_range=0.1, **sizes, **heads)
    return MistralForCausalLM(config).eval()


def generate(model, prompt: list[int], tokens: int, **options) -> list[int]:
    """What transformers' own loop answers."""
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        do_sample=False,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        eos_token_id=options.pop("eos_token_id", EOS),
        **options,
    )
    return out[0, len(prompt) :].tolist()


def answer_to(prompt: list[int], tokens: int, **fields) -> AnswerState:
    sampling = Sampling(max_tokens=tokens, **({"temperature": 0.0, "ignore_eos": True} | fields))
    return AnswerState(GenerationRequest("r", tuple(prompt), sampling, None, TaskSet()), 0, CONFIG)


def prefilled(forward: Forward, answer: AnswerState, prompt: list[int]) -> Prefill:
    prefill = Prefill(prompt)
    while (logits := prefill.step(forward)) is None:
        pass
    answer.accept(logits)
    return prefill


@torch.inference_mode()
def test_rows_that_come_and_go_get_what_generate_gives_each_alone(model, monkeypatch):
    monkeypatch.setattr(model_runner, "CHUNK", 7)  # prompts below take one to six chunks
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(length)] for length in (3, 40, 11, 1, 25, 7)]
    lengths = [9, 14, 4, 20, 6, 11]
    answers = [answer_to(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    forward, batch = Forward(model), Batch()
    waiting = list(zip(answers, prompts, strict=True))
    for step in range(60):
        if waiting and step % 3 == 0:
            answer, prompt = waiting.pop(0)
            batch.add([answer], prefilled(forward, answer, prompt).cache, len(prompt))
        if not batch:
            break
        for answer, logits in zip(batch.answers, batch.step(forward), strict=True):
            answer.accept(logits)
        batch.keep([row for row, answer in enumerate(batch.answers) if not answer.finished])
    assert not waiting and len(batch) == 0
    for answer, prompt, length in zip(answers, prompts, lengths, strict=True):
        assert answer.token_ids == generate(model, prompt, length, eos_token_id=None)


@torch.inference_mode()
def test_padding_that_no_row_needs_is_dropped(model):
    forward, batch = Forward(model), Batch()
    for prompt in ([5] * 30, [6] * 4):
        answer = answer_to(prompt, 9)
        batch.add([answer], prefilled(forward, answer, prompt).cache, len(prompt))
    assert batch._cache.get_seq_length() == 30
    batch.keep([1])
    assert batch._cache.get_seq_length() == 4
    assert batch.step(forward).shape == (1, VOCAB)
    batch.keep([])
    assert batch._cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"min_tokens": 12, "ignore_eos": False, "logit_bias": {EOS: 90.0}}, {"min_new_tokens": 12, "bias_eos": 90.0}),
        ({"logit_bias": {40: 6.0, 41: -50.0}}, {"sequence_bias": {(40,): 6.0, (41,): -50.0}, "eos_token_id": None}),
    ],
)
@torch.inference_mode()
def test_greedy_answers_equal_those_of_transformers_generate(model, fields, options):
    options = dict(options)
    if "bias_eos" in options:
        options["sequence_bias"] = {(EOS,): options.pop("bias_eos")}
    prompt = [1, 50, 60, 70, 80]
    answer = answer_to(prompt, 16, **({"ignore_eos": options.get("eos_token_id", EOS) is None} | fields))
    batch = Batch()
    forward = Forward(model)
    batch.add([answer], prefilled(forward, answer, prompt).cache, len(prompt))
    while not answer.finished:
        answer.accept(batch.step(forward)[0])
    assert answer.token_ids == generate(model, prompt, 16, **options)


def test_models_whose_state_cannot_pause_or_whose_rows_interfere_are_recognised(model):
    from transformers import MambaConfig, Phi3Config, Qwen3NextConfig

    assert model_runner.unsupported_cache(model.config) is None
    assert not model_runner.lengths_interfere(model.config)
    assert "Linear" in model_runner.unsupported_cache(Qwen3NextConfig())
    assert model_runner.unsupported_cache(MambaConfig()) is not None
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4} | factors
    assert model_runner.lengths_interfere(Phi3Config(rope_parameters=rope))
